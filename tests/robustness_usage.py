"""What people do with a pipeline, from one call to the next and around it: rows of the table in `robustness.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import robustness_actions as act
import robustness_adapters as adapters
import robustness_checks as check
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback, SDXLControlnetCFGCutoffCallback
from robustness_actions import MIDDLE
from robustness_pipelines import SDXL, TWO, XL, build, run
from robustness_row import Row
from torch import Tensor

FOREIGN = r"called by other code than the pipeline.*remove_schedule\(pipe\) first"
CUTOFF = {"cutoff_step_ratio": None, "cutoff_step_index": MIDDLE - 1}


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
        row(
            "a resolution that does not halve evenly",
            partial(build, shape="sd15"),
            run=row_of({}, {"size": (24, 40)}),
        ),
        row("another batch size, and back", run=row_of(three, {}, three)),
        row("num_images_per_prompt", run=row_of(per_prompt, {})),
        row("num_images_per_prompt, several prompts, guess mode", call=three | per_prompt | {"guess_mode": True}),
        row("without guidance", call=off),
        row("guidance off, on, off", run=row_of(off, {}, off)),
        row("guidance off for several images", run=row_of(off | three, three)),
        row("guidance switched off in mid-run", run=switched_off, refreshed=(MIDDLE,)),
        row(
            "guidance switched off in mid-run, several ControlNets",
            partial(build, **TWO),
            act.when(MIDDLE, act.guidance_off, "prompt_embeds", "image"),
            refreshed=(MIDDLE,),
        ),
        row(
            "guidance switched off in mid-run, several images",
            call=three | act.when(MIDDLE, act.guidance_off, "prompt_embeds", "image"),
            refreshed=(MIDDLE,),
        ),
        row(
            "guidance switched on in mid-run",
            call=off | act.when(MIDDLE, act.guidance_on, "prompt_embeds", "image"),
            refreshed=(MIDDLE,),
        ),
        row("guidance scale changed in mid-run", call=act.when(MIDDLE, act.more_guidance)),
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
        row(
            "prompt embeddings changed in mid-run, and back",
            call=act.at_each({MIDDLE: act.other_prompt, MIDDLE + 1: act.other_prompt}, "prompt_embeds"),
            refreshed=(MIDDLE, MIDDLE + 1),
        ),
        row("control image changed in mid-run", call=act.when(MIDDLE, act.other_image, "image"), refreshed=(MIDDLE,)),
        row(
            "control image changed in place in mid-run",
            call=act.when(MIDDLE, act.other_image_in_place, "image"),
            refreshed=(MIDDLE,),
        ),
        row(
            "control image turned in mid-run, in the same memory",
            call=act.when(MIDDLE, act.turned_image, "image"),
            refreshed=(MIDDLE,),
        ),
        row(
            "pooled prompt embeddings changed in mid-run, SDXL",
            partial(build, XL, **SDXL),
            act.when(MIDDLE, act.other_pooled, "add_text_embeds"),
            refreshed=(MIDDLE,),
        ),
        row(
            "latents made larger by a callback, plain UNet",
            plain,
            act.when(MIDDLE, act.larger_latents, "latents"),
            refreshed=(MIDDLE,),
        ),
        row(
            "another ControlNet put into the pipeline by a callback",
            call=act.when(MIDDLE, act.other_controlnet),
            refused="pipe.controlnet is not the one that the schedule was applied to",
        ),
        row(
            "another UNet put into the pipeline by a callback",
            call=act.when(MIDDLE, act.other_unet),
            refused="pipe.unet is not the one that the schedule was applied to",
        ),
        row("latents replaced by a callback", call=act.when(MIDDLE, act.other_latents, "latents")),
        row("latents changed in place by a callback", call=act.when(MIDDLE, act.latents_in_place, "latents")),
        row("under torch.inference_mode", run=act.in_inference_mode),
        row(
            "prompt embeddings changed in place in mid-run under torch.inference_mode",
            run=act.in_inference_mode,
            call=act.when(MIDDLE, act.other_prompt_in_place, "prompt_embeds"),
            refreshed=(MIDDLE,),
        ),
        row("under torch.inference_mode, then with gradients", check=check.gradients_after_inference_mode),
        row("an exception in mid-run, then again", run=partial(act.stopped_then_again, error=act.Stop)),
        row("Ctrl-C in mid-run, then again", run=partial(act.stopped_then_again, error=KeyboardInterrupt)),
        row("an exception between ControlNet and UNet, then again", run=act.stopped_inside_a_step),
        row("pipe._interrupt in mid-run, then again", run=act.interrupted_then_again),
        row("two threads, each with its own pipeline", check=check.two_threads),
        row("a schedule applied in mid-run", check=check.applied_in_mid_run),
        row("a schedule removed in mid-run", check=check.removed_in_mid_run),
        row(
            "two pipelines that share a UNet, a schedule for both: the earlier one's call",
            check=check.shared_unet,
            refused=FOREIGN,
        ),
        row(
            "two pipelines that share a ControlNet, a schedule for both",
            check=check.shared_controlnet,
            refused="The controlnet is shared with a pipeline that has a schedule",
        ),
        row(
            "a call of another pipeline that shares UNet and scheduler",
            run=lambda pipe: act.another_pipeline(pipe, "StableDiffusionControlNetImg2ImgPipeline", False),
            change=act.called_before,
            refused=FOREIGN,
        ),
        row(
            "a call of another pipeline that shares the UNet",
            run=lambda pipe: act.another_pipeline(pipe, "StableDiffusionControlNetPipeline", True),
            change=act.called_before,
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
        row("LoRA loaded", change=adapters.load_lora),
        row("LoRA scaled", adapters.with_lora, change=lambda pipe: pipe.set_adapters(["style"], [0.3])),
        row(
            "LoRA scaled by cross_attention_kwargs",
            adapters.with_lora_and_text_encoder,
            {"cross_attention_kwargs": {"scale": 0.3}},
        ),
        row("an adapter that has no scale (IA3)", change=adapters.add_ia3),
        row("LoRA fused", adapters.with_lora, change=adapters.fuse_lora),
        row("LoRA unfused", adapters.fused, change=lambda pipe: pipe.unfuse_lora(components=["unet"])),
        row("LoRA disabled", adapters.with_lora, change=lambda pipe: pipe.disable_lora()),
        row("LoRA unloaded", adapters.with_lora, change=lambda pipe: pipe.unload_lora_weights()),
        row(
            "LoRA on the ControlNet's zero convolutions",
            change=lambda pipe: adapters.lora(pipe.controlnet, "controlnet_mid_block"),
        ),
        row("LoRA scaled in mid-run", adapters.with_lora, act.when(MIDDLE, adapters.mid_lora), refreshed=(MIDDLE,)),
        row(
            "LoRA loaded in mid-run",
            call=act.when(MIDDLE, lambda pipe, _: adapters.load_lora(pipe)),
            refreshed=(MIDDLE,),
        ),
        row(
            "LoRA loaded in mid-run, then scaled",
            call=act.at_each({MIDDLE: lambda pipe, _: adapters.load_lora(pipe), MIDDLE + 1: adapters.mid_lora}),
            refreshed=(MIDDLE, MIDDLE + 1),
        ),
        row("LoRA fused in mid-run", adapters.with_lora, act.when(MIDDLE, adapters.fuse_scaled), refreshed=(MIDDLE,)),
        row(
            "LoRA unloaded in mid-run",
            adapters.with_lora,
            act.when(MIDDLE, lambda pipe, _: pipe.unload_lora_weights()),
            refreshed=(MIDDLE,),
        ),
        row(
            "cross_attention_kwargs' scale changed in mid-run",
            adapters.with_lora,
            act.when(MIDDLE, adapters.change_lora_scale),
            refused="the UNet's inputs changed and the ControlNet's did not.*remove_schedule",
        ),
        row(
            "cross_attention_kwargs' scale changed in mid-run, plain UNet",
            adapters.with_lora_plain,
            act.when(MIDDLE, adapters.change_lora_scale),
            refreshed=(MIDDLE,),
        ),
        row("IP-Adapter", call=adapters.ip_image, change=adapters.load_ip_adapter),
        row("IP-Adapter, two images", call=partial(adapters.ip_image, number=2), change=adapters.load_ip_adapter),
        row(
            "IP-Adapter scaled",
            adapters.with_ip_adapter,
            adapters.ip_image,
            change=lambda pipe: pipe.set_ip_adapter_scale(0.4),
        ),
        row(
            "IP-Adapter scaled in mid-run",
            adapters.with_ip_adapter,
            adapters.ip_with(act.when(MIDDLE, adapters.no_ip)),
            refreshed=(MIDDLE,),
        ),
        row(
            "IPAdapterScaleCutoffCallback",
            adapters.with_ip_adapter,
            adapters.ip_with({"callback_on_step_end": IPAdapterScaleCutoffCallback(**CUTOFF)}),
            refreshed=(MIDDLE,),
        ),
        row("FreeU", change=act.freeu),
        row("FreeU switched on in mid-run", call=act.when(MIDDLE, act.freeu), refreshed=(MIDDLE,)),
        row(
            "FreeU switched off in mid-run",
            act.with_freeu,
            act.when(MIDDLE, lambda pipe, _: pipe.disable_freeu()),
            refreshed=(MIDDLE,),
        ),
        neutral("attention slicing", change=lambda pipe: pipe.enable_attention_slicing(1)),
        neutral("VAE slicing", change=lambda pipe: pipe.vae.enable_slicing()),
        neutral("VAE tiling", change=lambda pipe: pipe.vae.enable_tiling()),
        row("fused QKV projections", change=lambda pipe: pipe.unet.fuse_qkv_projections()),
        neutral("channels_last", change=lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
        neutral("torch.compile of the UNet", change=act.compile_whole, is_slow=True),
        neutral("UNet compiled in place", change=lambda pipe: pipe.unet.compile(backend="eager"), is_slow=True),
        neutral(
            "compile_repeated_blocks",
            change=lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager"),
            is_slow=True,
        ),
        neutral("save_pretrained", change=act.save_and_load),
        row(
            "handle.compile(), guidance off",
            check=partial(check.compiled_without_halves, guidance_scale=1.0),
            is_slow=True,
        ),
        row("handle.compile(), guess mode", check=partial(check.compiled_without_halves, guess_mode=True)),
        row("handle.compile(), then LoRA, FreeU, another size", check=check.compiled_then_changed, is_slow=True),
        row("save_pretrained after a run", check=check.saved_after_a_run),
        row("deepcopy", check=partial(check.deepcopied, 1)),
        row("deepcopy, several ControlNets", check=partial(check.deepcopied, 2)),
        row("deepcopy after handle.compile()", check=check.deepcopied_after_compile),
        row("schedule applied twice", check=check.applied_twice),
        row("schedule removed twice", check=check.removed_twice),
        row(
            "schedule removed while others have wrapped the forward",
            check=check.removed_while_wrapped,
            refused="forward of the unet has been wrapped since.*Undo that first",
        ),
        row(
            "a hook on a block",
            change=act.hook_on("unet.mid_block"),
            refused=r"unet.mid_block has hooks.*remove_schedule\(pipe\) for such runs",
        ),
        row("a hook on a layer in a block", change=act.hook_on("unet.mid_block.resnets.0.conv1")),
        row(
            "a forward of a block's own",
            change=act.replace_forward_of("unet.up_blocks.0"),
            refused="unet.up_blocks.0 has hooks or a forward of its own",
        ),
        row(
            "a block made one of a subclass",
            change=act.subclass_of("unet.up_blocks.0"),
            refused="unet.up_blocks.0 (is a Patched, whose dataflow is not known|has hooks or a forward of its own)",
        ),
        row(
            "transformer blocks made ones of a subclass (tomesd)",
            change=act.subclass_of_transformer_blocks,
            refused="undo what has patched them|has hooks or a forward of its own",
        ),
        row(
            "a forward of the UNet's own",
            act.with_own_forward("unet"),
            refused="forward of the unet has been replaced or wrapped.*Undo that first",
        ),
        row(
            "a forward of the ControlNet's own",
            act.with_own_forward("controlnet"),
            refused="forward of the controlnet has been replaced or wrapped.*Undo that first",
        ),
        row(
            "a UNet made one of a subclass with a forward of its own",
            act.with_own_unet,
            refused="unet is a Own; schedules support diffusers' UNet2DConditionModel",
        ),
        row("a layer replaced", change=act.other_block, refused="unet.up_blocks.0.resnets.0 is not the one"),
        row("an attention processor that writes into keys and values", change=act.emphasise),
        row("an attention processor that looks across the batch", check=check.across_the_batch),
        row(
            "a hook that writes into what the ControlNet gives",
            change=act.write_into_control,
            refused="what was kept of .* has been written into since",
        ),
        row("a hook that weighs what the ControlNet gives", check=check.weighed_control),
        row(
            "another MultiControlNetModel around the same ControlNets",
            check=check.other_container,
            refused="pipe.controlnet is not the one",
        ),
        row(
            "one ControlNet twice",
            partial(build, **TWO),
            change=act.one_controlnet_twice,
            refused="controlnet.nets.1 is .*the same object.*deepcopy|controlnet.nets.1 is not the one",
        ),
        neutral(
            "torch.compile of several ControlNets", partial(build, **TWO), change=act.compile_controlnets, is_slow=True
        ),
        row("a ControlNet that is left of a pipeline with a schedule", check=check.controlnet_left),
        row("float32 after bfloat16", check=check.float32_after_bfloat16),
        row(
            "UNet replaced", change=lambda pipe: setattr(pipe, "unet", build().unet), refused="pipe.unet is not the one"
        ),
        row(
            "ControlNet replaced",
            change=lambda pipe: setattr(pipe, "controlnet", build().controlnet),
            refused="pipe.controlnet is not the one",
        ),
    ]
