"""Loading a frozen pipeline and running it, for teacher and student alike: the very pipeline that inference runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, DiffusionPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from safetensors import SafetensorError
from torch import Tensor

from hgc_learn.inference import apply_schedule
from hgc_learn.models.architectures import check_fits
from hgc_learn.schedule import HGCSchedule
from hgc_learn.scheduler_config import default_settings
from hgc_learn.timesteps import SPACINGS, steps_for_calls, with_spacing


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made; a schedule is valid for exactly this.

    Args:
        num_inference_steps: number of denoising steps.
        guidance_scale: classifier-free guidance scale; 1 or less means none.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        negative_prompt: prompt of the unguided half; empty for what the pipeline takes where none is given, which is
            zeros in SDXL.
        controlnet_conditioning_scale: weight of the ControlNet.
        scheduler: class name of a diffusers scheduler; the model's own if not given.
        scheduler_config: settings of it (`use_karras_sigmas`, ...) that take the place of those in the model's own
            config.

    Raises:
        ValueError: no step, a picture of no size, or a scale that is not finite.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512
    negative_prompt: str = ""
    controlnet_conditioning_scale: float = 1.0
    scheduler: str | None = None
    scheduler_config: dict[str, Any] | None = field(default=None, hash=False)  # settings stay usable as keys

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("guidance_scale", "controlnet_conditioning_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number.")


def load_pipeline(
    model: str,
    sampling: SamplingConfig,
    *,
    controlnet: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    device: torch.device | None = None,
) -> Any:
    """Loads a diffusers pipeline, frozen, with the sampler of `sampling`. It has no safety checker: of pictures that
    are blacked out nothing could be measured.

    Args:
        model: folder or hub id of a pipeline; with a ControlNet in it unless `controlnet` names one.
        sampling: its `scheduler`, set by its `scheduler_config`, replaces the pipeline's.
        controlnet: folder or hub id of a ControlNet to add.
        variant: of the files with the weights, as diffusers has it (`fp16`), of the model, and of the ControlNet if it
            comes in that, too.
        dtype: of all models: `float32`, `float16` or `bfloat16`.
        device: where it is moved to; `default_device()` if not given.

    Raises:
        ValueError: a folder or hub id that cannot be loaded, more than one ControlNet, an unknown dtype, scheduler or
            setting of it.
    """
    for name, source in (("model", model), ("controlnet", controlnet)):
        if source is not None and not Path(source).is_dir() and source.count("/") != 1:
            raise ValueError(f"{name}: {source!r} is neither a folder here nor a hub id (owner/name).")
    if controlnet is not None and Path(controlnet, "model_index.json").is_file():
        raise ValueError(
            f"controlnet: {controlnet!r} is a whole pipeline; give its folder {controlnet}/controlnet, or none (null) "
            "where the model's pipeline has a ControlNet in it."
        )
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not one of float32, float16, bfloat16.")
    how = {"dtype": getattr(torch, dtype), "variant": variant}
    if controlnet is None:
        pipe = _load("model", DiffusionPipeline.from_pretrained, model, **how)
    else:
        kind = _load("controlnet", ControlNetModel.load_config, controlnet).get("_class_name")
        if kind != "ControlNetModel":
            raise ValueError(f"controlnet: {controlnet!r} is a {kind}, not a ControlNetModel.")
        net = _load("controlnet", _controlnet, controlnet, **how)
        if "controlnet" in _load("model", DiffusionPipeline.load_config, model):
            raise ValueError(
                f"controlnet: the pipeline {model!r} has a ControlNet already, and {controlnet!r} is given besides; "
                "give none (null), or a model without one."
            )
        pipe = _load("model", AutoPipelineForText2Image.from_pretrained, model, controlnet=net, **how)
    if not hasattr(pipe, "unet"):
        raise ValueError(
            f"model: {model!r} is a {type(pipe).__name__}, which has no UNet; the pipelines of Stable Diffusion and "
            "SDXL are supported (docs/limits.md)."
        )
    if controlnet is not None:
        check_fits(pipe.controlnet, pipe.unet, controlnet, model)
    takes = inspect.signature(type(pipe).__call__).parameters
    if "strength" in takes or "mask_image" in takes:
        raise ValueError(
            f"model: {model!r} is a {type(pipe).__name__}, which starts from a picture. Give a pipeline that makes one "
            "from text; what is learned there can be loaded into this one (docs/use.md)."
        )
    if isinstance(getattr(pipe, "controlnet", None), MultiControlNetModel):
        raise ValueError(
            f"model: the pipeline {model!r} has several ControlNets, and data have one control image a sample; take a "
            "pipeline with one. (`apply_schedule` runs schedules with several; docs/use.md has how a rule writes one.)"
        )
    if sampling.scheduler is not None or sampling.scheduler_config:
        _set_scheduler(pipe, sampling)
    _check_scheduler(pipe.scheduler)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or default_device())


def _set_scheduler(pipe: Any, sampling: SamplingConfig) -> None:
    own, settings = type(pipe.scheduler).__name__, sampling.scheduler_config or {}
    name = sampling.scheduler or own
    scheduler: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise ValueError(f"diffusers has no scheduler named {name!r}.")
    known = default_settings(scheduler)
    if unknown := [setting for setting in settings if setting not in known]:
        raise ValueError(f"scheduler_config: {name} has no {unknown[0]}, only {', '.join(known)}.")
    config = dict(pipe.scheduler.config)
    if "clip_sample" in known and sampling.scheduler is not None:
        # On by default, for pixels in [-1, 1]; it ruins latents. Most models' configs say so, not all.
        config.setdefault("clip_sample", False)
    try:
        pipe.scheduler = scheduler.from_config(config, **settings)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        so_set = f", set to {settings}," if settings else ""
        raise ValueError(
            f"scheduler: {name}{so_set} cannot take the place of the pipeline's {own} ({' '.join(str(error).split())})."
        ) from None


def _check_scheduler(scheduler: Any) -> None:
    """Raises ValueError where a pipeline with a UNet cannot be run with it, or not twice alike."""
    name = type(scheduler).__name__
    parameters = [*inspect.signature(scheduler.step).parameters.values()]
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    missing = [part for part in ("init_noise_sigma", "order", "scale_model_input") if not hasattr(scheduler, part)]
    if missing or needed - {"model_output", "timestep", "sample", "args", "kwargs"}:
        raise ValueError(
            f"scheduler: {name} is for pipelines of another kind, without a UNet or with a mask. Set another one."
        )
    if "noise_sampler_seed" in scheduler.config:
        raise ValueError(
            f"scheduler: {name} draws its noise from the whole batch, whatever the seeds of the samples: two runs "
            "differ, and there is nothing that a cached one could be compared with. Set another one."
        )


def default_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(role: str, load: Callable[..., Any], source: str, **kwargs: Any) -> Any:
    try:
        return load(source, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        what = "ControlNet" if role == "controlnet" else "diffusers pipeline"
        raise ValueError(
            f"{role}: {source!r} cannot be loaded as a {what} ({reason}). Check the name; a private repository of the "
            "hub needs `hf auth login`."
        ) from None


def _controlnet(source: str, *, variant: str | None, dtype: torch.dtype) -> ControlNetModel:
    """In the variant if it comes in that; a folder is looked at first, for diffusers logs what it does not find."""
    if Path(source).is_dir() and not any(Path(source).glob(f"*.{variant}.*")):
        variant = None
    try:
        return ControlNetModel.from_pretrained(source, variant=variant, dtype=dtype)
    except OSError:
        if variant is None:
            raise
    return ControlNetModel.from_pretrained(source, dtype=dtype)


@contextmanager
def scheduled(pipe: Any, sampling: SamplingConfig, schedule: HGCSchedule | None) -> Iterator[SamplingConfig]:
    """The pipeline follows a schedule meanwhile, or none. Yields the sampling to run it with: that given, with as many
    steps as the schedule is for. Its scheduler spaces the timesteps as the settings in the file say, where they do.

    Raises:
        ValueError: the scheduler never makes as many model calls as the schedule has, or as of `apply_schedule`.
    """
    if schedule is None:
        yield sampling
        return
    num_steps = steps_for_calls(pipe.scheduler, schedule.num_steps)
    if num_steps is None:
        raise ValueError(f"{schedule.scheduler} never makes {schedule.num_steps} model calls.")
    scheduler, timestep_spacing = pipe.scheduler, schedule.settings.get("timestep_spacing")
    if timestep_spacing in SPACINGS:  # of `fewer_steps`
        pipe.scheduler = with_spacing(scheduler, timestep_spacing)
    try:
        with apply_schedule(pipe, schedule):
            yield replace(sampling, num_inference_steps=num_steps)
    finally:
        pipe.scheduler = scheduler


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raises ValueError where a data module of one's own gives what `generate` does not take, or control images that
    no pipeline would be called with. Reads back from the device."""
    if missing := [name for name in ("text", "conditioning_image", "seed") if name not in batch]:
        raise ValueError(f"The data gives batches without {' and '.join(missing)}; docs/train.md says what they hold.")
    for text, image in zip(batch["text"], batch["conditioning_image"], strict=True):
        if image.ndim != 3 or not image.is_floating_point():
            raise ValueError(
                f"The control image of {text!r} is {image.dtype} {list(image.shape)}; it must be floating-point "
                "[3, height, width]."
            )
        low, high = map(float, image.aminmax())
        if not math.isfinite(low + high):
            raise ValueError(f"The control image of {text!r} holds NaN or infinity. Repair it or leave it out.")
        if low < 0 or high > 1:
            raise ValueError(
                f"The control image of {text!r} goes from {low:.3g} to {high:.3g}; it must be in [0, 1], as pipelines "
                "are given them."
            )


def generate(
    pipe: Any, sampling: SamplingConfig, batch: dict[str, Any], *, output_type: str = "latent", grad: bool = False
) -> Tensor:
    """Runs the pipeline on a batch, seeded per sample.

    Args:
        batch: `text` (list of B prompts), `conditioning_image` [B, 3, height, width] in [0, 1], `seed` (B integers).
        output_type: `latent`, or `pt` for pictures in [0, 1].
        grad: keep the autograd graph (the pipeline's own call switches gradients off).

    Returns:
        Latents [B, channels, h, w] or pictures [B, 3, height, width].

    Raises:
        ValueError: control images of another size than `sampling` says.
    """
    size = tuple(batch["conditioning_image"].shape[-2:])
    if size != (sampling.height, sampling.width):
        raise ValueError(
            f"conditioning_image is {size[0]}x{size[1]}, the sampling config says {sampling.height}x{sampling.width}: "
            "give the data module the same height and width."
        )
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    call = type(pipe).__call__
    call = inspect.unwrap(call) if grad else call
    kwargs: dict[str, Any] = {}
    if getattr(pipe, "controlnet", None) is not None:
        kwargs["image"] = batch["conditioning_image"]
        kwargs["controlnet_conditioning_scale"] = sampling.controlnet_conditioning_scale
    prompts = list(batch["text"])
    return call(
        pipe,
        prompt=prompts,
        negative_prompt=[sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        generator=generators,
        output_type=output_type,
        return_dict=False,
        **kwargs,
    )[0]
