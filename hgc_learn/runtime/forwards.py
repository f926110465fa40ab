"""Takes over the forwards of a pipeline's UNet and ControlNets, for inference and for training alike.

`RoutedForwards` stands where the models' own `forward` stood, keeps count of the step, notices when inputs change in
mid-run, and leaves to a subclass what is executed: the plan of a schedule (`runtime`) or every node with gates in
between (`training.probe`). Nothing is read back from the device in mid-run, but in inference mode (see `unchanged`).
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph, named_models, original
from hgc_learn.runtime.caller import Caller, check_parts, foreign
from hgc_learn.runtime.takeover import give_back, has_own_forward, owner_of_forward, take_over
from hgc_learn.runtime.unchanged import Settings, Signature, state
from hgc_learn.timesteps import last_step, nearest_in, place_in

_ALL_CONTROLNETS = "controlnet"  # the name that a single one has
_SLOT = "_hgc_forwards"


class RoutedForwards:
    """Runs the models of one pipeline node by node.

    Subclasses say what happens: `execute` runs one model at one step, `check_run` looks at a new run.
    """

    def __init__(self, pipe: Any, graph: Graph, num_steps: int):
        self.pipe, self.graph, self.num_steps = pipe, graph, num_steps
        self.models = routed_models(pipe)
        self.residuals = {model: self._residual_names(model) for model in self.models if model != "unet"}
        self.replaced: dict[str, Any] = {}  # by model: the forward that stood in the instance, if any
        self.multi: Any = None  # what calls several ControlNets, and the hook that is on it
        self.multi_hook: Any = None
        self.timesteps: Tensor | None = None
        self.num_calls: dict[str, int] = {}
        self.refreshed: set[int] = set()
        self.new_run()

    def _residual_names(self, model: str) -> list[str]:
        sources = [self.graph.nodes[name].inputs for name in self.graph.residuals]
        return [next(i for i in inputs if self.graph.nodes[i].model == model) for inputs in sources]

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs `model` at `step`; `given` are tensors made elsewhere. Returns tensors by node name, among them
        the prediction or the residuals that are needed."""
        raise NotImplementedError

    def runs_half(self, step: int) -> bool:
        """Whether the guided half of the batch is run alone. The unguided prediction is then the guided one less
        `values[graph.guidance]`."""
        return False

    def check_run(self, timesteps: Tensor) -> None:
        """Called once per run, before anything is computed."""

    def end_run(self) -> None:
        """Called after the last step: what has been kept for later ones is not needed any more."""

    @property
    def is_guided(self) -> bool:
        """Whether batches are made of an unguided and a guided half; may change in mid-run."""
        return bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    # Replacing the forwards

    def check_models(self, before: RoutedForwards | None = None) -> None:
        """Raises ValueError where others stand in the place of a forward, but `before`."""
        for model, module in self.models.items():
            if (there := RoutedForwards.installed_on(module)) is not None:
                if there is before:
                    continue
                raise ValueError(
                    f"The {model} is shared with a pipeline that has a schedule: remove_schedule(pipe) of either first."
                )
            if has_own_forward(module) and not _is_group_offload_enabled(module):
                raise ValueError(
                    f"The forward of the {model} has been replaced or wrapped, and would not be called. Undo that "
                    "first (accelerate: unwrap_model(..., keep_fp32_wrapper=False)); to compile, use handle.compile()."
                )

    def install(self) -> None:
        """Raises ValueError where others stand in the place of a forward."""
        self.check_models()
        self.caller = Caller(self.pipe)
        for model, module in self.models.items():
            forward = self.unet_forward if model == "unet" else partial(self.controlnet_forward, model)
            self.replaced[model] = take_over(module, forward)
            setattr(module, _SLOT, self)
        if len(self.models) > 2:
            self.multi = self.pipe.controlnet
            self.multi_hook = self.multi.register_forward_pre_hook(self.before_controlnets, with_kwargs=True)

    def uninstall(self) -> None:
        """Does nothing if it is not installed.

        Raises:
            ValueError: others have wrapped the forwards since.
        """
        if RoutedForwards.installed_on(self.models["unet"]) is not self:
            return
        for model, module in self.models.items():
            if owner_of_forward(module) is not self:
                raise ValueError(
                    f"The forward of the {model} has been wrapped since the schedule was applied (by another cache, a "
                    "profiler, group offload, ...). Undo that first, then remove the schedule."
                )
        for model, module in self.models.items():
            give_back(module, self.replaced.pop(model))
            delattr(module, _SLOT)
        if self.multi_hook is not None:
            self.multi_hook.remove()
        counts = self.num_calls, self.refreshed
        self.new_run()
        self.num_calls, self.refreshed = counts  # of the latest run, which may still be asked for

    @staticmethod
    def installed_on(model: nn.Module) -> RoutedForwards | None:
        return model.__dict__.get(_SLOT)

    # Where the run stands

    def new_run(self) -> None:
        self.num_calls = dict.fromkeys([*self.models, _ALL_CONTROLNETS], 0)
        self.seen: dict[str, Signature] = {}
        self.handed_on: list[tuple[Tensor, int]] = []  # what the latest ControlNet gave, and what state it was in
        self.refreshed = set()
        self.first_step, self.last_step = 0, self.num_steps - 1
        self.is_offloaded = False

    @torch.compiler.disable
    def begin(self, model: str, timestep: Any, sample: Tensor, inputs: Any) -> int:
        """Returns the step's index; notes in `refreshed` if the inputs differ from those of the step before."""
        self._check_same_models()
        timesteps = self.pipe.scheduler.timesteps
        place = place_in(timesteps, timestep)
        if timesteps is not self.timesteps:  # set_timesteps has been called: a new run
            self.new_run()
            self._check_modules()
            self.caller.check(is_first=place == 0)
            self.check_run(timesteps)
            self.timesteps, self.settings = timesteps, Settings(self.models)
            offloaded = [*self.models.values(), getattr(self.pipe, "controlnet", None)]
            self.is_offloaded = any(hasattr(module, "_hf_hook") for module in offloaded)  # by copies of the arguments
            self.first_step = nearest_in(timesteps, timestep) if place is None else place
            if self.first_step:  # image to image
                self.refreshed.add(self.first_step)
            self.last_step = last_step(self.pipe, self.first_step)
        step = self.first_step + self.num_calls[model]
        is_known = step < self.num_steps and (
            place == step or (place is None and self.is_offloaded and float(timestep) == float(timesteps[step]))
        )
        if not is_known:
            raise ValueError(foreign(f"The {model}, at step {step} of {self.num_steps},"))
        if model == "unet" and step == self.first_step:
            check_parts(self.pipe, sample, self.is_guided)
        called_with = (sample.shape, sample.dtype, sample.device, inputs)
        signature = Signature(called_with, self.settings.read())
        if step > self.last_step:  # the pipeline had said less, and what was kept is gone
            self.refreshed.add(step)
        if model in self.seen and not signature.equals(self.seen[model]):
            if model == "unet" and step not in self.refreshed and len(self.models) > 1:
                self.timesteps = None
                raise ValueError(
                    f"At step {step} the UNet's inputs changed and the ControlNet's did not. The schedule cannot be "
                    "followed; remove_schedule(pipe) for such runs. With offloading, tensors of cross_attention_kwargs "
                    "(ip_adapter_masks) must be on the device that the models run on: others are copied at every step."
                )
            self.refreshed.add(step)
            self.settings = Settings(self.models)  # with the layers that a LoRA has brought
            signature = Signature(called_with, self.settings.read())
        self.seen[model] = signature
        self.num_calls[model] += 1
        return step

    def _check_same_models(self) -> None:
        """Whether the pipeline has the models that the schedule was applied to: any may be replaced in mid-run."""
        models = routed_models(self.pipe)
        names = sorted(self.models.keys() | models.keys())
        others = [model for model in names if models.get(model) is not self.models.get(model)]
        if not others and self.multi is not None and original(self.pipe.controlnet) is not original(self.multi):
            others = [_ALL_CONTROLNETS]  # another one of the same
        if others:
            raise ValueError(
                f"pipe.{others[0]} is not the one that the schedule was applied to. Call handle.remove(), then apply "
                "the schedule again."
            )

    def _check_modules(self) -> None:
        """Whether what is in the models is as it was."""
        for model in self.models:
            if _is_group_offload_enabled(self.models[model]):
                raise ValueError(
                    f"Group offload of the {model} is not supported with a schedule: it waits for calls of whole "
                    "blocks. Use pipe.enable_model_cpu_offload() or pipe.enable_sequential_cpu_offload() instead."
                )
        for name, module in self.graph.modules.items():
            if self._module(name) is not module:
                raise ValueError(
                    f"{name} is not the one that the schedule was applied to. Call handle.remove(), then apply the "
                    "schedule again."
                )
        for name, (module, known) in self.graph.opened.items():
            if type(module) is not known or "forward" in module.__dict__ or _has_hooks(module):
                raise ValueError(
                    f"{name} has hooks or a forward of its own, which would not be called: a schedule calls what is in "
                    "it. Undo that, or remove_schedule(pipe) for such runs."
                )

    def _module(self, path: str) -> nn.Module | None:
        """What stands at the path of a node of the graph now."""
        model = next(model for model in self.models if path.startswith(f"{model}."))
        try:
            module: nn.Module = self.models[model].get_submodule(path.removeprefix(f"{model}."))
        except AttributeError:
            return None
        return module

    def before_controlnets(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Several ControlNets run one after the other: what changes for the last of them must be known before the
        first, for all are refreshed together."""
        inputs = signature(MultiControlNetModel.forward).bind(module, *args, **kwargs).arguments
        sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
        del inputs["self"]
        self.begin(_ALL_CONTROLNETS, timestep, sample, inputs)

    # The forwards

    def unet_forward(self, *args: Any, **kwargs: Any) -> Any:
        return _unet_forward(self.models["unet"], self, *args, **kwargs)

    def controlnet_forward(self, model: str, *args: Any, **kwargs: Any) -> Any:
        return _controlnet_forward(self.models[model], self, model, *args, **kwargs)


def routed_models(pipe: Any) -> dict[str, Any]:
    """The models whose forwards are taken over, by the name they have in a schedule; of compiled ones the original."""
    return named_models(pipe.unet, getattr(pipe, "controlnet", None))


@apply_lora_scale("cross_attention_kwargs")
def _unet_forward(
    unet: nn.Module,
    forwards: RoutedForwards,
    sample: Tensor,
    timestep: Any,
    encoder_hidden_states: Any,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    down_block_additional_residuals: Any = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Any = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """`UNet2DConditionModel.forward` along the plan; same arguments."""
    if down_intrablock_additional_residuals is not None:
        raise ValueError("T2I-Adapter residuals are not supported with a schedule; remove_schedule(pipe) first.")
    residuals = [*(down_block_additional_residuals or ()), mid_block_additional_residual]
    residuals = [r for r in residuals if r is not None]
    if len(residuals) != len(forwards.graph.residuals):
        raise ValueError(
            f"The UNet received {len(residuals)} ControlNet residuals; with this schedule it takes "
            f"{len(forwards.graph.residuals)}."
        )
    kwargs = {
        "class_labels": class_labels,
        "timestep_cond": timestep_cond,
        "attention_mask": attention_mask,
        "cross_attention_kwargs": cross_attention_kwargs,
        "added_cond_kwargs": added_cond_kwargs,
        "encoder_attention_mask": encoder_attention_mask,
    }
    step = forwards.begin("unet", timestep, sample, (encoder_hidden_states, kwargs))
    has_halves = forwards.is_guided
    is_half = has_halves and forwards.runs_half(step)
    if is_half:
        batch_size = sample.shape[0]
        residuals = [r if r.shape[0] < batch_size else ops.guided_half(r) for r in residuals]
        sample, encoder_hidden_states = ops.guided_half((sample, encoder_hidden_states))
        kwargs = _halved(kwargs)
    call = ops.unet_call(
        unet, sample, timestep, encoder_hidden_states, has_halves=has_halves, is_half=is_half, **kwargs
    )
    values = forwards.execute("unet", step, call, dict(zip(forwards.graph.residuals, residuals, strict=True)))
    forwards.handed_on = []  # holds neither memory nor a graph after the step
    if step >= forwards.last_step:
        forwards.end_run()
    prediction = values[forwards.graph.output]
    if is_half:
        prediction = torch.cat([prediction - values[forwards.graph.guidance], prediction])
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


@apply_lora_scale("cross_attention_kwargs")
def _controlnet_forward(
    net: nn.Module,
    forwards: RoutedForwards,
    model: str,
    sample: Tensor,
    timestep: Any,
    encoder_hidden_states: Any,
    controlnet_cond: Tensor,
    conditioning_scale: float = 1.0,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guess_mode: bool = False,
    return_dict: bool = True,
) -> Any:
    """`ControlNetModel.forward` along the plan; same arguments. Residuals that the UNet will not read at this step
    come back as empty tensors."""
    kwargs = {
        "conditioning_scale": conditioning_scale,
        "class_labels": class_labels,
        "timestep_cond": timestep_cond,
        "attention_mask": attention_mask,
        "added_cond_kwargs": added_cond_kwargs,
        "cross_attention_kwargs": cross_attention_kwargs,
        "guess_mode": guess_mode,
    }
    step = forwards.begin(model, timestep, sample, (encoder_hidden_states, controlnet_cond, kwargs))
    has_halves = forwards.is_guided and not guess_mode  # in guess mode it gets the guided half anyway
    is_half = has_halves and forwards.runs_half(step)
    if is_half:
        sample, encoder_hidden_states, controlnet_cond = ops.guided_half(
            (sample, encoder_hidden_states, controlnet_cond)
        )
        kwargs = _halved(kwargs)
    kwargs |= {"has_halves": has_halves, "is_half": is_half}
    call = ops.controlnet_call(net, sample, timestep, encoder_hidden_states, controlnet_cond, **kwargs)
    values = forwards.execute(model, step, call, {})
    empty = sample.new_empty(0)
    *down, mid = [values.get(name, empty) for name in forwards.residuals[model]]
    if len(forwards.models) > 2:
        mid = mid.clone()  # MultiControlNetModel adds the others' to it in place, and it may be kept
    forwards.handed_on = [(residual, state(residual)) for residual in (*down, mid)]
    if not return_dict:
        return down, mid
    return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)


def _halved(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The guided half of all arguments but those of the attention processors, whose tensors have no batch."""
    return {k: v if k == "cross_attention_kwargs" else ops.guided_half(v) for k, v in kwargs.items()}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
