"""Predictors: how a skipped tensor is filled in. One module each; a new one is a module and its name below."""

from hgc_learn.predictors.ab2 import AB2
from hgc_learn.predictors.base import Fill, Predictor
from hgc_learn.predictors.bdf2 import BDF2
from hgc_learn.predictors.fitted import FITTED
from hgc_learn.predictors.fitted_per_channel import FITTED_PER_CHANNEL
from hgc_learn.predictors.foca import FOCA
from hgc_learn.predictors.hold import HOLD
from hgc_learn.predictors.linear import LINEAR
from hgc_learn.predictors.mean import MEAN
from hgc_learn.predictors.per_channel import PER_CHANNEL
from hgc_learn.predictors.scale_shift import SCALE_SHIFT
from hgc_learn.predictors.taylor import TAYLOR2, TAYLOR3, TAYLOR4
from hgc_learn.predictors.zero import ZERO

_ALL = (
    *(HOLD, LINEAR, TAYLOR2, TAYLOR3, TAYLOR4, AB2, BDF2, FOCA, ZERO, MEAN),
    *(PER_CHANNEL, SCALE_SHIFT, FITTED, FITTED_PER_CHANNEL),
)
PREDICTORS: dict[str, Predictor] = {p.name: p for p in _ALL}
BY_CODE: dict[str, Predictor] = {p.code: p for p in _ALL}

__all__ = ["BY_CODE", "PREDICTORS", "Fill", "Predictor"]
