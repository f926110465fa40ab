"""Exact measures of controllability for pictures of :mod:`hgc_learn.demo.scenes`; no judge network.

The rule: chroma of an RGB pixel is the vector (R - (G + B) / 2, sqrt(3) / 2 (G - B)), whose angle is the hue. Divided
by the brightest channel it does not depend on light or texture, which scenes keep out of the hue. A pixel is
background where that saturation is below `FOREGROUND_SATURATION`; otherwise it belongs to the object of the scene
whose colour in the caption has the nearest hue.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from hgc_learn.demo.scenes import COLOR_HUES, COLORS, NUM_CLASSES

FOREGROUND_SATURATION = 0.38  # half of what a typical object has, so that anti-aliased edges fall in the middle
MIN_VISIBLE_PIXELS = 40  # of an object, before erosion; fewer do not show a colour reliably
_BRIGHTNESS_FLOOR = 0.08  # keeps the noise of nearly black pixels from counting as saturation


def hue_directions() -> Tensor:
    """Unit chroma vector of every colour, float32 [len(COLORS), 2]."""
    angles = torch.tensor([math.radians(COLOR_HUES[color]) for color in COLORS])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def chroma(images: Tensor) -> Tensor:
    """Chroma of RGB images [B, 3, H, W] in [0, 1], divided by brightness: float32 [B, 2, H, W]."""
    red, green, blue = images.float().clamp(0, 1).unbind(1)
    plane = torch.stack([red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)], dim=1)
    return plane / (images.float().amax(1, keepdim=True).clamp(0, 1) + _BRIGHTNESS_FLOOR)


def recover_label_map(images: Tensor, object_colors: Tensor) -> Tensor:
    """Read the label map off pictures by the module's rule.

    Args:
        images: [B, 3, H, W] in [0, 1].
        object_colors: integers [B, NUM_CLASSES], colour index per class id, -1 where absent.

    Returns:
        Class ids, int64 [B, H, W].
    """
    plane = chroma(images)
    closeness = torch.einsum("bdhw,kd->bkhw", plane, hue_directions().to(plane.device))
    class_closeness = closeness.gather(
        1, object_colors.clamp(min=0)[:, :, None, None].expand(-1, -1, *images.shape[2:])
    ).masked_fill((object_colors < 0)[:, :, None, None], -math.inf)
    return class_closeness.argmax(1).masked_fill(plane.norm(dim=1) < FOREGROUND_SATURATION, 0)


def _check(images: Tensor, label_map: Tensor, object_colors: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
    if images.min() < -1e-3 or images.max() > 1 + 1e-3:
        raise ValueError("images must lie in [0, 1]: for pictures in [-1, 1] pass images / 2 + 0.5")
    batch, _, height, width = images.shape
    if label_map.shape != (batch, height, width):
        raise ValueError(f"label_map must be {(batch, height, width)}, got {tuple(label_map.shape)}")
    if object_colors.shape != (batch, NUM_CLASSES):
        raise ValueError(f"object_colors must be {(batch, NUM_CLASSES)}, got {tuple(object_colors.shape)}")


class ControlMeanIoU(MulticlassJaccardIndex):
    """Mean intersection over union between the control and the label map recovered from the pictures.

    The standard measure of semantic segmentation: one confusion matrix over the data set, classes = background and
    kinds, the mean over the classes that occur. In [0, 1], higher is better.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(NUM_CLASSES, **kwargs)

    def update(  # type: ignore[override]  # as torchmetrics' own subclasses do
        self, images: Tensor, label_map: Tensor, object_colors: Tensor
    ) -> None:
        """Add pictures [B, 3, H, W] in [0, 1], class ids [B, H, W] and colours [B, NUM_CLASSES].

        Raises:
            ValueError: if a shape or the range of the pictures is wrong.
        """
        _check(images, label_map, object_colors)
        super().update(recover_label_map(images, object_colors), label_map.long())


class ColorAccuracy(Metric):
    """Share of the objects that have the colour which the caption asks for.

    The colour of an object is the nearest of all colours to the mean chroma inside its visible region, eroded by one
    pixel. Objects with fewer than `MIN_VISIBLE_PIXELS` are left out. Chance is 1 / len(COLORS).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, label_map: Tensor, object_colors: Tensor) -> None:
        """Add pictures [B, 3, H, W] in [0, 1], class ids [B, H, W] and colours [B, NUM_CLASSES].

        Raises:
            ValueError: if a shape or the range of the pictures is wrong.
        """
        _check(images, label_map, object_colors)
        masks = F.one_hot(label_map.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()
        eroded = 1 - F.max_pool2d(1 - masks, kernel_size=3, stride=1, padding=1)
        mean_chroma = torch.einsum("bkhw,bdhw->bkd", eroded, chroma(images))
        nearest = (mean_chroma @ hue_directions().to(images.device).T).argmax(-1)
        counted = (object_colors >= 0) & (masks.sum((2, 3)) >= MIN_VISIBLE_PIXELS) & (eroded.sum((2, 3)) > 0)
        self.correct += (counted & (nearest == object_colors)).sum()
        self.total += counted.sum()

    def compute(self) -> Tensor:
        """Share of the objects with the right colour, a scalar in [0, 1]; NaN before any object was seen."""
        return self.correct.float() / self.total


def scene_metrics() -> MetricCollection:
    """Both, by the names of their figures: `control_miou`, `color_accuracy`."""
    return MetricCollection({"control_miou": ControlMeanIoU(), "color_accuracy": ColorAccuracy()})
