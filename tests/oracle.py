"""A slow pipeline that runs a schedule by its definition: shares no code with the plan or the runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.models.graph import build_graph, controlnet_list

History = dict[tuple[str, int | None], list[tuple[int, Tensor]]]
"""Values by site and half of the batch (None: both in one), with their step, the latest first."""


@contextmanager
def by_definition(
    pipe: Any, rows: dict[str, str], *, first_step: int = 0, refreshed: Collection[int] = ()
) -> Iterator[None]:
    """Runs the pipeline as a schedule is defined, keeping every tensor: a value is asked for from the prediction
    backwards; a site that its row reuses is filled in from the values it had when it last really ran, each half of the
    batch by itself where a row is about halves. At a step in `refreshed` everything is computed, and the fresh value
    stands for all older ones. New timesteps of the scheduler are a new run."""
    nets = controlnet_list(getattr(pipe, "controlnet", None))
    names = ["controlnet"] if len(nets) == 1 else [f"controlnet.nets.{i}" for i in range(len(nets))]
    graph = build_graph(pipe.unet, nets)
    has_halves = "unet:guidance" in rows or any("m" in row for row in rows.values())
    history: History = {}
    calls: dict[tuple[str, int | None], ops.Call] = {}
    state: dict[str, Any] = {"timesteps": None, "guess_mode": False}

    def notice_new_run() -> None:
        if state["timesteps"] is not pipe.scheduler.timesteps:
            history.clear()
            state.update(timesteps=pipe.scheduler.timesteps, step=first_step)

    def is_guided() -> bool:
        return getattr(pipe, "do_classifier_free_guidance", False)

    def halves() -> tuple[int | None, ...]:
        if not has_halves:
            return (None,)
        return (0, 1) if is_guided() else (1,)

    def part(half: int | None, batch_size: int) -> Callable[[Any], Any]:
        return partial(take, half if len(halves()) == 2 else None, batch_size)

    def code_of(name: str, step: int) -> str:
        return rows[name][step] if name in rows else "C"

    def key_of(name: str, half: int | None) -> tuple[str, int | None]:
        is_control = name in graph.residuals or graph.nodes[name].model != "unet"
        return name, 1 if is_control and state["guess_mode"] else half  # the ControlNet has the guided half only

    def demanded(step: int) -> set[tuple[str, int | None]]:
        """What runs at this step if nothing is refreshed."""
        found: set[tuple[str, int | None]] = set()

        def ask(name: str, half: int | None) -> None:
            key = key_of(name, half)
            if key not in found and code_of(name, step) == "C":
                found.add(key)
                for source in graph.nodes[name].inputs:
                    ask(source, key[1])

        for half in halves():
            if half != 0 or code_of(graph.guidance, step) == "C":
                ask(graph.output, half)
        if (graph.output, 0) in found:
            found.add((graph.guidance, 1))
        return found

    def fill_in(code: str, key: tuple[str, int | None], step: int) -> Tensor:
        if code != "m":
            return filled(code, history[key], step)
        # The mean of the halves at the last step that runs in full by the schedule; of what there is, if not of two.
        full = next(i for i, _ in history[key] if code_of(graph.guidance, i) == "C")
        values = [dict(history[key[0], half])[full] for half in (0, 1) if (key[0], half) in history]
        return torch.stack(values).mean(0)

    def value(name: str, half: int | None, known: dict[Any, Tensor], is_refresh: bool) -> Tensor:
        key, step = key_of(name, half), state["step"]
        if key not in known:
            code = "C" if is_refresh else code_of(name, step)
            if code == "C":
                node = graph.nodes[name]
                inputs = [value(source, key[1], known, is_refresh) for source in node.inputs]
                known[key] = node.run(calls.get((node.model, key[1])), *inputs)
                if not is_refresh:
                    history.setdefault(key, []).insert(0, (step, known[key]))
            else:
                known[key] = fill_in(code, key, step)
        if key[1] == half:
            return known[key]
        zeros = torch.zeros_like(known[key])
        return zeros if half == 0 else torch.cat([zeros, known[key]])

    def refresh(known: dict[Any, Tensor]) -> Tensor:
        predictions = [value(graph.output, half, known, True) for half in halves()]
        if len(predictions) == 2:
            known[graph.guidance, 1] = predictions[1] - predictions[0]
        history.clear()
        for earlier in range(state["step"] + 1):  # the fresh values stand for all these
            for key in demanded(earlier):
                history.setdefault(key, []).insert(0, (earlier, known[key]))
        return torch.cat(predictions)

    def predict() -> Tensor:
        step, known = state["step"], dict[Any, Tensor]()
        if step in refreshed or (first_step and step == first_step):
            return refresh(known)
        if len(halves()) == 1:
            return value(graph.output, halves()[0], known, False)
        guided = value(graph.output, 1, known, False)
        code = code_of(graph.guidance, step)
        if code != "C":
            return torch.cat([guided - fill_in(code, (graph.guidance, 1), step), guided])
        unguided = value(graph.output, 0, known, False)
        if code_of(graph.output, step) == "C":  # a prediction that is filled in tells nothing new about the difference
            history.setdefault((graph.guidance, 1), []).insert(0, (step, guided - unguided))
        return torch.cat([unguided, guided])

    def controlnet_forward(
        name: str, net: Any, sample: Any, timestep: Any, *, encoder_hidden_states: Any, controlnet_cond: Any, **kw: Any
    ) -> Any:
        notice_new_run()
        kw.pop("return_dict")
        state["guess_mode"] = kw.get("guess_mode", False) and is_guided()
        for half in (1,) if state["guess_mode"] else halves():
            of = (lambda value: value) if state["guess_mode"] else part(half, len(sample))
            inputs = [of(value) for value in (encoder_hidden_states, controlnet_cond)]
            calls[name, half] = ops.controlnet_call(net, of(sample), timestep, *inputs, **of(kw))
        empty = sample.new_empty(0)  # the residuals are made when the UNet asks for them
        down = tuple(empty for _ in graph.residuals[:-1])
        return tuple(ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=empty).to_tuple())

    @apply_lora_scale("cross_attention_kwargs")
    def unet_forward(
        unet: Any, sample: Any, t: Any, *, encoder_hidden_states: Any, return_dict: bool, **kw: Any
    ) -> Any:
        notice_new_run()
        for name in ("down_block_additional_residuals", "mid_block_additional_residual"):
            kw.pop(name, None)
        for half in halves():
            of = part(half, len(sample))
            rest = {k: v if k == "cross_attention_kwargs" else of(v) for k, v in kw.items()}
            calls["unet", half] = ops.unet_call(unet, of(sample), t, of(encoder_hidden_states), **rest)
        prediction = predict()
        state["step"] += 1
        return UNet2DConditionOutput(sample=prediction).to_tuple()

    forwards = {pipe.unet: partial(unet_forward, pipe.unet)}
    forwards |= {net: partial(controlnet_forward, name, net) for name, net in zip(names, nets, strict=False)}
    for model, forward in forwards.items():
        model.forward = forward
    try:
        yield
    finally:
        for model in forwards:
            del model.forward


def take(half: int | None, batch_size: int, value: Any) -> Any:
    """One half of every tensor that has a batch; None: both."""
    if half is None:
        return value
    if isinstance(value, Tensor) and value.ndim and len(value) == batch_size:
        return value.chunk(2)[half]
    if isinstance(value, dict):
        return {k: take(half, batch_size, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take(half, batch_size, v) for v in value)
    return value


def filled(code: str, values: list[tuple[int, Tensor]], step: int) -> Tensor:
    """The formulas of `-`, `1` and `0`, written out."""
    (last, f0) = values[0]
    if code == "0":
        return torch.zeros_like(f0)
    if code == "1" and len(values) > 1:
        before, f1 = values[1]
        return f0 + (step - last) * (f0 - f1) / (last - before)
    return f0
