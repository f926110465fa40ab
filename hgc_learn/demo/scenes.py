"""Procedurally drawn scenes for the demonstration teacher.

A scene is a 64x64 picture of one to three coloured objects. What decides what is strictly separated, so that
controllability can be measured exactly:

- **shape and place** of the objects come only from the label map (the control image),
- their **colours** come only from the caption,
- **everything else** (background, light, shading, surface texture, small parts, shadows) is free detail that a
  generator has to decide by itself.

Textures and light change brightness and leave hue alone, and the background is nearly grey; class and colour of
every pixel can therefore be read back from chroma (see :mod:`hgc_learn.demo.metrics`).
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

FloatArray = NDArray[np.float32]

IMAGE_SIZE = 64
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
CLASS_NAMES = ("background", *KINDS)
NUM_CLASSES = len(CLASS_NAMES)
COLOR_HUES = {  # degrees on the HSV wheel
    "red": 0.0,
    "orange": 32.0,
    "yellow": 60.0,
    "green": 122.0,
    "cyan": 180.0,
    "blue": 226.0,
    "purple": 272.0,
    "pink": 320.0,
}
COLORS = tuple(COLOR_HUES)
# Control image: one RGB colour in [0, 255] per class. They say nothing about the colours of the objects.
CLASS_COLORS = np.array(
    [[0, 0, 0], [230, 60, 60], [60, 200, 90], [70, 100, 240], [240, 220, 70], [220, 80, 220], [70, 220, 230]],
    dtype=np.uint8,
)
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
CONNECTIVES = ("and", "with")

TRAIN_SEEDS = range(1_000_000)
VALIDATION_SEEDS = range(1_000_000, 1_100_000)
TEST_SEEDS = range(2_000_000, 2_100_000)
SPLITS = {"train": TRAIN_SEEDS, "validation": VALIDATION_SEEDS, "test": TEST_SEEDS}

MIN_VISIBLE_SHARE = 0.4  # an object more hidden than this is not recognisable, and is placed anew
_RADII = {1: (15.0, 24.0), 2: (12.0, 19.0), 3: (11.0, 16.0)}  # pixels, by number of objects
_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
_FREQUENCIES = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.rfftfreq(IMAGE_SIZE)[None]).astype(np.float32)


@dataclass(frozen=True)
class SceneObject:
    """One object: `kind` from KINDS, `color` from COLORS, `mask` bool [64, 64], its visible pixels."""

    kind: str
    color: str
    mask: NDArray[np.bool_]

    @property
    def class_id(self) -> int:
        """Class id in the label map (0 is background)."""
        return CLASS_NAMES.index(self.kind)


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    `image` and `conditioning_image` are uint8 [64, 64, 3]; `label_map` is uint8 [64, 64] of class ids;
    `objects` run from the rearmost to the foremost. The kinds within one scene differ, and so do the colours.
    """

    seed: int
    image: NDArray[np.uint8]
    conditioning_image: NDArray[np.uint8]
    label_map: NDArray[np.uint8]
    caption: str
    objects: tuple[SceneObject, ...]

    @property
    def object_colors(self) -> NDArray[np.int64]:
        """Colour index per class id, int64 [NUM_CLASSES]; -1 where the scene has no object of that class."""
        colors = np.full(NUM_CLASSES, -1, dtype=np.int64)
        for scene_object in self.objects:
            colors[scene_object.class_id] = COLORS.index(scene_object.color)
        return colors


@dataclass(frozen=True)
class _Placement:
    kind: str
    row: float
    column: float
    radius: float
    angle: float

    def distance(self, shift_rows: float = 0.0, shift_columns: float = 0.0) -> FloatArray:
        """Signed distance in pixels (negative inside) to the outline, moved by the given shift."""
        y, x = _ROWS - self.row - shift_rows, _COLUMNS - self.column - shift_columns
        c, s = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return _signed_distance(self.kind, c * x + s * y, c * y - s * x, np.float32(self.radius))


def _signed_distance(kind: str, x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    if kind == "circle":
        return np.hypot(x, y) - 0.92 * r
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * r
    if kind == "triangle":
        return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.58 * r
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.27 * r
    if kind == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - r, short - 0.33 * r)
    # Star: fold the plane into one of its ten mirrored sectors, where the outline is a single edge.
    sector = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    length, inner = np.hypot(x, y), 0.5 * r
    tip, notch = np.array([1.08 * r, 0.0]), inner * np.array([np.cos(sector), np.sin(sector)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    along, across = length * np.cos(angle) - tip[0], length * np.sin(angle)
    return (across * -edge[0] + along * edge[1]).astype(np.float32)


def _coverage(distance: FloatArray, softness: float = 1.0) -> FloatArray:
    """Share of each pixel inside the outline: anti-aliased, or blurred by `softness` pixels."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _blur(field: FloatArray, sigma: float) -> FloatArray:
    kernel = np.exp(-2 * (np.pi * sigma * _FREQUENCIES) ** 2)
    return np.fft.irfft2(np.fft.rfft2(field) * kernel, s=field.shape).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, sigma: float) -> FloatArray:
    """Smooth random field with mean 0 and standard deviation about 1/2."""
    noise = _blur(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32), sigma)
    return 0.5 * (noise - noise.mean()) / (noise.std() + 1e-6)


def _pattern(rng: np.random.Generator, names: tuple[str, ...], period: tuple[float, float]) -> FloatArray:
    """A random pattern in [-1, 1] with random phase and orientation."""
    name = names[rng.integers(len(names))]
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(*period)
    phase_u, phase_v, sharpness = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 4.0)
    if name == "plain":
        return np.zeros_like(_ROWS)
    if name == "noise":
        return np.clip(_smooth_noise(rng, wavelength / 5), -1, 1)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    turn = np.float32(2 * np.pi / wavelength)
    u, v = turn * (c * _COLUMNS + s * _ROWS), turn * (c * _ROWS - s * _COLUMNS)
    if name == "stripes":
        wave = np.sin(u + phase_u)
    elif name == "checks":
        wave = 1.6 * np.sin(0.8 * u + phase_u) * np.sin(0.8 * v + phase_v)
    elif name == "dots":
        wave = np.cos(0.8 * u + phase_u) + np.cos(0.8 * v + phase_v) - 0.7
    else:  # waves: stripes bent by a slow sine
        wave = np.sin(u + phase_u + 1.5 * np.sin(0.4 * v + phase_v))
    return np.tanh(sharpness * wave).astype(np.float32)


def _place(rng: np.random.Generator, kinds: list[str]) -> tuple[list[_Placement], NDArray[np.uint8]]:
    """Place the objects, rear to front, so that enough of each stays visible; also the label map."""
    low, high = _RADII[len(kinds)]
    while True:
        placements, label_map = [], np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        areas = {}
        for kind in kinds:
            radius = rng.uniform(low, high)
            row, column = rng.uniform(0.75 * radius, IMAGE_SIZE - 1 - 0.75 * radius, size=2)
            placement = _Placement(kind, row, column, radius, rng.uniform(0, 2 * np.pi))
            inside = placement.distance() < 0
            class_id = CLASS_NAMES.index(kind)
            areas[class_id] = int(inside.sum())
            label_map[inside] = class_id
            placements.append(placement)
        visible = np.bincount(label_map.ravel(), minlength=NUM_CLASSES)
        if all(visible[class_id] >= MIN_VISIBLE_SHARE * area for class_id, area in areas.items()):
            return placements, label_map


def _draw_background(rng: np.random.Generator, light: FloatArray) -> FloatArray:
    """Nearly grey background, float32 [64, 64, 3] in [0, 1]."""
    tone = rng.uniform(0.3, 0.85)
    ramp = (light[0] * (_ROWS - 31.5) + light[1] * (_COLUMNS - 31.5)) / 32
    field = tone * (1 + rng.uniform(0.05, 0.3) * ramp)
    if rng.random() < 0.5:  # a floor meets a wall
        slope, height = rng.uniform(-0.15, 0.15), rng.uniform(22, 50)
        floor = _coverage(height + slope * (_COLUMNS - 31.5) - _ROWS)
        field = field * (1 + floor * rng.choice([-1, 1]) * rng.uniform(0.15, 0.35))
    names = ("plain", "noise", "noise", "stripes", "checks", "dots", "waves")
    field = field * (1 + rng.uniform(0.08, 0.25) * _pattern(rng, names, (8.0, 18.0)))
    field = field * (1 + 0.1 * _smooth_noise(rng, rng.uniform(2, 5)))
    tint = rng.uniform(-0.045, 0.045, size=3).astype(np.float32)
    return np.clip(field, 0.08, 0.97)[..., None] * (1 + tint)


def _draw_object(rng: np.random.Generator, placement: _Placement, color: str, light: FloatArray) -> FloatArray:
    """The object's surface over the whole frame, float32 [64, 64, 3] in [0, 1]; the caller cuts it out."""
    hue = (COLOR_HUES[color] + rng.uniform(-4, 4)) % 360 / 360
    saturation, value = rng.uniform(0.8, 0.95), rng.uniform(0.78, 0.95)
    base = np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32)

    height = _blur(_coverage(placement.distance()), rng.uniform(1.5, 3.0))
    slope_rows, slope_columns = np.gradient(height)
    relief = rng.uniform(2.0, 4.0) * (slope_rows * light[0] + slope_columns * light[1])
    ramp = light[0] * (_ROWS - placement.row) + light[1] * (_COLUMNS - placement.column)
    shade = 0.86 - relief - rng.uniform(0.1, 0.25) * ramp / placement.radius
    names = ("plain", "noise", "stripes", "stripes", "checks", "dots", "waves")
    shade = shade * (1 + rng.uniform(0.15, 0.32) * _pattern(rng, names, (6.0, 13.0)))
    for _ in range(rng.integers(0, 4)):  # small round parts, lighter or darker than the rest
        part = np.hypot(
            _ROWS - placement.row - rng.uniform(-0.6, 0.6) * placement.radius,
            _COLUMNS - placement.column - rng.uniform(-0.6, 0.6) * placement.radius,
        )
        shade = shade * (1 + rng.choice([-0.45, 0.35]) * _coverage(part - rng.uniform(1.5, 3.2)))
    # Clipping the shade and not the channels keeps the hue.
    surface = np.clip(shade, 0.38, 1 / value)[..., None] * base

    offset = rng.uniform(0.3, 0.5) * placement.radius
    glint = np.hypot(_ROWS - placement.row + light[0] * offset, _COLUMNS - placement.column + light[1] * offset)
    gloss = rng.uniform(0, 0.4) * np.exp(-((glint / rng.uniform(2, 5)) ** 2))[..., None]
    return surface + gloss * (1 - surface)


def _caption(rng: np.random.Generator, phrases: list[str]) -> str:
    """`phrases` ("red circle", ...) in random order, joined in a few ways."""
    nouns = [f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}" for phrase in rng.permutation(phrases)]
    connective = CONNECTIVES[rng.integers(len(CONNECTIVES))]
    joined = nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} {connective} {nouns[-1]}"
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(joined)


def draw_scene(seed: int) -> Scene:
    """Draw the scene of `seed`; the same seed gives the same scene, bit for bit, on one version of numpy."""
    rng = np.random.default_rng(seed)
    num_objects = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    kinds = [str(kind) for kind in rng.choice(KINDS, size=num_objects, replace=False)]
    colors = [str(color) for color in rng.choice(COLORS, size=num_objects, replace=False)]
    placements, label_map = _place(rng, kinds)
    caption = _caption(rng, [f"{color} {kind}" for kind, color in zip(kinds, colors, strict=True)])

    direction = rng.uniform(0, 2 * np.pi)
    light = np.array([np.sin(direction), np.cos(direction)], dtype=np.float32)  # points away from the light
    image = _draw_background(rng, light)
    for placement, color in zip(placements, colors, strict=True):
        reach = rng.uniform(1.5, 5.0)
        shadow = _coverage(placement.distance(reach * light[0], reach * light[1]), rng.uniform(2, 6))
        image = image * (1 - rng.uniform(0.25, 0.55) * shadow)[..., None]
        cover = _coverage(placement.distance())[..., None]
        image = image * (1 - cover) + cover * _draw_object(rng, placement, color, light)

    objects = tuple(
        SceneObject(kind, color, label_map == CLASS_NAMES.index(kind))
        for kind, color in zip(kinds, colors, strict=True)
    )
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return Scene(seed, pixels, CLASS_COLORS[label_map], label_map, caption, objects)


def image_to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def label_map_to_conditioning(label_maps: torch.Tensor) -> torch.Tensor:
    """Class ids, integers [B, H, W] -> control images, float32 [B, 3, H, W] in [0, 1]."""
    palette = torch.from_numpy(CLASS_COLORS).to(label_maps.device).float() / 255
    return palette[label_maps.long()].permute(0, 3, 1, 2).contiguous()


class SceneDataset(Dataset[dict[str, Any]]):
    """Scenes of one split, drawn when asked for.

    Items have `image` (float32 [3, 64, 64] in [-1, 1]), `conditioning_image` (float32 [3, 64, 64] in [0, 1]),
    `text` (str), `label_map` (int64 [64, 64]), `object_colors` (int64 [NUM_CLASSES], see
    :attr:`Scene.object_colors`) and `seed` (int).

    Args:
        split: "train", "validation" or "test"; their seeds are disjoint.
        num_scenes: length of the dataset.
        offset: number of scenes of the split to leave out at its beginning.

    Raises:
        ValueError: if the split is unknown or too small.
    """

    def __init__(self, split: str = "train", num_scenes: int = 1024, offset: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if num_scenes < 0 or offset < 0 or offset + num_scenes > len(SPLITS[split]):
            raise ValueError(f"split {split!r} has {len(SPLITS[split])} scenes; asked for {num_scenes} from {offset}")
        self.seeds = SPLITS[split][offset : offset + num_scenes]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = draw_scene(self.seeds[index])
        return {
            "image": 2 * image_to_tensor(scene.image) - 1,
            "conditioning_image": image_to_tensor(scene.conditioning_image),
            "text": scene.caption,
            "label_map": torch.from_numpy(scene.label_map).long(),
            "object_colors": torch.from_numpy(scene.object_colors),
            "seed": scene.seed,
        }


def draw_batches(split: str, num_scenes: int, batch_size: int, offset: int = 0) -> list[dict[str, Any]]:
    """The first scenes of a split, those after `offset`."""
    return list(DataLoader(SceneDataset(split, num_scenes, offset), batch_size))
