"""What people do to a pipeline, for the table in `robustness.py`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from robustness_pipelines import arguments, build, run
from tiny_models import GUIDANCE_SCALE, NUM_STEPS
from torch import Tensor

MIDDLE = NUM_STEPS // 2


Change = Callable[[Any, dict[str, Any]], dict[str, Any] | None]


def when(step: int, change: Change, *names: str) -> dict[str, Any]:
    """Arguments that let `change(pipe, tensors)` happen before a step."""
    return at_each({step: change}, *names)


def at_each(changes: dict[int, Change], *names: str) -> dict[str, Any]:
    """The same before several steps."""

    def callback(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return (changes[i + 1](pipe, tensors) if i + 1 in changes else None) or tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(names)}


def guidance_off(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    def half(value: Any) -> Any:
        return [half(part) for part in value] if isinstance(value, list) else value.chunk(2)[-1]

    pipe._guidance_scale = 1.0
    return {name: half(value) for name, value in tensors.items()}


def guidance_on(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = GUIDANCE_SCALE
    embeds, image = tensors["prompt_embeds"], tensors["image"]
    return {"prompt_embeds": torch.cat([embeds.flip(1), embeds]), "image": torch.cat([image, image])}


def more_guidance(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._guidance_scale += 2


def cast(dtype: torch.dtype) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        for model in (pipe.unet, pipe.controlnet, pipe.vae):
            torch.nn.Module.to(model, dtype)

    return change


def calls_in_a_row(pipe: Any, *calls: dict[str, Any]) -> Tensor:
    return torch.cat([run(pipe, **call).flatten() for call in calls])


class Stop(Exception):
    pass


def stopped_then_again(pipe: Any, error: type[BaseException]) -> Tensor:
    def stop(*_: Any) -> Any:
        raise error

    for arguments_ in (when(MIDDLE, stop), when(1, stop)):
        try:
            run(pipe, **arguments_)
        except error:
            continue
        raise AssertionError("it was not stopped")
    return run(pipe)


def interrupted_then_again(pipe: Any) -> Tensor:
    def interrupt(pipe: Any, tensors: dict[str, Any]) -> None:
        pipe._interrupt = True

    return torch.cat([run(pipe, **when(MIDDLE, interrupt)), run(pipe)])


def stopped_inside_a_step(pipe: Any) -> Tensor:
    """Between the ControlNet and the UNet of one step, and inside of the UNet."""

    def stop(*_: Any) -> None:
        raise Stop

    for module in (pipe.unet, pipe.unet.conv_in):
        hook = module.register_forward_pre_hook(stop)
        try:
            run(pipe)
        except Stop:
            hook.remove()
    return run(pipe)


def other_prompt(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": tensors["prompt_embeds"].flip(1)}


def other_prompt_in_place(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["prompt_embeds"].mul_(-1)


def other_latents(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"].flip(2)}


def latents_in_place(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["latents"].mul_(0.9)


def other_pooled(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"add_text_embeds": tensors["add_text_embeds"].flip(1)}


def larger_latents(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": torch.nn.functional.interpolate(tensors["latents"], scale_factor=2)}


def other_image(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"image": tensors["image"].flip(2)}


def other_image_in_place(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["image"].mul_(0.5)


def turned_image(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"image": tensors["image"].transpose(2, 3)}


def in_inference_mode(pipe: Any, **kwargs: Any) -> Tensor:
    with torch.inference_mode():
        return run(pipe, **kwargs).clone()


def under_autocast(pipe: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run(pipe)


def another_pipeline(pipe: Any, kind: str, own_scheduler: bool) -> Tensor:
    """A call of a pipeline that shares the models of the scheduled one."""
    scheduler = copy.deepcopy(pipe.scheduler) if own_scheduler else pipe.scheduler
    parts = {**pipe.components, "scheduler": scheduler}
    other = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return run(other)


def called_before(pipe: Any) -> None:
    """Without a schedule, if none is applied yet."""
    run(pipe)


def other_controlnet(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe.controlnet = build().controlnet


def other_unet(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe.unet = build().unet


def own_loop(pipe: Any) -> Tensor:
    embeds = arguments(pipe)["prompt_embeds"].double()
    x = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    for t in pipe.scheduler.timesteps:
        x = pipe.unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0]
    return x


def adapter_image(pipe: Any) -> dict[str, Any]:
    return {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()}


def save_and_load(pipe: Any) -> None:
    """Saving must not be disturbed by a schedule, nor disturb it."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(folder)
        loaded = type(pipe.unet).from_pretrained(folder, torch_dtype=torch.float64)
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert "forward" not in loaded.__dict__


def model_offload(pipe: Any) -> None:
    """With the CPU as the accelerator that this machine lacks. It has no number, so that accelerate would copy all
    arguments from "cpu" to "cpu:0" at every step; accelerators have one."""
    enable = pipe.enable_model_cpu_offload

    def enable_on_cpu(device: Any = "cpu") -> None:  # called after every run too, for all hooks go with it
        enable(device="cpu")
        for hook in pipe._all_hooks:
            hook.hook.execution_device = torch.device("cpu")

    pipe.enable_model_cpu_offload = enable_on_cpu
    enable_on_cpu()


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU as the accelerator that this machine lacks."""
    for model in (pipe.unet, pipe.controlnet, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=False)
    assert pipe.unet.conv_in.weight.is_meta  # until its turn


def group_offload(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def compile_whole(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compile_controlnets(pipe: Any) -> None:
    pipe.controlnet = torch.compile(pipe.controlnet, backend="eager")


def one_controlnet_twice(pipe: Any) -> None:
    pipe.controlnet.nets[1] = pipe.controlnet.nets[0]


def hook_on(path: str) -> Callable[[Any], None]:
    """A hook that changes what a module of the pipeline gives."""

    def register(pipe: Any) -> None:
        attrgetter(path)(pipe).register_forward_hook(lambda module, args, output: output * 0.5)

    return register


def replace_forward_of(path: str) -> Callable[[Any], None]:
    def replace(pipe: Any) -> None:
        module = attrgetter(path)(pipe)
        module.forward = partial(type(module).forward, module)

    return replace


def with_own_forward(model: str) -> Callable[[], Any]:
    """A pipeline one of whose models has been wrapped, as mixed precision and other packages do it."""

    def make() -> Any:
        pipe = build()
        module = getattr(pipe, model)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        return pipe

    return make


def with_own_unet() -> Any:
    class Own(UNet2DConditionModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    pipe = build()
    pipe.unet.__class__ = Own
    return pipe


def emphasise(pipe: Any) -> None:
    """Attention that strengthens one word, and writes that into what it is given."""

    class Emphasis:
        def __call__(
            self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
        ) -> Tensor:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            parts = [attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)]
            if encoder_hidden_states is not None:
                parts[2][:, 1] *= 2.0
            query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            output: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
            return output

    pipe.unet.set_attn_processor(Emphasis())


def other_block(pipe: Any) -> None:
    block = copy.deepcopy(pipe.unet.up_blocks[0].resnets[0])
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    pipe.unet.up_blocks[0].resnets[0] = block


def write_into_control(pipe: Any) -> None:
    def halve(module: Any, args: Any, output: Any) -> None:
        for residual in output[0]:
            residual.mul_(0.5)

    pipe.controlnet.register_forward_hook(halve)


def subclass_of(path: str) -> Callable[[Any], None]:
    """As packages that merge tokens do it."""

    def change(pipe: Any) -> None:
        module = attrgetter(path)(pipe)
        module.__class__ = type("Patched", (type(module),), {})

    return change


def subclass_of_transformer_blocks(pipe: Any) -> None:
    for path, module in pipe.unet.named_modules():
        if isinstance(module, BasicTransformerBlock):
            subclass_of(f"unet.{path}")(pipe)


def freeu(pipe: Any, tensors: Any = None) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def with_freeu() -> Any:
    pipe = build()
    freeu(pipe)
    return pipe


def pooled() -> Any:
    """A ControlNet as that of shuffled pictures: its residuals have no size."""
    pipe = build()
    pipe.controlnet.register_to_config(global_pool_conditions=True)
    return pipe
