"""What T-GATE puts in the place of cross-attention once guidance is gone (arXiv 2404.02747)."""

from hgc_learn.predictors.base import Fill, Predictor

MEAN = Predictor(
    "mean",
    "m",
    1,
    lambda ages, step, parameters: Fill((1.0,)),
    mean_of_halves=True,
)
