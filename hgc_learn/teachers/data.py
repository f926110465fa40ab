"""Drawn and encoded scenes on disk: the teacher trains on them many times over, drawing them takes a while."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hgc_learn.demo.scenes import IMAGE_SIZE, NUM_CLASSES, TRAIN_SEEDS, draw_scene
from hgc_learn.files import write_atomically

_CHUNK = 250
_BATCH_SIZE = 64
_SHAPES = {
    "images": ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
    "label_maps": ((IMAGE_SIZE, IMAGE_SIZE), np.uint8),
    "object_colors": ((NUM_CLASSES,), np.int64),
}


def _draw_chunk(seeds: range) -> tuple[dict[str, NDArray[np.generic]], list[str]]:
    scenes = [draw_scene(seed) for seed in seeds]
    arrays: dict[str, NDArray[np.generic]] = {
        "images": np.stack([scene.image for scene in scenes]),
        "label_maps": np.stack([scene.label_map for scene in scenes]),
        "object_colors": np.stack([scene.object_colors for scene in scenes]),
    }
    return arrays, [scene.caption for scene in scenes]


def _draw(seeds: range) -> Generator[tuple[int, tuple[dict[str, NDArray[np.generic]], list[str]]], None, None]:
    starts = range(0, len(seeds), _CHUNK)
    chunks = [seeds[start : start + _CHUNK] for start in starts]
    if len(chunks) == 1:
        yield 0, _draw_chunk(chunks[0])
        return
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit it: Ctrl-C is told once, by this one
        try:
            drawn = deque(pool.submit(_draw_chunk, chunk) for chunk in chunks)
        finally:
            signal.signal(signal.SIGINT, heard)
        try:
            for start in starts:
                yield start, drawn.popleft().result()
        except BaseException:
            kill_child_processes()  # not to wait for the chunks that they have begun
            raise


def kill_child_processes() -> None:
    """Those that `multiprocessing` has started, at once."""
    for process in active_children():
        process.kill()


def draw_training_scenes(folder: Path, num_scenes: int) -> None:
    """Draw the first `num_scenes` training scenes into `folder`, unless they are there.

    Writes `images.npy` (uint8 [N, 64, 64, 3]), `label_maps.npy` (uint8 [N, 64, 64]), `object_colors.npy` (int64
    [N, NUM_CLASSES]) and, last, `captions.txt`.
    """
    if is_written(folder, num_scenes):
        return
    progress = tqdm(total=num_scenes, desc="drawing scenes", unit="scene")
    drawing = closing(_draw(TRAIN_SEEDS[:num_scenes]))
    with progress, new_arrays(folder, _SHAPES, num_scenes) as (arrays, captions), drawing as drawn:
        for start, (chunk, texts) in drawn:
            for name, values in chunk.items():
                arrays[name][start : start + len(values)] = values
            captions += texts
            progress.update(len(texts))


def is_written(folder: Path, num_pictures: int) -> bool:
    """Whether `new_arrays` has put so many pictures there."""
    captions_file = folder / "captions.txt"
    return captions_file.exists() and len(captions_file.read_text().splitlines()) == num_pictures


@contextmanager
def new_arrays(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], Any]], num_pictures: int
) -> Iterator[tuple[dict[str, np.memmap[Any, Any]], list[str]]]:
    """Arrays on disk and a list of captions to fill in: NAME.npy, [num_pictures, *shape], and last captions.txt have
    their names once they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy.partial", "w+", dtype, (num_pictures, *shape))
        for name, (shape, dtype) in shapes.items()
    }
    captions: list[str] = []
    yield arrays, captions
    for name, array in arrays.items():
        array.flush()
        (folder / f"{name}.npy.partial").replace(folder / f"{name}.npy")
    write_atomically(folder / "captions.txt", "".join(f"{caption}\n" for caption in captions).encode())


def read_captions(folder: Path) -> list[str]:
    """The captions written by :func:`draw_training_scenes`."""
    return (folder / "captions.txt").read_text().splitlines()


@torch.inference_mode()
def encode_training_scenes(folder: Path, vae: AutoencoderKL) -> None:
    """Encode the drawn scenes into `latents.npy`: the posterior's mean, unscaled, float16 [N, 4, 16, 16]."""
    target = folder / "latents.npy"
    images = np.load(folder / "images.npy", mmap_mode="r")
    if target.exists() and len(np.load(target, mmap_mode="r")) == len(images):
        return
    vae = vae.eval()
    batches = []
    for start in tqdm(range(0, len(images), _BATCH_SIZE), desc="encoding scenes", unit="batch"):
        pixels = torch.from_numpy(images[start : start + _BATCH_SIZE].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        batches.append(vae.encode(pixels).latent_dist.mean.half())
    partial = folder / "latents.npy.partial"
    with partial.open("wb") as file:
        np.save(file, torch.cat(batches).numpy())
    partial.replace(target)


class PictureDataset(Dataset[torch.Tensor]):
    """Drawn pictures, float32 [3, 64, 64] in [-1, 1], mirrored at random and, where `turned`, turned: scenes have no
    top."""

    def __init__(self, folder: Path, turned: bool = True) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.turned = turned

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = torch.from_numpy(self.images[index].copy()).permute(2, 0, 1).float() / 127.5 - 1
        turn, mirror = torch.randint(4, ()).item(), torch.randint(2, ()).item()
        if self.turned:
            picture = torch.rot90(picture, int(turn), (1, 2))
        return picture.flip(2) if mirror else picture


class LatentDataset(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Scaled latents float32 [4, 16, 16], controls uint8 (label maps [64, 64] or pictures [64, 64, 3]) and token ids
    int64 [max_tokens].

    Args:
        folder: of :func:`encode_training_scenes`.
        controls: name of the file of the controls, `label_maps` or `controls`.
        token_ids: of all captions, int64 [N, max_tokens].
        scaling_factor: of the VAE.
    """

    def __init__(self, folder: Path, controls: str, token_ids: torch.Tensor, scaling_factor: float) -> None:
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.controls = np.load(folder / f"{controls}.npy", mmap_mode="r")
        self.token_ids = token_ids
        self.scaling_factor = scaling_factor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents = torch.from_numpy(self.latents[index].astype(np.float32)) * self.scaling_factor
        return latents, torch.from_numpy(self.controls[index].copy()), self.token_ids[index]
