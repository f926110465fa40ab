"""What a pipeline makes with a schedule and without, of the same prompts, controls and seeds, and how close it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hgc_learn.sampling import SamplingConfig, generate, scheduled
from hgc_learn.schedule import HGCSchedule


def picture_psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """PSNR in dB of each picture [batch, 3, height, width] in [0, 1] against its reference: float32 [batch]. Of
    identical pictures it would be infinite, which no JSON number is; it ends at 120."""
    pair = pictures.float(), references.float()  # bfloat16 has steps of up to half a decibel
    psnr = peak_signal_noise_ratio(*pair, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return psnr.clamp(max=120.0)


@dataclass(frozen=True)
class Samples:
    """What a run made of n samples: `latents` [n, channels, h, w], `pictures` [n, 3, height, width] in [0, 1]."""

    latents: Tensor
    pictures: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def closeness(samples: Samples, full: Samples) -> dict[str, Tensor]:
    """Per sample [n], against the uncached one of the same seed: PSNR in dB, SSIM, relative L2 error of the latents."""
    similarity = structural_similarity_index_measure(samples.pictures, full.pictures, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    error = (samples.latents - full.latents).flatten(1).norm(dim=1)
    return {
        "psnr_db": picture_psnr(samples.pictures, full.pictures),
        "ssim": similarity,
        "latent_rel_l2": error / full.latents.flatten(1).norm(dim=1),
    }


def render(
    pipe: Any, sampling: SamplingConfig, batches: Iterable[dict[str, Any]], schedule: HGCSchedule | None = None
) -> Samples:
    """What the pipeline makes of the batches (as for `generate`), with a schedule or without; on the CPU."""
    with scheduled(pipe, sampling, schedule) as sampling:
        return _decoded_samples(pipe, [generate(pipe, sampling, batch) for batch in batches])


def side_by_side(
    pipe: Any, sampling: SamplingConfig, schedule: HGCSchedule, batches: Iterable[dict[str, Any]]
) -> tuple[Samples, Samples, float]:
    """What the pipeline makes of the batches without the schedule and with it, in turns; and the median over batches
    of the ratio of the two denoising loops' times."""
    latents: dict[str, list[Tensor]] = {"full": [], "cached": []}
    speedups = []
    for index, batch in enumerate(batches):
        seconds = {}
        for way in ("full", "cached") if index % 2 else ("cached", "full"):
            made, seconds[way] = timed(pipe, sampling, batch, schedule if way == "cached" else None)
            latents[way].append(made)
        speedups.append(seconds["full"] / seconds["cached"])
    full, cached = (_decoded_samples(pipe, those) for those in latents.values())
    return full, cached, statistics.median(speedups)


@torch.no_grad()
def _decoded_samples(pipe: Any, latents: Sequence[Tensor]) -> Samples:
    pictures = [decode(pipe, part).cpu() for part in latents]
    return Samples(torch.cat([*latents]).cpu(), torch.cat(pictures))


def timed(
    pipe: Any, sampling: SamplingConfig, batch: dict[str, Any], schedule: HGCSchedule | None = None
) -> tuple[Tensor, float]:
    """Final latents [batch, channels, h, w] with a schedule or without, and the seconds that making them took."""
    with scheduled(pipe, sampling, schedule) as sampling:
        _synchronize(pipe)
        start = time.perf_counter()
        latents = generate(pipe, sampling, batch)
        _synchronize(pipe)
        return latents, time.perf_counter() - start


def _synchronize(pipe: Any) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents to pictures [batch, 3, height, width] in [0, 1], as the pipeline does it."""
    return pipe.image_processor.postprocess(_decoded(pipe, latents), output_type="pt")


def unclamped_pictures(pipe: Any, latents: Tensor) -> Tensor:
    """Latents to pictures [batch, 3, height, width] that are not cut off at 0 and 1: differentiable everywhere."""
    return _decoded(pipe, latents) / 2 + 0.5


def decodes_upcast(pipe: Any) -> bool:
    """Whether the pipeline decodes in float32 because its VAE overflows in float16, as those of SDXL do."""
    return _is_sdxl(pipe) and pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast


def _is_sdxl(pipe: Any) -> bool:
    return "text_encoder_2" in pipe.components


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    vae, upcasts = pipe.vae, decodes_upcast(pipe)
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    latents = latents.float() if upcasts else latents
    if _is_sdxl(pipe) and mean is not None and std is not None:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    if not upcasts:
        return vae.decode(latents, return_dict=False)[0]
    vae.to(torch.float32)
    try:
        return vae.decode(latents, return_dict=False)[0]
    finally:
        vae.to(torch.float16)
