from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from hgc_learn.demo.metrics import ColorAccuracy, ControlMeanIoU, recover_label_map
from hgc_learn.demo.scenes import SceneDataset


@pytest.fixture(scope="module")
def scenes() -> dict[str, Any]:
    dataset = SceneDataset("validation", 48)
    batch = default_collate([dataset[index] for index in range(len(dataset))])
    batch["image"] = batch["image"] / 2 + 0.5
    return batch


def control_miou(images: torch.Tensor, scenes: dict[str, Any]) -> float:
    return float(ControlMeanIoU()(images, scenes["label_map"], scenes["object_colors"]))


def color_accuracy(images: torch.Tensor, scenes: dict[str, Any]) -> float:
    return float(ColorAccuracy()(images, scenes["label_map"], scenes["object_colors"]))


def test_drawn_pictures_score_nearly_one(scenes: dict[str, Any]) -> None:
    assert control_miou(scenes["image"], scenes) > 0.95
    assert color_accuracy(scenes["image"], scenes) > 0.99


def test_other_scenes_pictures_score_low(scenes: dict[str, Any]) -> None:
    shuffled = scenes["image"].roll(1, 0)
    assert control_miou(shuffled, scenes) < 0.4
    assert color_accuracy(shuffled, scenes) < 0.5


def test_recoloured_pictures_keep_their_shapes_but_lose_color_accuracy(scenes: dict[str, Any]) -> None:
    single = [index for index, colors in enumerate(scenes["object_colors"]) if (colors >= 0).sum() == 1]
    chosen = {key: scenes[key][single] for key in ("image", "label_map", "object_colors")}
    turned = chosen["image"].roll(1, 1)  # red becomes green, green becomes blue
    assert control_miou(turned, chosen) > 0.9
    assert color_accuracy(turned, chosen) < 0.1


def test_grey_pictures_are_all_background(scenes: dict[str, Any]) -> None:
    grey = scenes["image"].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert (recover_label_map(grey, scenes["object_colors"]) == 0).all()


def test_updates_add_up_to_one_confusion(scenes: dict[str, Any]) -> None:
    metric = ControlMeanIoU()
    for part in range(0, 48, 16):
        metric.update(*(scenes[key][part : part + 16] for key in ("image", "label_map", "object_colors")))
    assert float(metric.compute()) == pytest.approx(control_miou(scenes["image"], scenes))


def test_pictures_in_the_wrong_range_are_refused(scenes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        control_miou(2 * scenes["image"] - 1, scenes)
    with pytest.raises(ValueError, match="label_map must be"):
        ControlMeanIoU().update(scenes["image"], scenes["label_map"][:, ::2], scenes["object_colors"])
