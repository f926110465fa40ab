"""Blends of fresh and kept values at the sites, as Learning-to-Cache and HarmoniCa train with.

A site's value is beta * fresh + (1 - beta) * kept. Nothing is skipped: what a gate would save shows in its penalty
only. The pipeline's own loop is run, and every step of it is handed on once all models have been called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hgc_learn.models import ops
from hgc_learn.models.graph import Graph, Node, run_graph
from hgc_learn.objectives.base import Objective
from hgc_learn.plan import live_step
from hgc_learn.runtime.forwards import RoutedForwards
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

VisitStep = Callable[[int], Tensor]

MAX_LOGIT = 5.0


class BlendedObjective(Objective):
    """One that trains blends, step by step, each with a graph and a loss of its own. It routes the residual branches of
    the UNet's layers and the ControlNet's residuals."""

    default_sites: ClassVar[tuple[str, ...]] = (
        "unet.*.resnets.?:branch",
        "unet.*.attn?:out",
        "unet.*.ff:out",
        "*:control",
    )
    learning_rate: float

    def optimizer(self, router: Router) -> torch.optim.Optimizer:
        return torch.optim.AdamW(router.parameters(), lr=self.learning_rate, weight_decay=0.0)

    def update(self, module: RouterModule) -> None:
        """Moves the logits along their gradients, and keeps betas where they can still move."""
        module.update_router()
        module.router.clamp(MAX_LOGIT)

    def prepare(self, module: RouterModule) -> None:
        guidance = module.graph.guidance
        if guidance in module.router.sites:
            raise ValueError(f"sites: {guidance} is never blended by {self.policy}, so nothing is learned of it.")
        if module.hparams["dtype"] == "float16":
            raise ValueError(f"dtype is float16, in which {self.policy}'s gradients vanish. Use bfloat16 or float32.")
        if module.hparams["gradient_checkpointing"]:
            raise ValueError(f"gradient_checkpointing: {self.policy} keeps the graph of one step only. Leave it out.")
        net = getattr(module.pipe, "controlnet", None)
        if net is not None and net.config.global_pool_conditions:
            raise ValueError(
                "controlnet: it pools its residuals (global_pool_conditions), which pipelines give the guided half "
                f"alone; {self.policy} blends both. Train with the objective Rollout."
            )

    def use_pipeline(self, module: RouterModule) -> None:
        self.forwards = BlendedForwards(module.pipe, module.forwards.graph, module.router.sites, module.num_steps)


class BlendedForwards(RoutedForwards):
    """Collects what the pipeline calls its models with at a step, and runs them, in full or blended, as often as
    `visit_step(step)` asks for; that returns the prediction with which the pipeline goes on."""

    def __init__(self, pipe: Any, graph: Graph, sites: Sequence[str], num_steps: int):
        super().__init__(pipe, graph, num_steps)
        self.columns = {name: s for s, name in enumerate(sites)}
        self.calls: dict[str, ops.Call] = {}
        self.visit_step: VisitStep | None = None

    def new_run(self) -> None:
        super().new_run()
        self.cache: dict[str, Tensor] = {}

    def follow(self, sampling: SamplingConfig, batch: dict[str, Any], visit_step: VisitStep) -> Tensor:
        """Runs the pipeline on a batch (as for `generate`), step by step; returns its final latents."""
        self.visit_step = visit_step
        self.install()
        try:
            return generate(self.pipe, sampling, batch)
        finally:
            self.uninstall()

    def execute(self, model: str, step: int, call: ops.Call, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step in self.refreshed:
            raise RuntimeError(f"Inputs changed at step {step}; training needs them constant over a run.")
        self.calls[model] = call
        if model != "unet":
            return {}  # its residuals are made when the UNet runs
        assert self.visit_step is not None
        return {self.graph.output: self.visit_step(step)}

    @property
    def timestep(self) -> int:
        """Of the present step, as an index into the noise schedule."""
        return round(float(self.calls["unet"].timestep))

    def full(self, latents: Tensor | None = None, *, keep: bool = False) -> Tensor:
        """The uncached models' prediction.

        Args:
            latents: [B, channels, h, w] in place of the pipeline's; each guidance half gets them.
            keep: keep the sites' values.
        """

        def visit(node: Node, fresh: Tensor) -> Tensor:
            if keep and node.name in self.columns:
                self.cache[node.name] = fresh
            return fresh

        with torch.no_grad():
            return run_graph(self.graph, self._calls(latents), visit)

    def blend(self, betas: Tensor, latents: Tensor | None = None, *, compute: Tensor | None = None) -> Tensor:
        """The prediction with every site a blend of its fresh and its kept value, differentiable by `betas` [sites].

        Args:
            latents: as for `full`.
            compute: hard decisions [sites], bool. What inference would compute by them (of the sites that are alive)
                is kept from now on; nothing if not given.
        """
        shares = betas.unbind()
        kept = set() if compute is None else self._computed(compute)

        def visit(node: Node, fresh: Tensor) -> Tensor:
            column = self.columns.get(node.name)
            if column is None:
                return fresh
            value = shares[column] * fresh + (1 - shares[column]) * self.cache[node.name]
            if node.name in kept:
                self.cache[node.name] = value.detach()  # as in HarmoniCa's code: the blend
            return value

        return run_graph(self.graph, self._calls(latents), visit)

    def _computed(self, compute: Tensor) -> set[str]:
        reused = {name for name, c in zip(self.columns, compute.tolist(), strict=True) if not c}
        return set(live_step(self.graph, reused).run)

    def _calls(self, latents: Tensor | None) -> dict[str, ops.Call]:
        if latents is None:
            return self.calls
        return {
            model: replace(call, sample=latents.repeat(len(call.sample) // len(latents), 1, 1, 1))
            for model, call in self.calls.items()
        }
