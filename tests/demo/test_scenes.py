from itertools import combinations

import numpy as np
import pytest
import torch

from hgc_learn.demo.scenes import (
    CLASS_COLORS,
    COLORS,
    KINDS,
    NUM_CLASSES,
    SPLITS,
    SceneDataset,
    draw_scene,
    image_to_tensor,
    label_map_to_conditioning,
)


def test_same_seed_draws_the_same_scene() -> None:
    first, second, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label_map, second.label_map)
    assert first.caption == second.caption
    assert not np.array_equal(first.image, other.image)


def test_splits_share_no_seed() -> None:
    for first, second in combinations(SPLITS.values(), 2):
        assert first[-1] < second[0] or second[-1] < first[0]


def test_caption_and_label_map_describe_the_objects() -> None:
    for seed in range(30):
        scene = draw_scene(seed)
        assert 1 <= len(scene.objects) <= 3
        for scene_object in scene.objects:
            assert scene_object.kind in KINDS and scene_object.color in COLORS
            assert f"{scene_object.color} {scene_object.kind}" in scene.caption
            assert scene_object.mask.any()
            assert (scene.label_map[scene_object.mask] == scene_object.class_id).all()
        assert {*np.unique(scene.label_map)} <= {0, *(scene_object.class_id for scene_object in scene.objects)}
        assert np.array_equal(scene.conditioning_image, CLASS_COLORS[scene.label_map])


def test_dataset_items() -> None:
    item = SceneDataset("validation", 4)[1]
    assert item["image"].shape == item["conditioning_image"].shape == (3, 64, 64)
    assert -1 <= item["image"].min() < 0 < item["image"].max() <= 1
    assert item["conditioning_image"].min() >= 0 and item["conditioning_image"].max() <= 1
    assert item["label_map"].shape == (64, 64)
    assert item["object_colors"].shape == (NUM_CLASSES,) and item["object_colors"][0] == -1
    assert item["seed"] == SPLITS["validation"][1]


def test_conditioning_from_label_map_is_the_drawn_one() -> None:
    scene = draw_scene(3)
    made = label_map_to_conditioning(torch.from_numpy(scene.label_map)[None])[0]
    torch.testing.assert_close(made, image_to_tensor(scene.conditioning_image))


def test_dataset_rejects_what_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        SceneDataset("tset")
    with pytest.raises(ValueError, match="has 100000 scenes"):
        SceneDataset("test", 100_001)
