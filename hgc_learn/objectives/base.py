"""What an objective is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hgc_learn.training.gates import Gates
from hgc_learn.training.router import Router

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

DEFAULT_SITES = ("unet.*s.?:out", "unet.*s.?:branch", "*.attn2:out", "*:control", "unet:eps")


class Objective(nn.Module):
    """How a router learns: one training step at a time.

    The constructor's arguments are the recipe's own settings, kept as attributes of the same names; buffers are what
    a checkpoint has to hold of it.

    Attributes:
        policy: name of the policy that a router trained like this is exported as.
        default_sites: glob patterns of the sites that it routes unless others are asked for.
        is_specialised: whether the router learns more for an exported schedule's budget, and how to fill in.
    """

    policy: ClassVar[str]
    default_sites: ClassVar[tuple[str, ...]] = DEFAULT_SITES
    is_specialised: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """The recipe and its settings as a configuration file has them; Lightning's command line reads them back."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        class_path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class_path": class_path, "init_args": {name: getattr(self, name) for name in names}}

    def prepare(self, module: RouterModule) -> None:
        """Called once, when the module's pipeline and router are there.

        Raises:
            ValueError: settings of the module that the recipe cannot do with.
        """

    def use_pipeline(self, module: RouterModule) -> None:
        """Called when the module has got its pipeline, or another one of the same models."""

    def gates(self, router: Router, budget: float) -> Gates:
        """The router's gates at a budget, a fraction of the full MACs.

        Raises:
            BudgetError: it cannot be met.
        """
        return router.round(budget)

    def draw(self, router: Router, budget: float, generator: torch.Generator) -> Gates | None:
        """Gates by chance, as training draws them; None if it draws none."""
        return None

    def optimizer(self, router: Router) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self, module: RouterModule, batch: dict[str, Any]) -> dict[str, Any]:
        """One training step, with one step of the module's optimizer. All chance must come from
        `module.generator`. Returns what to log; `loss` is the error that the recipe lowers."""
        raise NotImplementedError
