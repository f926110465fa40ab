"""The optimizer of gates and of groups of them."""

from __future__ import annotations

import pytest
import torch

from hgc_learn.sites import enclosing_block
from hgc_learn.training.grouped import GroupedAdam
from hgc_learn.training.module import RouterModule

RATE = 0.1


def moved(module: RouterModule, gradient: torch.Tensor) -> torch.Tensor:
    """By how much the first update moves every logit: Adam's is the learning rate, whatever the gradient's size."""
    router = module.router
    before = router.logits.detach().clone()
    router.logits.grad, router.reach.grad = gradient, torch.zeros_like(router.reach)
    GroupedAdam(router, RATE).step()
    return router.logits.detach() - before


def of_blocks(module: RouterModule) -> dict[str, list[int]]:
    columns: dict[str, list[int]] = {}
    for column, site in enumerate(module.router.sites):
        columns.setdefault(enclosing_block(site), []).append(column)
    return columns


def test_one_gate_takes_its_block_and_its_step_along(module: RouterModule) -> None:
    block = max(of_blocks(module).values(), key=len)
    gradient = torch.zeros_like(module.router.logits)
    gradient[2, block[0]] = 1e-3
    expected = torch.zeros_like(gradient)
    expected[2] = -RATE
    expected[2, block] = -2 * RATE
    expected[2, block[0]] = -3 * RATE
    torch.testing.assert_close(moved(module, gradient), expected, rtol=1e-3, atol=1e-6)


def test_gates_of_a_group_that_disagree_leave_it_where_it_is(module: RouterModule) -> None:
    block = max(of_blocks(module).values(), key=len)
    gradient = torch.zeros_like(module.router.logits)
    gradient[1, block[0]], gradient[1, block[1]] = 1.0, -1.0
    expected = torch.zeros_like(gradient)
    expected[1, block[0]], expected[1, block[1]] = -RATE, RATE
    torch.testing.assert_close(moved(module, gradient), expected, rtol=1e-3, atol=1e-6)


def test_an_optimizer_from_its_state_goes_on_as_if_it_had_never_stopped(module: RouterModule) -> None:
    router, generator = module.router, torch.Generator().manual_seed(0)
    gradients = torch.randn(6, *router.logits.shape, generator=generator)
    start, results = router.logits.detach().clone(), []
    for is_resumed in (False, True):
        router.logits.data.copy_(start)
        optimizer = GroupedAdam(router, RATE)
        for update, gradient in enumerate(gradients):
            if is_resumed and update == 3:
                state = optimizer.state_dict()
                optimizer = GroupedAdam(router, RATE)
                optimizer.load_state_dict(state)
            router.logits.grad, router.reach.grad = gradient.clone(), torch.zeros_like(router.reach)
            optimizer.step()
        results.append(router.logits.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2:out", "unet.up_blocks.1"),
        ("unet.down_blocks.10.resnets.0:branch", "unet.down_blocks.10"),
        ("unet.mid_block.resnets.0:out", "unet.mid_block"),
        ("unet:eps", "unet:eps"),
        ("controlnet.controlnet_down_blocks.3:control", "controlnet"),
        ("controlnet.nets.1.mid_block.attentions.0.transformer_blocks.0.attn2:out", "controlnet.nets.1"),
    ],
)
def test_blocks(site: str, block: str) -> None:
    assert enclosing_block(site) == block
