"""The table of what people do to a pipeline, under a schedule: each row is right or refused by name.

`python tests/robustness.py` writes the table into docs/robustness.md.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import robustness_actions as act
import robustness_checks as check
from robustness_elsewhere import ELSEWHERE
from robustness_pipelines import SDXL, TWO, XL, animatediff, build, controlnet_union, t2i_adapter
from robustness_row import Row
from robustness_usage import around, calls

PAGE = Path(__file__).parent.parent / "docs" / "robustness.md"
HALF = {"strength": 0.5}
NO_STEP = "num_inference_steps: the schedule has 6 steps, this run {}.*resample=True"


def pipelines() -> list[Row]:
    row = partial(Row, "Pipelines")
    img2img = "StableDiffusionControlNetImg2ImgPipeline"
    end: dict[str, Any] = {"control_guidance_end": 0.5}
    one_ends: list[dict[str, Any]] = [{"control_guidance_end": ends} for ends in ([0.5, 1.0], [1.0, 0.5])]
    nine_channels: dict[str, Any] = {"unet_config": {"in_channels": 9}}
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
        row("guess mode, image to image", partial(build, img2img), HALF | {"guess_mode": True}, first_step=3),
        row("guess mode, control_guidance_end", call={"guess_mode": True} | end, refreshed=(3,)),
        row("a ControlNet that pools its residuals (global_pool_conditions)", act.pooled),
        row("a ControlNet of scale 0", call={"controlnet_conditioning_scale": 0.0}),
        row(
            "a ControlNet of scale 0 among several",
            partial(build, **TWO),
            {"controlnet_conditioning_scale": [0.0, 1.5]},
        ),
        row("control_guidance_start", call={"control_guidance_start": 0.5}, refreshed=(3,)),
        row("control_guidance_end", call=end, refreshed=(3,)),
        row(
            "control_guidance_end of one of several ControlNets",
            partial(build, **TWO),
            run=lambda pipe: act.calls_in_a_row(pipe, *one_ends),
            refreshed=(3,),
        ),
        row(
            "several ControlNets that take turns",
            partial(build, **TWO),
            {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]},
            refreshed=(3,),
        ),
        row("SDXL with ControlNet", partial(build, XL, **SDXL)),
        row("SDXL with several ControlNets", partial(build, XL, **SDXL, **TWO)),
        row("SDXL with ControlNet, guess mode", partial(build, XL, **SDXL), {"guess_mode": True}),
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
        row(
            "plain UNet made for inpainting (nine channels)",
            partial(build, "StableDiffusionInpaintPipeline", **nine_channels),
            {"strength": 1.0},
        ),
        row(
            "ControlNet, inpainting with a UNet made for it",
            partial(build, "StableDiffusionControlNetInpaintPipeline", **nine_channels),
            {"strength": 1.0},
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
            refused="have a third.*remove_schedule",
        ),
        row(
            "PAG without guidance",
            partial(build, "StableDiffusionControlNetPAGPipeline", pag_applied_layers=["mid"]),
            {"guidance_scale": 1.0},
            refused="have a third.*remove_schedule",
        ),
        row(
            "InstructPix2Pix",
            partial(build, "StableDiffusionInstructPix2PixPipeline", unet_config={"in_channels": 8}),
            refused="have a third.*remove_schedule",
        ),
        row(
            "InstructPix2Pix of SDXL, and others that do not say whether they guide",
            partial(build, "StableDiffusionXLInstructPix2PixPipeline", unet_config={"in_channels": 8}, **SDXL),
            refused="does not tell whether it has them. Use a schedule without such sites",
        ),
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
    karras = {"use_karras_sigmas": True}
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
        row(
            "LCM, the guidance scale given to the UNet",
            partial(
                build,
                "StableDiffusionPipeline",
                scheduler="LCMScheduler",
                scheduler_config={"steps_offset": 1},
                unet_config={"time_cond_proj_dim": 8},
            ),
        ),
        row(
            "Euler with Karras' sigmas (timesteps that are no whole numbers)",
            partial(build, scheduler="EulerDiscreteScheduler", scheduler_config=karras),
        ),
        row("fewer steps than the schedule, resampled", check=partial(check.resampled, 4)),
        row("more steps than the schedule, resampled", check=partial(check.resampled, 9)),
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
        row(
            "another setting of the scheduler, the same timesteps",
            change=lambda pipe: setattr(pipe, "scheduler", build(scheduler_config={"beta_end": 0.012}).scheduler),
            is_neutral=True,
            refused="scheduler_config: .* with beta_end=0.02, the pipeline has 0.012. Set pipe.scheduler =",
        ),
        row("another setting of the scheduler, resampled", check=check.resampled_to_other_settings),
    ]


ROWS = pipelines() + samplers() + calls() + around()


def matrix() -> str:
    """The table as the page has it."""
    lines = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [f"### {group}", "", "| | under a schedule |", "|---|---|"]
        lines += [f"| {row.what} | {row.outcome} |" for row in ROWS if row.group == group]
        lines.append("")
    for group in dict.fromkeys(row.group for row in ELSEWHERE):
        lines += [f"### {group}", "", "| | what holds | test |", "|---|---|---|"]
        lines += [f"| {row.what} | {row.outcome} | {row.link} |" for row in ELSEWHERE if row.group == group]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with the table of today in it."""
    before, _, rest = PAGE.read_text().partition(START)
    return before + START + matrix() + END + rest.partition(END)[2]


START, END = "<!-- rows of tests/robustness.py -->\n\n", "<!-- end of the rows -->\n"

if __name__ == "__main__":
    PAGE.write_text(page())
