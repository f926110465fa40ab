"""Measures a schedule against the uncached pipeline: the same prompts, controls and seeds, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hgc_learn.inference import HGCSchedule
from hgc_learn.rollout import SamplingConfig, generate, scheduled

UpdateMetric = Callable[[Metric, Tensor, dict[str, Any]], None]


def picture_psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """PSNR in dB of each picture [batch, 3, height, width] in [0, 1] against its reference: float32 [batch]. Of
    identical pictures it would be infinite, which no JSON number is; it ends at 120."""
    pair = pictures.float(), references.float()  # bfloat16 has steps of up to half a decibel
    psnr = peak_signal_noise_ratio(*pair, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return psnr.clamp(max=120.0)


def evaluate_schedule(
    pipe: Any,
    sampling: SamplingConfig,
    schedule: HGCSchedule,
    batches: Iterable[dict[str, Any]],
    *,
    metrics: dict[str, Callable[[], Metric]] | None = None,
    update: UpdateMetric | None = None,
    num_pictures: int = 8,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Generates every sample with and without the schedule, in turns, and compares.

    Args:
        pipe: the pipeline, without a schedule.
        batches: as for `generate`.
        metrics: judge the pictures themselves; each is computed once for `full` and once for `cached`.
        update: `update(metric, pictures, batch)` feeds one batch to a metric.
        num_pictures: samples of which the pictures are kept.

    Returns:
        The figures (PSNR and SSIM are means over samples; `wall_clock_speedup` is the median over batches of the
        ratio of the two denoising loops' times) and the pictures: `text`, `control`, `full`, `cached`.
    """
    meters = {f"{name}_{way}": make() for name, make in (metrics or {}).items() for way in ("full", "cached")}
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    latent_errors: list[Tensor] = []
    speedups: list[float] = []
    shown: dict[str, list[Any]] = {"text": [], "control": [], "full": [], "cached": []}
    for index, batch in enumerate(batches):
        latents, seconds = {}, {}
        for way in ("full", "cached") if index % 2 else ("cached", "full"):
            latents[way], seconds[way] = timed(pipe, sampling, batch, schedule if way == "cached" else None)
        with torch.no_grad():
            pictures = {way: decode(pipe, x).cpu() for way, x in latents.items()}
        speedups.append(seconds["full"] / seconds["cached"])
        error = (latents["cached"] - latents["full"]).flatten(1).norm(dim=1)
        latent_errors.append((error / latents["full"].flatten(1).norm(dim=1)).cpu())
        pair = (pictures["cached"], pictures["full"])
        psnr.append(picture_psnr(*pair))
        similarity = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
        assert isinstance(similarity, Tensor)
        ssim.append(similarity)
        for name, meter in meters.items():
            assert update is not None
            update(meter, pictures[name.rpartition("_")[2]], batch)
        if len(shown["text"]) < num_pictures:
            shown["text"] += batch["text"]
            shown["control"].append(batch["conditioning_image"])
            for way, x in pictures.items():
                shown[way].append(x)
    values = torch.cat(psnr)
    figures = {
        "num_samples": len(values),
        "psnr_db": float(values.mean()),
        "psnr_ci95_db": 1.96 * float(values.std()) / len(values) ** 0.5,
        "ssim": float(torch.cat(ssim).mean()),
        "latent_rel_l2": float(torch.cat(latent_errors).mean()),
        "wall_clock_speedup": statistics.median(speedups),
        **{name: float(meter.compute()) for name, meter in meters.items()},
    }
    kept: dict[str, Any] = {
        name: torch.cat(parts)[:num_pictures] if name != "text" else parts[:num_pictures]
        for name, parts in shown.items()
    }
    return figures, kept


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
