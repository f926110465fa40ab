from pathlib import Path

import torch

from hgc_learn.demo.features import ABSENT, FEATURES_FILE, SceneFeatures, load_recogniser
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.demo.train_features import train_features


def test_the_committed_network_recognises_test_scenes() -> None:
    dataset = SceneDataset("test", 96)
    scenes = [dataset[index] for index in range(96)]
    pictures = torch.stack([scene["image"] for scene in scenes]) / 2 + 0.5
    colors = torch.stack([scene["object_colors"] for scene in scenes])[:, 1:]
    recogniser = load_recogniser()
    right = recogniser(pictures).argmax(-1) == colors.where(colors >= 0, ABSENT)
    assert right.float().mean() > 0.9
    assert right[colors >= 0].float().mean() > 0.8
    assert recogniser.features(pictures).shape == (96, SceneFeatures.num_features)
    assert FEATURES_FILE.stat().st_size < 2**20


def test_training_writes_what_loading_reads(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    figures = train_features(path, num_scenes=32, num_steps=3, batch_size=16, seed=0)
    assert 0 <= figures["accuracy"] <= 1
    assert load_recogniser(path)(torch.rand(2, 3, 64, 64)).shape == (2, 6, 9)
