"""What T-GATE puts in the place of cross-attention once guidance is gone."""

from hgc_learn.predictors.base import Fill, Predictor

MEAN = Predictor(
    "mean",
    "m",
    1,
    lambda ages, step, parameters: Fill((1.0,)),
    "F0 averaged over the guided and the unguided half (T-GATE, arXiv 2404.02747)",
    mean_of_halves=True,
)
