"""What effects say of other choices, against what these choices really do."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from training_fixtures import BUDGET, SAMPLING, changed, random_gates

from hgc_learn.objectives import DEFAULT_SITES, HarmoniCa
from hgc_learn.predictors import BY_CODE
from hgc_learn.sampling import generate
from hgc_learn.training.effects import Choices
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule

Weights = dict[int, float]
"""Of a site's fresh values, by step."""


def used_values(module: RouterModule, gates: Gates) -> Callable[[str, int], tuple[Weights | None, Weights] | None]:
    """What a site gives at a step: its unguided half, None where only the guided one runs, and its guided half; None if
    it is not live."""
    draft = module.draft(gates)
    plan = module.setting.plan(draft)

    def used(site: str, step: int) -> tuple[Weights | None, Weights] | None:
        is_half = plan.steps[step].is_half
        if site in plan.steps[step].run:
            return None if is_half else {step: 1.0}, {step: 1.0}
        for load in plan.steps[step].load:
            if load.site == site:
                names = [parameter.name for parameter in BY_CODE[load.code].parameters]
                parameters = {name: draft.tensors[f"{site}/{name}"] for name in names}

                def weights(
                    sources: tuple[int, ...], code: str = load.code, parameters: dict[str, Tensor] = parameters
                ) -> Weights:
                    fill = BY_CODE[code].fill([step - j for j in sources], step, parameters)
                    return {j: float(c) for j, c in zip(sources, fill.coefficients, strict=False)}

                return None if is_half else weights(load.unguided), weights(load.guided)
        return None

    return used


@pytest.mark.parametrize("share", [1.0, 0.95, 0.7])
def test_training_path_equals_inference_path(module: RouterModule, batch: dict[str, Any], share: float) -> None:
    gates = random_gates(module, share, seed=int(100 * share))
    if share < 1:
        assert {"C", "-", "1", "f"} <= set("".join(module.draft(gates).sites.values()))
    inference = module.rollout(batch, module.draft(gates))
    module.forwards.set_gates(gates)
    module.forwards.install()
    training = generate(module.pipe, SAMPLING, batch, grad=True)
    module.forwards.uninstall()
    assert training.requires_grad
    torch.testing.assert_close(training.detach(), inference, rtol=0, atol=1e-5 * float(inference.abs().max()))


@pytest.mark.parametrize("half_steps", [[], [2], [1, 2, 3]])
def test_first_order_effects_are_those_of_a_small_change(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, half_steps: list[int]
) -> None:
    """Against autograd through used + epsilon * (what the plan of the other schedule says - used), written out."""
    gates = random_gates(module, 0.9, seed=1)
    gates.compute[:, ::2] = True  # computed more often than a predictor looks back
    gates.compute[:, module.router.sites.index("unet:eps")] = True
    guidance = gates.compute[:, module.router.sites.index("unet:guidance")]
    guidance[:] = True
    guidance[half_steps] = False
    forwards, sites = module.forwards, module.router.sites
    before = used_values(module, gates)
    changes = []
    for column, step in itertools.product(range(0, len(sites), 3), range(1, len(gates.compute))):
        if sites[column] != "unet:guidance" and before(sites[column], step):
            changes += [(step, column, is_flip) for is_flip in (True, False)]
    changes = random.Random(0).sample(changes, min(60, len(changes)))
    others = [used_values(module, changed(gates, step, column, is_flip=is_flip)) for step, column, is_flip in changes]
    epsilon = torch.zeros(len(changes), requires_grad=True)
    watch = forwards._watch

    def disturbed(used: Tensor, name: str, step: int) -> Tensor:
        value = watch(used, name, step)
        for index, other in enumerate(others):
            mine, after = before(name, step), other(name, step)
            if mine and after and mine != after:
                change = [halves(name, m or {}, a or {}) for m, a in zip(mine, after, strict=True)]
                num_unguided = len(value) // 2
                value = value + epsilon[index] * torch.cat([change[0][:num_unguided], change[1][num_unguided:]])
        return value

    def halves(name: str, mine: Weights, after: Weights) -> Tensor:
        fresh = forwards.fresh[name]
        start = torch.zeros_like(fresh[0])
        return sum(((after.get(j, 0) - mine.get(j, 0)) * fresh[j] for j in {**mine, **after}), start=start)

    monkeypatch.setattr(forwards, "_watch", disturbed)
    forwards.set_gates(gates)
    forwards.install()
    value = generate(module.pipe, SAMPLING, batch, grad=True).sin().sum()
    forwards.uninstall()
    (expected,) = torch.autograd.grad(value, epsilon, retain_graph=True)
    products = forwards.backward(value)
    flips, reach = Choices(forwards).by_choice([products], len(batch["text"]))
    for (step, column, is_flip), derivative in zip(changes, expected.tolist(), strict=True):
        found = (flips if is_flip else reach)[step, column]
        assert found.sum() == pytest.approx(derivative, rel=2e-3, abs=1e-4)
    assert expected.abs().gt(1e-3).sum() > 20
    assert len({is_flip for (*_, is_flip), d in zip(changes, expected.tolist(), strict=True) if abs(d) > 1e-3}) == 2
    forwards.forget()


def test_effects_predict_what_flips_do(deep_module: RouterModule, batch: dict[str, Any]) -> None:
    gates = random_gates(deep_module, 0.99, seed=2)
    deep_module.generator = torch.Generator().manual_seed(0)
    effects = deep_module.effects(batch, gates, num_directions=8)
    error = deep_module.rollout_errors(batch, gates)
    torch.testing.assert_close(effects.errors, error, rtol=1e-3, atol=0)
    predicted = effects.of_each_flip()
    actual = []
    for index in (chosen := predicted.abs().flatten().argsort(descending=True)[:200:16]):
        step, column = (int(i) for i in torch.unravel_index(index, predicted.shape))
        flipped = changed(gates, step, column)
        actual.append((deep_module.rollout_errors(batch, flipped) / error).log().mean())
    pair = torch.stack([predicted.flatten()[chosen].float(), torch.stack(actual)])
    assert (pair[0].sign() == pair[1].sign()).float().mean() > 0.8
    assert torch.corrcoef(pair)[0, 1] > 0.8


def test_gradient_checkpointing_keeps_less_and_changes_nothing(
    deep_module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(deep_module.hparams, "errors_of", "latents")  # what the VAE keeps is the same both ways
    gates = random_gates(deep_module, 0.8, seed=6)
    deep_module.teacher_latents(batch)
    results, kept = [], []
    for deep_module.forwards.gradient_checkpointing in (True, False):
        deep_module.generator = torch.Generator().manual_seed(0)
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(deep_module.effects(batch, gates, num_directions=1))
        kept.append(sum(storages.values()))
    assert torch.equal(results[0].flips, results[1].flips)
    assert torch.equal(results[0].reach, results[1].reach)
    assert results[0].flips.any()
    assert kept[0] < 0.6 * kept[1]


def test_errors_of_half_precision_models_are_measured_in_full(teacher: Path, batch: dict[str, Any]) -> None:
    sites = [*DEFAULT_SITES, "unet:guidance"]
    module = RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], sites=sites, dtype="bfloat16")
    gates = random_gates(module, 0.9, seed=1)
    effects = module.effects(batch, gates)
    assert effects.flips.any()
    for errors in (effects.errors, module.rollout_errors(batch, gates)):
        assert errors.dtype == torch.float32
        assert (errors != errors.bfloat16()).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_effects_on_the_uncached_trajectory_are_those_of_full_precision(
    teacher: Path, batch: dict[str, Any], dtype: str
) -> None:
    """A warm start goes by them: they are small beside the rounding of pictures in half precision."""

    def measured(dtype: str) -> Tensor:
        module = RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], dtype=dtype, errors_of="latents")
        module.generator = torch.Generator().manual_seed(0)
        return module.effects(batch, Gates.full(*module.router.logits.shape)).of_each_flip()[1:].flatten()

    full, half = measured("float32"), measured(dtype)
    assert spearmanr(full, half).statistic > 0.95
    assert (full - half).abs().median() < 0.5


def test_a_controlnet_that_pools_is_given_the_guided_half_alone(
    teacher: Path, tmp_path: Path, batch: dict[str, Any]
) -> None:
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    config = model / "controlnet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"global_pool_conditions": True}))
    sites = ["*:control", "unet:guidance", "unet:eps"]
    module = RouterModule(str(model), SAMPLING, budgets=[BUDGET], sites=sites)
    for seed in range(4):
        gates = random_gates(module, 0.6, seed=seed)
        module.forwards.set_gates(gates)
        module.forwards.install()
        try:
            trained = generate(module.pipe, module.sampling, batch)
        finally:
            module.forwards.uninstall()
        inference = module.rollout(batch, module.draft(gates))
        torch.testing.assert_close(trained, inference, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"pools its residuals.*Train with the objective Rollout"):
        RouterModule(str(model), SAMPLING, budgets=[BUDGET], sites=["*:control"], objective=HarmoniCa())
