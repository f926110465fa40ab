"""Programs by torch.compile: one graph for each different set of nodes that a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.runtime.program import Op, Program

Run = Callable[[ops.Call, dict[str, Tensor]], dict[str, Tensor]]


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for options of `torch.compile` that record CUDA graphs: the next call writes into what the one
    before gave, and a schedule keeps that for later steps."""
    mode, backend = options.get("mode"), options.get("backend")
    what = ""
    if mode in ("reduce-overhead", "max-autotune"):
        what = f"mode={mode!r}"
    elif backend == "cudagraphs":
        what = f"backend={backend!r}"
    elif (options.get("options") or {}).get("triton.cudagraphs"):
        what = "triton.cudagraphs"
    if what:
        raise ValueError(
            f"{what} records CUDA graphs, whose outputs the next call overwrites; a schedule keeps outputs for later "
            'steps. Use mode="max-autotune-no-cudagraphs", or leave mode out.'
        )


class CompiledPrograms:
    """Compiles what programs run when it is first asked for.

    Args:
        programs: all that will be run, with whether on the guided half alone.
        options: of `torch.compile`.
    """

    def __init__(self, programs: Iterable[tuple[Program, bool]], guidance: str, options: dict[str, Any]):
        self.guidance, self.options = guidance, options
        self.results: dict[Any, set[str]] = {}  # by pattern: what any step needs of it
        self.compiled: dict[Any, Run] = {}
        for program, is_half in programs:
            self.results.setdefault(self._key(program, is_half), set()).update(program.results)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the models has to compile its own: functions are not copied, and hold the original's layers."""
        return self.__dict__ | {"compiled": {}}

    def run(self, program: Program, call: ops.Call, values: dict[str, Tensor]) -> None:
        """Adds to `values` what the nodes give that is read afterwards."""
        key = self._key(program, call.is_half)
        pattern = key[0]
        if not pattern:
            return
        if key not in self.compiled:
            own = [op for op in program.ops if op.name != self.guidance]
            self.compiled[key] = torch.compile(_function(own, self.results[key], len(self.compiled)), **self.options)
        made = set(pattern)
        inputs = {name: values[name] for op in program.ops for name in op.inputs if name not in made}
        values.update(self.compiled[key](call, inputs))

    def _key(self, program: Program, is_half: bool) -> tuple[tuple[str, ...], bool]:
        # The difference of the halves runs where a later step loads it: no reason for a graph of its own.
        return tuple(op.name for op in program.ops if op.name != self.guidance), is_half


def _function(program: list[Op], results: set[str], number: int) -> Run:
    def run(call: ops.Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(inputs)
        for op in program:
            values[op.name] = op.run(call, *[values[name] for name in op.inputs])
        return {name: values[name] for name in values if name in results and name not in inputs}

    # torch counts recompilations by code object, and falls back to eager after a few: each function gets its own.
    code = run.__code__.replace(co_name=f"pattern_{number}")
    return FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
