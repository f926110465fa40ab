"""What a picture is judged by: closeness to the uncached one, obedience to control and caption, realism."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from hgc_learn.comparison.statistics import mean_interval, resampled_interval
from hgc_learn.demo.features import load_features
from hgc_learn.demo.metrics import ColorAccuracy, ControlMeanIoU
from hgc_learn.evaluation import Samples

Batch = dict[str, Any]
CLIP_MODEL: Final = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Obedience:
    """Counts per sample: `confusion` [n, classes, classes], of its objects those with the `correct` colour [n] and the
    `total` [n]. Figures are of the sums, as `ControlMeanIoU` and `ColorAccuracy` define them."""

    confusion: NDArray[np.int64]
    correct: NDArray[np.int64]
    total: NDArray[np.int64]

    @classmethod
    def of(cls, pictures: Tensor, batches: Sequence[Batch]) -> Obedience:
        miou, accuracy = ControlMeanIoU(), ColorAccuracy()
        counts: dict[str, list[NDArray]] = {"confusion": [], "correct": [], "total": []}
        maps = torch.cat([batch["label_map"] for batch in batches])
        colors = torch.cat([batch["object_colors"] for batch in batches])
        for sample in zip(pictures.split(1), maps.split(1), colors.split(1), strict=True):
            for metric in (miou, accuracy):
                metric.reset()
                metric.update(*sample)
            counts["confusion"].append(miou.confmat.numpy())
            counts["correct"].append(accuracy.correct.numpy())
            counts["total"].append(accuracy.total.numpy())
        return cls(**{name: np.stack(values) for name, values in counts.items()})

    def miou(self, samples: NDArray[np.int64]) -> NDArray[np.floating]:
        """Mean IoU of every set of samples; indices [sets, n]."""
        confusion = _sums(self.confusion, samples)
        intersection = np.einsum("skk->sk", confusion)
        union = confusion.sum(1) + confusion.sum(2) - intersection
        return np.nanmean(np.where(union > 0, intersection / np.maximum(union, 1), np.nan), axis=1)

    def color_accuracy(self, samples: NDArray[np.int64]) -> NDArray[np.floating]:
        return _sums(self.correct, samples) / np.maximum(_sums(self.total, samples), 1)

    def figures(self, full: Obedience) -> dict[str, Any]:
        """Both figures and their relative loss against the uncached pictures, with intervals."""
        num_samples = len(self.total)
        everything = np.arange(num_samples)[None]
        result: dict[str, Any] = {}
        for name in ("miou", "color_accuracy"):
            own, other = getattr(self, name), getattr(full, name)

            def loss(samples: NDArray[np.int64], own: Callable = own, other: Callable = other) -> NDArray[np.floating]:
                before = other(samples)
                return np.where(before > 0, before - own(samples), 0) / np.where(before > 0, before, 1)

            key = "control_miou" if name == "miou" else name
            result[key] = float(own(everything)[0])
            result[f"{key}_ci"] = resampled_interval(num_samples, own)
            result[f"{key}_relative_loss"] = float(loss(everything)[0])
            result[f"{key}_relative_loss_ci"] = resampled_interval(num_samples, loss)
        return result


def _sums(counts: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.floating]:
    """Of counts [n, ...] over every set of samples, indices [sets, n]: whole numbers [sets, ...]. By how often each
    sample is in a set, which is faster than to take the samples out."""
    num_sets, n = len(samples), len(counts)
    places = samples + n * np.arange(num_sets)[:, None]
    often = np.bincount(places.ravel(), minlength=num_sets * n).reshape(num_sets, n).astype(float)
    sums: NDArray[np.floating] = np.tensordot(often, counts.astype(float), 1)
    return sums


class SceneFID:
    """FID to drawn pictures, by the features of `hgc_learn.demo.features`."""

    def __init__(self, drawn: Tensor):
        """`drawn` [n, 3, 64, 64] in [0, 1]; n is to be the number of the pictures that are judged."""
        self.metric = FrechetInceptionDistance(load_features(), reset_real_features=False)
        for pictures in drawn.split(64):
            self.metric.update(pictures, real=True)

    def __call__(self, pictures: Tensor) -> float:
        self.metric.reset()
        for part in pictures.split(64):
            self.metric.update(part, real=False)
        return max(0.0, float(self.metric.compute()))


def closeness_figures(per_sample: dict[str, Tensor]) -> dict[str, Any]:
    """Means and intervals."""
    result: dict[str, Any] = {}
    for name, values in per_sample.items():
        result[name] = float(values.double().mean())
        result["psnr_ci" if name == "psnr_db" else f"{name}_ci"] = mean_interval(values.numpy())
    return result


OptionalMetric = Callable[[Samples, Samples, Sequence[str]], float]
"""`metric(samples, full, prompts)`: of what a policy made, beside the uncached samples or the prompts."""


def _lpips() -> OptionalMetric:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if importlib.util.find_spec("torchvision") is None or not weights.is_file():
        raise ValueError(f"optional_metrics: lpips needs torchvision and its AlexNet weights at {weights}.")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    return lambda samples, full, prompts: float(lpips(samples.pictures, full.pictures))


def _clip() -> OptionalMetric:
    if not isinstance(try_to_load_from_cache(CLIP_MODEL, "config.json"), str):
        raise ValueError(f"optional_metrics: clip needs {CLIP_MODEL} in the Hugging Face cache.")
    from torchmetrics.multimodal.clip_score import CLIPScore

    clip = CLIPScore(CLIP_MODEL)
    return lambda samples, full, prompts: float(clip(list((255 * samples.pictures).byte()), list(prompts)))


OPTIONAL_METRICS: dict[str, Callable[[], OptionalMetric]] = {"lpips": _lpips, "clip": _clip}
"""LPIPS to the uncached pictures, CLIP score to the prompts. Each that is asked for has a column in the report. Their
networks are not part of this project, and nothing is downloaded."""


def optional_metric(name: str) -> OptionalMetric:
    """One of `OPTIONAL_METRICS`, ready to use.

    Raises:
        ValueError: an unknown name, or a package or weights that are missing; the message says what to install.
    """
    if name not in OPTIONAL_METRICS:
        raise ValueError(f"optional_metrics: {name!r} is not one of {', '.join(OPTIONAL_METRICS)}.")
    return OPTIONAL_METRICS[name]()
