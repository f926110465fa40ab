"""Settings of known architectures on the meta device, with nothing to measure on."""

from __future__ import annotations

from functools import cache

from hgc_learn.models.architectures import build_architecture
from hgc_learn.sampling import SamplingConfig
from hgc_learn.setting import Setting


@cache
def unmeasured_setting(architecture: str) -> Setting:
    """Without weights and samples: 20 steps, 512x512, with guidance; timesteps are spaced evenly from 999 on."""
    graph, costs = build_architecture(architecture).measure((512, 512))
    return Setting(graph, costs, SamplingConfig(20, 7.5, 512, 512), tuple(999.0 - 50.0 * i for i in range(20)))
