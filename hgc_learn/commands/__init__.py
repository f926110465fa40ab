"""The commands of `python -m hgc_learn`, one module each."""
