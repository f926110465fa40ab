"""Trains routers: the LightningModule, what it learns from, and `train.py`."""
