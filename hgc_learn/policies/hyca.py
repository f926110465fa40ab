"""Whole steps at regular intervals, forecast between them by a solver of its own for every cluster of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hgc_learn.calibration import SiteStatistics, site_statistics
from hgc_learn.plan import row_of
from hgc_learn.policies.registry import register
from hgc_learn.predictors.per_channel import CHOICES
from hgc_learn.setting import Draft, Setting
from hgc_learn.spacing import first_fulls, full_steps, intervals


@register(
    "hyca",
    paper="HyCa, Zheng et al. 2025, arXiv 2510.04188 (its transformers' rule, on a UNet)",
    grid=lambda setting: {
        "interval": intervals(setting.num_steps, 20),
        "first_full": first_fulls(setting.num_steps),
        "site": ("last_block", "prediction"),
        "num_clusters": (1, 8),
        "solvers": ("all", "hold", "linear", "hold linear", "linear taylor2 ab2 bdf2 foca"),
    },
)
def hyca(
    setting: Setting,
    *,
    interval: float = 2,
    first_full: int = 1,
    site: Literal["last_block", "prediction"] = "last_block",
    num_clusters: int = 8,
    solvers: str = "all",
) -> Draft:
    """Clusters channels by how they move over the steps; each cluster gets the solver with the least forecast error.

    Descriptors and errors are measured on uncached trajectories, errors at the very steps that are skipped.

    Args:
        interval: steps per full step; 2.5 for the steps 0, 2, 5, 7, ...
        first_full: steps at the start that are all full; from the last of them on the interval counts. More than one
            is TaylorSeer's warm-up (Liu et al. 2025, arXiv 2503.06923).
        site: what is forecast: `last_block` (the decoder's last tensor; only the output convolution runs between
            full steps) or `prediction` (nothing runs).
        num_clusters: of the k-means over channels.
        solvers: names of those to choose from, of hold, linear, taylor2, ab2, bdf2 and foca. `all` in the paper; but
            the best on uncached trajectories need not be the best on cached ones.
    """
    setting.need_samples("hyca")
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}; it must be at least 1.")
    full = full_steps(setting.num_steps, interval, first_full)
    known = [choice.name for choice in CHOICES]
    pool = known if solvers == "all" else solvers.split()
    if not pool or not set(pool) <= set(known):
        raise ValueError(f"solvers is {solvers!r}; it is all or some of {' '.join(known)}.")
    output = setting.graph.output
    names = {"last_block": setting.graph.nodes[output].inputs[0], "prediction": output}
    name = names[site]
    row = row_of((i in full for i in range(setting.num_steps)), "p")
    if "p" not in row:
        return Draft({})
    statistics = site_statistics(setting, [name])[name]
    clusters = setting.once(
        ("hyca clusters", name, num_clusters), lambda: cluster_channels(descriptors(statistics), num_clusters)
    )
    errors = setting.once(("hyca errors", name, *full), lambda: solver_errors(statistics, full)).clone()
    errors[[name not in pool for name in known]] = torch.inf
    chosen = choose_solvers(errors, clusters)
    return Draft({name: row}, {f"{name}/predictor": chosen})


def descriptors(statistics: SiteStatistics) -> Tensor:
    """How each channel moves over the steps, float64 [channels, 5]: logarithms of its energy, its first and second
    differences relative to it, the ratio of third to second differences (jerk to curvature), and its spectral
    flatness over time (geometric over arithmetic mean of the power spectrum without the constant)."""
    gram = statistics.gram
    num_steps = gram.shape[1]
    energy = _energy(gram, torch.eye(num_steps, dtype=torch.float64))
    differences, operator = [], torch.eye(num_steps, dtype=torch.float64)
    for _ in range(3):
        operator = operator[1:] - operator[:-1]
        differences.append(_energy(gram, operator))
    first, second, third = differences
    spectrum = torch.fft.fft(torch.eye(num_steps, dtype=torch.float64))[1 : num_steps // 2 + 1]
    power = torch.einsum("wi,cij,wj->cw", spectrum, gram.to(spectrum.dtype), spectrum.conj()).real
    tiny = 1e-12 * energy[:, None] + 1e-30
    log_power = (power + tiny).log()
    flatness = log_power.mean(1) - (power + tiny).mean(1).log()
    tiny = tiny[:, 0]
    ratios = [(first + tiny) / (energy + tiny), (second + tiny) / (energy + tiny), (third + tiny) / (second + tiny)]
    return torch.stack([(energy + tiny).log(), *(ratio.log() for ratio in ratios), flatness], dim=1)


def _energy(gram: Tensor, operator: Tensor) -> Tensor:
    """Mean over rows of |operator @ F|^2 per channel."""
    return torch.einsum("ri,cij,rj->c", operator, gram, operator).clamp_min(0.0) / max(1, len(operator))


def cluster_channels(features: Tensor, num_clusters: int) -> Tensor:
    """k-means over standardised descriptors [channels, descriptors]: int64 [channels]."""
    from sklearn.cluster import KMeans

    points = ((features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-9)).numpy()
    num_clusters = min(num_clusters, len(np.unique(points, axis=0)))
    return torch.from_numpy(KMeans(num_clusters, n_init=10, random_state=0).fit_predict(points)).long()


def solver_errors(statistics: SiteStatistics, full: Sequence[int]) -> Tensor:
    """Squared error of each of CHOICES over the steps that are not computed: float64 [choices, channels]."""
    channels, num_steps = statistics.total.shape
    errors = torch.zeros(len(CHOICES), channels, dtype=torch.float64)
    for step in range(num_steps):
        if step in full:
            continue
        computed = [j for j in reversed(full) if j < step]  # the latest first
        for index, solver in enumerate(CHOICES):
            ages = [step - j for j in computed[: solver.num_values]]
            coefficients = solver.fill(ages, step, {}).coefficients
            fill = {step - age: float(c) for age, c in zip(ages, coefficients, strict=False)}
            errors[index] += statistics.squared_error(step, fill)
    return errors


def choose_solvers(errors: Tensor, clusters: Tensor) -> Tensor:
    """Per channel, the index of the solver with the least error over its cluster: uint8 [channels]."""
    by_cluster = torch.zeros(len(errors), int(clusters.max()) + 1, dtype=errors.dtype)
    by_cluster.index_add_(1, clusters, errors)
    return by_cluster.argmin(0)[clusters].to(torch.uint8)
