"""No guidance: one half of the batch and one prediction."""

from hgc_learn.predictors.base import Fill, Predictor

ZERO = Predictor(
    "zero",
    "0",
    1,
    lambda ages, step, parameters: Fill((0.0,)),
    "guidance dropped: the difference counts as zero (T-GATE, arXiv 2404.02747)",
    only_guidance=True,
)
