"""Draws that keep to a budget, and what a trained router learns more for one budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_fixtures import BUDGET

from hgc_learn.data import SceneDataModule
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.export.export import decide, in_batches, training_samples
from hgc_learn.export.learning import Learning, hold_out
from hgc_learn.export.specialise import specialise
from hgc_learn.objectives import Rollout
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


def test_draws_keep_to_the_budget_and_spend_it(module: RouterModule) -> None:
    router = module.router
    generator = torch.Generator().manual_seed(0)
    shares = []
    for budget in (0.3, 0.5, 0.8):
        draws = [router.sample(budget, generator) for _ in range(8)]
        kept = [router.kept(gates.compute) for gates, _ in draws]
        assert budget - 0.05 < min(kept) <= max(kept) <= budget + 1e-9
        assert len({gates.compute.numpy().tobytes() for gates, _ in draws}) == 8
        shares.append(torch.stack([gates.compute[1:].float().mean() for gates, _ in draws]).mean())
    assert shares == sorted(shares)


def test_gates_are_drawn_with_their_probabilities(deep_module: RouterModule) -> None:
    router = deep_module.router
    router.logits.data.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(1)))
    router.temperature = 0.5
    generator = torch.Generator().manual_seed(2)
    drawn, expected = torch.zeros_like(router.logits), torch.zeros_like(router.logits)
    for _ in range(64):
        gates, price = router.sample(BUDGET, generator)
        drawn += gates.compute
        expected += router.probabilities(price).detach()
    assert ((drawn - expected) / 64).abs().mean() < 0.06
    assert ((drawn - expected) / 64).mean().abs() < 0.02
    assert torch.corrcoef(torch.stack([drawn.flatten(), expected.flatten()]))[0, 1] > 0.97


def test_cold_draws_are_what_is_rounded(module: RouterModule) -> None:
    module.router.temperature = 1e-6
    gates, price = module.router.sample(BUDGET, torch.Generator().manual_seed(0))
    assert torch.equal(gates.compute, module.gates(BUDGET).compute)
    assert price == pytest.approx(module.router.price(BUDGET), abs=1e-4)


def test_specialising_lowers_the_error(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.objective, "learning_rate", 0.3)  # the logits are random ones
    start = module.gates(BUDGET)
    errors: list[float] = []
    found = specialise(module, BUDGET, [batch], 16, on_update=lambda part, i, error: errors.append(error))
    assert len(errors) == 16
    assert (found.compute != start.compute).any()
    assert module.router.kept(found.compute) <= BUDGET
    assert module.log_error([batch], found) < module.log_error([batch], start) - 0.1
    assert module.router.temperature == 1.0


def test_deciding_again_finds_the_same_and_leaves_the_router(module: RouterModule) -> None:
    before = {name: value.clone() for name, value in module.router.state_dict().items()}
    data = SceneDataModule(num_train=4, num_val=2, batch_size=4)
    learning = Learning(learning_samples=2, reorder_trials=2, specialise_updates=2, fill_updates=1)
    (first, draft), (second, _) = (decide(module, data, BUDGET, learning) for _ in range(2))
    assert torch.equal(first.compute, second.compute)
    assert torch.equal(first.reach, second.reach)
    assert draft.sites
    for name, value in module.router.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("sign", [1, -1])
def test_what_other_samples_do_not_confirm_is_left(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    monkeypatch.setattr(module.objective, "learning_rate", 0.3)
    start = module.gates(BUDGET)

    def judged(batches: Any, gates: Gates) -> float:
        """The worse (or the better) the further it is from where it started."""
        return sign * float((gates.compute != start.compute).sum())

    monkeypatch.setattr(module, "log_error", judged)
    found = specialise(module, BUDGET, [batch], 8)
    assert torch.equal(found.compute, start.compute) == (sign == 1)
    assert not torch.equal(module.gates(BUDGET).compute, start.compute)


def test_nothing_to_gain_at_the_full_budget(module: RouterModule, batch: dict[str, Any]) -> None:
    """The error is 0 there."""
    errors: list[float] = []
    found = specialise(module, 1.0, [batch], 1, on_update=lambda part, i, error: errors.append(error))
    assert found.compute.all()
    assert errors[0] < -25


def test_a_gradient_that_is_not_finite_is_refused(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = Rollout.gradients

    def overflow(self: Rollout, module: RouterModule, *args: Any) -> dict[str, Any]:
        logs = gradients(self, module, *args)
        assert module.router.logits.grad is not None
        module.router.logits.grad[1, 0] = float("nan")
        return logs

    monkeypatch.setattr(Rollout, "gradients", overflow)
    before = module.router.logits.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        specialise(module, BUDGET, [batch], 1)
    assert torch.equal(module.router.logits, before)


def test_a_quarter_judges() -> None:
    assert hold_out(list(range(8))) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert hold_out([0, 1, 2]) == ([0, 1, 2], [0, 1, 2])


def test_numbers_out_of_range_are_refused() -> None:
    numbers = {"learning_samples": 0, "reorder_trials": -1, "specialise_updates": -1, "fill_updates": -1}
    for name, number in numbers.items():
        with pytest.raises(ValueError, match=f"{name} is {number}; it must be"):
            Learning(**{name: number})


def test_samples_to_learn_from_are_the_first_in_batches() -> None:
    samples = training_samples(SceneDataModule(num_train=4, num_val=2), 3)
    batches = in_batches(samples, 2)
    assert [len(batch["text"]) for batch in batches] == [2, 1]
    assert [*batches[0]["text"], *batches[1]["text"]] == [SceneDataset("train", 4)[i]["text"] for i in range(3)]
    assert len(training_samples(SceneDataModule(num_train=4, num_val=2), 9)) == 4


def test_what_is_left_is_spent(deep_module: RouterModule) -> None:
    router = deep_module.router
    for budget in (0.33, 0.5, 0.71):
        start = router.gates(router.logits >= router.price(budget))
        spent = router.round(budget)
        assert (spent.compute >= start.compute).all()
        kept = router.kept(spent.compute)
        assert router.kept(start.compute) <= kept <= budget + 1e-9
        for step, site in (~spent.compute).nonzero()[:40].tolist():
            more = spent.compute.clone()
            more[step, site] = True
            assert router.kept(more) == kept or router.kept(more) > budget
    assert kept > router.kept(start.compute)
