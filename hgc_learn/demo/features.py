"""A small network whose features describe pictures of :mod:`hgc_learn.demo.scenes`, for the Fréchet distance (FID).

Trained by `python -m hgc_learn.demo.train_features` to tell which shapes are in a picture and which colour each has.
FID with these features compares with itself only, never with FID from Inception's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hgc_learn.demo.metrics import chroma
from hgc_learn.demo.scenes import COLORS, KINDS
from hgc_learn.files import write_atomically

FEATURES_FILE = Path(__file__).parent / "features.safetensors"
CHANNELS = (16, 32, 64, 64)
ABSENT = len(COLORS)  # the answer for a shape that is not in the picture


class SceneFeatures(nn.Module):
    """Pictures float [B, 3, 64, 64] in [0, 1] to features float32 [B, num_features].

    Convolutions over colour and chroma, then the maximum over what is left of height and width: whether there is a
    shape, wherever it is. Takes and gives what `torchmetrics.image.fid.FrechetInceptionDistance(feature=...)` expects.
    """

    num_features = CHANNELS[-1]

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((5, *CHANNELS), CHANNELS, (2, 2, 2, 1), strict=False):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = pictures.float()
        return self.layers(torch.cat([2 * pictures - 1, chroma(pictures)], dim=1)).amax((2, 3))


class SceneRecogniser(nn.Module):
    """What the features are trained as: logits [B, kinds, colours + 1] of each shape's colour, or of its absence."""

    def __init__(self) -> None:
        super().__init__()
        self.features = SceneFeatures()
        self.head = nn.Linear(SceneFeatures.num_features, len(KINDS) * (len(COLORS) + 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures)).unflatten(1, (len(KINDS), -1))


def save_recogniser(recogniser: SceneRecogniser, path: Path) -> None:
    """Writes the weights in float16; the file appears when it is complete."""
    weights = recogniser.state_dict()
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    write_atomically(path, save(half))


def load_recogniser(path: Path = FEATURES_FILE) -> SceneRecogniser:
    """The trained network, frozen, in float32."""
    recogniser = SceneRecogniser()
    recogniser.load_state_dict(load_file(path))  # into parameters of float32
    return recogniser.eval().requires_grad_(False)


def load_features() -> SceneFeatures:
    """Its part that makes the features."""
    return load_recogniser().features
