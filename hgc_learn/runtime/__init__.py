"""Runs a schedule inside a pipeline. `hgc_learn.inference` is its front."""
