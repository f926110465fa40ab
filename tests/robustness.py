"""The table of what people do to a pipeline, under a schedule: each row is right or refused by name.

`python tests/robustness.py` writes the table into docs/robustness.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import robustness_actions as act
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback, SDXLControlnetCFGCutoffCallback
from robustness_actions import MIDDLE
from robustness_pipelines import animatediff, build, controlnet_union, run, t2i_adapter
from torch import Tensor

PAGE = Path(__file__).parent.parent / "docs" / "robustness.md"


@dataclass(frozen=True)
class Row:
    """One thing that people do.

    Attributes:
        group, what: as the page says it.
        build: makes the pipeline.
        call: arguments besides the usual ones, or a function of the pipeline that gives them.
        run: what is done with the pipeline instead of calling it once.
        change: done to the pipeline, both before and after the schedule is applied.
        is_neutral: the change makes no difference to the numbers, so the oracle does without.
        first_step: the step that a run begins at.
        refreshed: steps that must be computed in full, because something changes there in mid-run.
        refused: what the error says, where it is not right. It has the way out in it.
        is_slow: is run with `pytest -m nightly` only.
        tolerance: relative, where rounding is coarser than that of double precision.
    """

    group: str
    what: str
    build: Callable[[], Any] = build
    call: dict[str, Any] | Callable[[Any], dict[str, Any]] = field(default_factory=dict)
    run: Callable[..., Tensor] = run
    change: Callable[[Any], None] | None = None
    is_neutral: bool = False
    first_step: int = 0
    refreshed: tuple[int, ...] = ()
    refused: str = ""
    tolerance: float = 1e-9
    is_slow: bool = False

    def __call__(self, pipe: Any) -> Tensor:
        return self.run(pipe, **(self.call(pipe) if callable(self.call) else self.call))


SDXL = {"shape": "small_sdxl"}
TWO = {"num_controlnets": 2}
XL = "StableDiffusionXLControlNetPipeline"
HALF = {"strength": 0.5}
NO_STEP = "num_inference_steps: the schedule has 6 steps, this run {}.*resample=True"
FOREIGN = r"called by other code than the pipeline.*remove_schedule\(pipe\) first"
CUTOFF = {"cutoff_step_ratio": None, "cutoff_step_index": MIDDLE - 1}


def pipelines() -> list[Row]:
    row = partial(Row, "Pipelines")
    img2img = "StableDiffusionControlNetImg2ImgPipeline"
    return [
        row("ControlNet, text to image"),
        row("ControlNet, image to image", partial(build, img2img), HALF, first_step=3),
        row("ControlNet, inpainting", partial(build, "StableDiffusionControlNetInpaintPipeline"), {"strength": 1.0}),
        row(
            "ControlNet, inpainting, strength below 1",
            partial(build, "StableDiffusionControlNetInpaintPipeline"),
            HALF,
            first_step=3,
        ),
        row("several ControlNets", partial(build, **TWO), {"controlnet_conditioning_scale": [0.5, 1.5]}),
        row("several ControlNets, image to image", partial(build, img2img, **TWO), HALF, first_step=3),
        row("guess mode", call={"guess_mode": True}),
        row("guess mode, several ControlNets", partial(build, **TWO), {"guess_mode": True}),
        row("control_guidance_start", call={"control_guidance_start": 0.5}, refreshed=(3,)),
        row("control_guidance_end", call={"control_guidance_end": 0.5}, refreshed=(3,)),
        row(
            "control_guidance_end of one of several ControlNets",
            partial(build, **TWO),
            {"control_guidance_end": [1.0, 0.5]},
            refreshed=(3,),
        ),
        row("SDXL with ControlNet", partial(build, XL, **SDXL)),
        row(
            "SDXL with ControlNet, image to image",
            partial(build, "StableDiffusionXLControlNetImg2ImgPipeline", **SDXL),
            HALF,
            first_step=3,
        ),
        row(
            "SDXL with ControlNet, inpainting",
            partial(build, "StableDiffusionXLControlNetInpaintPipeline", **SDXL),
            {"strength": 1.0},
        ),
        row("SDXL", partial(build, "StableDiffusionXLPipeline", **SDXL)),
        row(
            "SDXL, ends early (denoising_end)",
            partial(build, "StableDiffusionXLPipeline", **SDXL),
            {"denoising_end": 0.7},
        ),
        row("plain UNet, text to image", partial(build, "StableDiffusionPipeline")),
        row("plain UNet, image to image", partial(build, "StableDiffusionImg2ImgPipeline"), HALF, first_step=3),
        row("plain UNet, inpainting", partial(build, "StableDiffusionInpaintPipeline"), {"strength": 1.0}),
    ]


def samplers() -> list[Row]:
    row = partial(Row, "Samplers")
    names = {
        "DDIM": "DDIMScheduler",
        "UniPC": "UniPCMultistepScheduler",
        "DPM++ 2M": "DPMSolverMultistepScheduler",
        "Euler": "EulerDiscreteScheduler",
        "Euler ancestral": "EulerAncestralDiscreteScheduler",
        "PNDM (repeats a timestep)": "PNDMScheduler",
        "Heun (two model calls per step)": "HeunDiscreteScheduler",
        "KDPM2 (two model calls per step)": "KDPM2DiscreteScheduler",
        "KDPM2 ancestral (timesteps go up and down)": "KDPM2AncestralDiscreteScheduler",
        "LCM": "LCMScheduler",
    }
    img2img = "StableDiffusionControlNetImg2ImgPipeline"
    return [row(name, partial(build, scheduler=scheduler)) for name, scheduler in names.items()] + [
        row(
            "Heun, image to image",
            partial(build, img2img, scheduler="HeunDiscreteScheduler"),
            HALF,
            first_step=6,
        ),
        row(
            "PNDM, image to image from a repeated timestep",
            partial(build, img2img, scheduler="PNDMScheduler"),
            {"strength": 0.7},
            first_step=2,
        ),
        row("fewer steps than the schedule", call={"num_inference_steps": 4}, refused=NO_STEP.format(4)),
        row("more steps than the schedule", call={"num_inference_steps": 9}, refused=NO_STEP.format(9)),
        row(
            "other timesteps, as many",
            partial(build, scheduler="EulerDiscreteScheduler"),
            {"timesteps": [900, 700, 500, 300, 200, 100]},
            refused=r"timesteps: this run visits 900, 700, 500.*resample=True",
        ),
        row(
            "another sampler than the schedule's",
            change=lambda pipe: setattr(pipe, "scheduler", build(scheduler="UniPCMultistepScheduler").scheduler),
            is_neutral=True,
            refused="scheduler: the schedule was made for DDIMScheduler, the pipeline has UniPC.*Set pipe.scheduler",
        ),
    ]


def calls() -> list[Row]:
    row = partial(Row, "Calls")
    large: dict[str, Any] = {"size": (24, 32)}
    three: dict[str, Any] = {"num_images": 3}
    off: dict[str, Any] = {"guidance_scale": 1.0}
    per_prompt: dict[str, Any] = {"num_images_per_prompt": 2}

    def row_of(*calls: dict[str, Any]) -> Callable[[Any], Tensor]:
        return lambda pipe: act.calls_in_a_row(pipe, *calls)

    def switched_off(pipe: Any) -> Tensor:
        return run(pipe, **act.when(MIDDLE, act.guidance_off, "prompt_embeds", "image"))

    plain = partial(build, "StableDiffusionPipeline")
    cutoff_xl = {"callback_on_step_end": SDXLControlnetCFGCutoffCallback(**CUTOFF)}
    return [
        row("two in a row", run=row_of({}, {})),
        row("another resolution, and back", run=row_of({}, large, {})),
        row("another batch size, and back", run=row_of(three, {}, three)),
        row("num_images_per_prompt", run=row_of(per_prompt, {})),
        row("without guidance", call=off),
        row("guidance off, on, off", run=row_of(off, {}, off)),
        row("guidance off for several images", run=row_of(off | three, three)),
        row("guidance switched off in mid-run", run=switched_off, refreshed=(MIDDLE,)),
        row(
            "guidance switched off in mid-run, guess mode",
            call=act.when(MIDDLE, act.guidance_off, "prompt_embeds", "image") | {"guess_mode": True},
            refused="the UNet's inputs changed and the ControlNet's did not.*remove_schedule",
        ),
        row(
            "SDCFGCutoffCallback, plain UNet",
            plain,
            {"callback_on_step_end": SDCFGCutoffCallback(**CUTOFF)},
            refreshed=(MIDDLE,),
        ),
        row("SDXLControlnetCFGCutoffCallback", partial(build, XL, **SDXL), cutoff_xl, refreshed=(MIDDLE,)),
        row(
            "prompt embeddings changed in mid-run",
            call=act.when(MIDDLE, act.other_prompt, "prompt_embeds"),
            refreshed=(3,),
        ),
        row(
            "prompt embeddings changed in place in mid-run",
            call=act.when(MIDDLE, act.other_prompt_in_place, "prompt_embeds"),
            refreshed=(MIDDLE,),
        ),
        row(
            "prompt embeddings changed in mid-run, plain UNet",
            plain,
            act.when(MIDDLE, act.other_prompt, "prompt_embeds"),
            refreshed=(MIDDLE,),
        ),
        row("control image changed in mid-run", call=act.when(MIDDLE, act.other_image, "image"), refreshed=(MIDDLE,)),
        row("latents replaced by a callback", call=act.when(MIDDLE, act.other_latents, "latents")),
        row("latents changed in place by a callback", call=act.when(MIDDLE, act.latents_in_place, "latents")),
        row("under torch.inference_mode", run=act.in_inference_mode),
        row(
            "prompt embeddings changed in place in mid-run under torch.inference_mode",
            run=act.in_inference_mode,
            call=act.when(MIDDLE, act.other_prompt_in_place, "prompt_embeds"),
            refreshed=(MIDDLE,),
        ),
        row("an exception in mid-run, then again", run=partial(act.stopped_then_again, error=act.Stop)),
        row("Ctrl-C in mid-run, then again", run=partial(act.stopped_then_again, error=KeyboardInterrupt)),
        row("an exception between ControlNet and UNet, then again", run=act.stopped_inside_a_step),
        row("pipe._interrupt in mid-run, then again", run=act.interrupted_then_again),
        row(
            "a call of another pipeline that shares UNet and scheduler",
            run=lambda pipe: act.another_pipeline(pipe, "StableDiffusionControlNetImg2ImgPipeline", False),
            refused=FOREIGN,
        ),
        row(
            "a call of another pipeline that shares the UNet",
            run=lambda pipe: act.another_pipeline(pipe, "StableDiffusionControlNetPipeline", True),
            refused=FOREIGN,
        ),
        row(
            "a loop of one's own around the UNet",
            partial(build, "StableDiffusionPipeline"),
            run=act.own_loop,
            refused=FOREIGN,
        ),
        row("float32", change=act.cast(torch.float32), tolerance=1e-3),
        row("float16", change=act.cast(torch.float16), tolerance=0.2),
        row("bfloat16", change=act.cast(torch.bfloat16), tolerance=0.5),
        row("autocast to bfloat16", partial(build, dtype=torch.float32), run=act.under_autocast, tolerance=0.5),
    ]


def around() -> list[Row]:
    row = partial(Row, "Around it")
    neutral = partial(row, is_neutral=True)
    return [
        neutral("model CPU offload", change=act.model_offload),
        neutral("sequential CPU offload", change=act.sequential_offload),
        row(
            "group offload",
            change=act.group_offload,
            refused="Group offload of the unet is not supported.*enable_model_cpu",
        ),
        row("LoRA loaded", change=act.load_lora),
        row("LoRA scaled", act.with_lora, change=lambda pipe: pipe.set_adapters(["style"], [0.3])),
        row(
            "LoRA scaled by cross_attention_kwargs",
            act.with_lora_and_text_encoder,
            {"cross_attention_kwargs": {"scale": 0.3}},
        ),
        row("LoRA fused", act.with_lora, change=act.fuse_lora),
        row("LoRA unfused", act.fused, change=lambda pipe: pipe.unfuse_lora(components=["unet"])),
        row("LoRA disabled", act.with_lora, change=lambda pipe: pipe.disable_lora()),
        row("LoRA unloaded", act.with_lora, change=lambda pipe: pipe.unload_lora_weights()),
        row(
            "LoRA on the ControlNet's zero convolutions",
            change=lambda pipe: act.lora(pipe.controlnet, "controlnet_mid_block"),
        ),
        row("LoRA scaled in mid-run", act.with_lora, act.when(MIDDLE, act.mid_lora), refreshed=(MIDDLE,)),
        row(
            "LoRA loaded in mid-run",
            call=act.when(MIDDLE, lambda pipe, _: act.load_lora(pipe)),
            refreshed=(MIDDLE,),
        ),
        row(
            "cross_attention_kwargs' scale changed in mid-run",
            act.with_lora,
            act.when(MIDDLE, act.change_lora_scale),
            refused="the UNet's inputs changed and the ControlNet's did not.*remove_schedule",
        ),
        row("IP-Adapter", call=act.ip_image, change=act.load_ip_adapter),
        row("IP-Adapter scaled", act.with_ip_adapter, act.ip_image, change=lambda pipe: pipe.set_ip_adapter_scale(0.4)),
        row(
            "IP-Adapter scaled in mid-run",
            act.with_ip_adapter,
            act.ip_with(act.when(MIDDLE, act.no_ip)),
            refreshed=(MIDDLE,),
        ),
        row(
            "IPAdapterScaleCutoffCallback",
            act.with_ip_adapter,
            act.ip_with({"callback_on_step_end": IPAdapterScaleCutoffCallback(**CUTOFF)}),
            refreshed=(MIDDLE,),
        ),
        row("FreeU", change=act.freeu),
        row("FreeU switched on in mid-run", call=act.when(MIDDLE, act.freeu), refreshed=(MIDDLE,)),
        neutral("attention slicing", change=lambda pipe: pipe.enable_attention_slicing(1)),
        neutral("VAE slicing", change=lambda pipe: pipe.vae.enable_slicing()),
        neutral("VAE tiling", change=lambda pipe: pipe.vae.enable_tiling()),
        row("fused QKV projections", change=lambda pipe: pipe.unet.fuse_qkv_projections()),
        neutral("channels_last", change=lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
        neutral("torch.compile of the UNet", change=act.compile_whole, is_slow=True),
        neutral("UNet compiled in place", change=lambda pipe: pipe.unet.compile(backend="eager")),
        neutral("compile_repeated_blocks", change=lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager")),
        neutral("save_pretrained", change=act.save_and_load),
        row(
            "UNet replaced", change=lambda pipe: setattr(pipe, "unet", build().unet), refused="pipe.unet is not the one"
        ),
        row(
            "ControlNet replaced",
            change=lambda pipe: setattr(pipe, "controlnet", build().controlnet),
            refused="pipe.controlnet is not the one",
        ),
        row(
            "AnimateDiff",
            animatediff,
            refused="unet is a UNetMotionModel; schedules support diffusers' UNet2DConditionModel",
        ),
        row(
            "T2I-Adapter",
            t2i_adapter,
            act.adapter_image,
            refused=r"T2I-Adapter residuals are not supported with a schedule; remove_schedule\(pipe\) first",
        ),
        row(
            "ControlNet-Union",
            controlnet_union,
            refused="ControlNetUnionModel; schedules support diffusers' ControlNetModel only",
        ),
        row(
            "PAG",
            partial(build, "StableDiffusionControlNetPAGPipeline", pag_applied_layers=["mid"]),
            refused="have a third part.*remove_schedule",
        ),
    ]


ROWS = pipelines() + samplers() + calls() + around()


def matrix() -> str:
    """The table as the page has it."""
    lines = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [f"### {group}", "", "| | under a schedule |", "|---|---|"]
        for row in ROWS:
            if row.group == group:
                lines.append(f"| {row.what} | {outcome(row)} |")
        lines.append("")
    return "\n".join(lines)


def outcome(row: Row) -> str:
    if row.refused:
        return "refused: " + re.sub(r"\.\*", " ... ", row.refused).replace("\\", "")
    if row.refreshed:
        return "right; that step is computed in full"
    return "right"


def page() -> str:
    """The page with the table of today in it."""
    before, _, rest = PAGE.read_text().partition(START)
    return before + START + matrix() + END + rest.partition(END)[2]


START, END = "<!-- rows of tests/robustness.py -->\n\n", "<!-- end of the rows -->\n"

if __name__ == "__main__":
    PAGE.write_text(page())
