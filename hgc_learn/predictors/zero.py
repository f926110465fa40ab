"""No guidance: one half of the batch and one prediction (as in T-GATE, arXiv 2404.02747)."""

from hgc_learn.predictors.base import Fill, Predictor

ZERO = Predictor(
    "zero",
    "0",
    1,
    lambda ages, step, parameters: Fill((0.0,)),
    only_guidance=True,
)
