"""Adam that moves whole groups of gates besides each of them: those of a step, and those of a block at a step.

What a draw tells of one gate is mostly noise, and Adam moves a logit as far for noise as for a slope. Gates that lie
in one block mostly want the same at a step, most of all those that the present schedule leaves dead, of which a draw
tells nothing: the sum of their gradients tells it with less noise, and moves them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hgc_learn.sites import enclosing_block
from hgc_learn.training.router import Router


class GroupedAdam(torch.optim.Adam):
    """Adam on a router's logits, reaches, and the moves of its groups.

    A logit is its own part plus those of its groups, which all learn alike; after every update the router has the sum,
    so that nobody else has to know of groups.

    Args:
        learning_rate: how far about each part of a logit moves in an update.
    """

    def __init__(self, router: Router, learning_rate: float):
        self.router = router
        blocks = [enclosing_block(site) for site in router.sites]
        rows = [[1.0] * len(blocks), *([float(b == block) for b in blocks] for block in dict.fromkeys(blocks))]
        self.members = torch.tensor(rows, device=router.logits.device)  # [groups, sites]
        self.moves = router.logits.new_zeros(router.num_steps, len(rows)).requires_grad_()
        super().__init__([router.logits, router.reach, self.moves], lr=learning_rate, betas=(0.9, 0.95))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert self.router.logits.grad is not None
        self.moves.grad = self.router.logits.grad @ self.members.t()
        result = super().step(closure)
        self.router.logits.add_(self.moves @ self.members)
        self.moves.zero_()
        return result
