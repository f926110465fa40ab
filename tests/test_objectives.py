"""The objectives and the policies that read their checkpoints, on a tiny pipeline with real prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from training_fixtures import SAMPLING, fit

from hgc_learn.data import SceneDataModule
from hgc_learn.inference import apply_schedule
from hgc_learn.objectives import L2C, HarmoniCa, Rollout
from hgc_learn.objectives.blend import BlendedForwards
from hgc_learn.objectives.l2c import add_noise, ddim_step
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig, generate, load_pipeline
from hgc_learn.setting import Setting
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule

BUDGETS = (0.45, 0.6, 0.8)
ARGUMENTS = {  # by policy: of a training of a few steps
    "learned": [],
    "l2c": ["--model.objective=L2C", "--model.objective.intervals=[2,3]", "--model.budgets=[0.7]"],
    "harmonica": ["--model.objective=HarmoniCa"],
}


@pytest.fixture(scope="module")
def module(teacher: Path) -> RouterModule:
    return RouterModule(str(teacher), SAMPLING, objective=HarmoniCa())


@pytest.fixture(scope="module")
def forwards(module: RouterModule) -> BlendedForwards:
    assert isinstance(module.objective, HarmoniCa)
    return module.objective.forwards


# The blend


def test_blend_of_fresh_values_alone_is_the_pipeline(
    module: RouterModule, forwards: BlendedForwards, batch: dict[str, Any]
) -> None:
    ones = torch.ones(len(module.router.sites))

    def visit_step(step: int) -> Tensor:
        full = forwards.full(keep=step == 0)
        blended = full if step == 0 else forwards.blend(ones)
        torch.testing.assert_close(blended, full, rtol=0, atol=0)
        return blended

    latents = forwards.follow(SAMPLING, batch, visit_step)
    torch.testing.assert_close(latents, generate(module.pipe, SAMPLING, batch), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_hard_blend_is_the_inference_runtime(
    module: RouterModule, forwards: BlendedForwards, batch: dict[str, Any], share: float
) -> None:
    """Gates inside of what is reused included: what is dead is not kept anew."""
    generator = torch.Generator().manual_seed(int(100 * share))
    gates = module.router.gates(torch.rand(module.router.logits.shape, generator=generator) < share)
    compute = gates.compute

    def visit_step(step: int) -> Tensor:
        return forwards.blend(compute[step].float(), compute=compute[step]) if step else forwards.full(keep=True)

    latents = forwards.follow(SAMPLING, batch, visit_step)
    torch.testing.assert_close(latents, module.rollout(batch, module.draft(gates)), rtol=0, atol=0)


def test_what_is_kept_is_the_blend(module: RouterModule, forwards: BlendedForwards, batch: dict[str, Any]) -> None:
    """Of the first site in the models' order, before which nothing is blended."""
    first = next(name for name in forwards.graph.nodes if name in forwards.columns)
    everything = torch.ones(len(module.router.sites))

    def visit_step(step: int) -> Tensor:
        before = dict(forwards.cache)
        full = forwards.full(keep=True)
        if step:
            fresh, forwards.cache = forwards.cache[first], dict(before)
            assert fresh.ne(before[first]).any()
            forwards.blend(0.25 * everything, compute=everything.bool())
            torch.testing.assert_close(forwards.cache[first], 0.25 * fresh + 0.75 * before[first])
        return full

    forwards.follow(SAMPLING, batch, visit_step)


def test_gradient_of_the_blended_loss_is_that_of_finite_differences(
    module: RouterModule, forwards: BlendedForwards, batch: dict[str, Any]
) -> None:
    """In double precision, along random directions."""
    module.pipe.to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    pairs = []

    def visit_step(step: int) -> Tensor:
        full = forwards.full(keep=step == 0)
        if step != 2:
            return full
        betas = torch.rand(len(module.router.sites), generator=generator).double().requires_grad_()

        def error(shift: Tensor | float) -> Tensor:
            return (forwards.blend(betas + shift) - full).square().mean()

        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(error(0.0), betas)
        for _ in range(3):
            direction = torch.randn(len(betas), generator=generator).double()
            slope = (error(1e-4 * direction) - error(-1e-4 * direction)) / 2e-4
            pairs.append(torch.stack([slope.detach(), gradient @ direction]))
        return full

    try:
        forwards.follow(SAMPLING, {**batch, "conditioning_image": batch["conditioning_image"].double()}, visit_step)
    finally:
        module.pipe.to(torch.float32)
    differences, gradients = torch.stack(pairs).unbind(1)
    assert gradients.abs().min() > 0
    torch.testing.assert_close(gradients, differences, rtol=1e-4, atol=1e-9)


# Learning-to-Cache


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_that_of_diffusers(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    latents, prediction = torch.randn(2, 2, 4, 8, 8, generator=generator).unbind()
    for start, end in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        expected = scheduler.step(prediction, start, latents).prev_sample
        actual = ddim_step(scheduler, latents, prediction, int(start), int(end))
        torch.testing.assert_close(actual, expected)
    expected = scheduler.add_noise(latents, prediction, torch.tensor([401, 401]))
    torch.testing.assert_close(add_noise(scheduler, latents, prediction, 401), expected)


@pytest.mark.parametrize("intervals", [[], [1], [2, 1]])
def test_l2c_needs_steps_to_route(intervals: list[int]) -> None:
    with pytest.raises(ValueError, match="there are steps to route from 2 on"):
        L2C(intervals=intervals)


# HarmoniCa


def test_weight_of_a_step_is_the_error_that_its_cache_causes(module: RouterModule, batch: dict[str, Any]) -> None:
    """Gates that are all but hard; and a step that computes a little more of everything weighs a little less."""
    objective, router = module.objective, module.router
    assert isinstance(objective, HarmoniCa)
    computes = torch.rand(router.logits.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    router.logits.data.copy_(torch.where(computes, 40.0, -40.0))
    objective.measure_weights(module, [batch])
    target = module.teacher_latents(batch)
    errors = []
    for step in (2, 3):
        compute = torch.ones_like(computes)
        compute[step] = computes[step]
        latents = module.rollout(batch, module.draft(router.gates(compute)))
        errors.append((latents - target).square().mean())
    assert objective.weights[1:].mean() == pytest.approx(1.0)
    torch.testing.assert_close(objective.weights[3] / objective.weights[2], errors[1] / errors[0])
    ratios = []
    for logit in (1.0, 1.1):
        router.logits.data[3] = logit
        objective.measure_weights(module, [batch])
        ratios.append(float(objective.weights[3] / objective.weights[2]))
    assert 0.7 * ratios[0] < ratios[1] < ratios[0]


# All of them


class Losses(L.Callback):
    """Collects the loss of every training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("kind", [L2C, HarmoniCa])
def test_training_lowers_the_loss(kind: type[L2C | HarmoniCa], teacher: Path) -> None:
    objective = kind(penalty=0.0, learning_rate=0.3)
    module = RouterModule(str(teacher), SAMPLING, objective=objective, budgets=[0.8])
    losses = Losses()
    L.Trainer(
        accelerator="cpu", max_epochs=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[losses],
    ).fit(module, SceneDataModule(num_train=2, num_val=2, batch_size=2))  # fmt: skip
    assert len(losses.values) == 12
    assert sum(losses.values[-3:]) < 0.7 * sum(losses.values[:3])


def train(module: RouterModule, num_updates: int) -> None:
    L.Trainer(
        accelerator="cpu", max_steps=num_updates, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    ).fit(module, SceneDataModule(num_train=2, num_val=2, batch_size=2))  # fmt: skip


@pytest.mark.parametrize("kind", [L2C, HarmoniCa])
def test_a_penalty_closes_gates(kind: type[L2C | HarmoniCa], teacher: Path) -> None:
    betas = []
    for penalty in (0.0, 1e3):
        objective = kind(penalty=penalty, learning_rate=0.3)
        module = RouterModule(str(teacher), SAMPLING, objective=objective, budgets=[0.8])
        train(module, 3)
        betas.append(float(module.router.logits.data[1].sigmoid().mean()))
    assert betas[1] < betas[0] - 0.1


def test_l2c_takes_turns_with_its_intervals(teacher: Path) -> None:
    routed = []
    for num_updates in (1, 2):
        module = RouterModule(str(teacher), SAMPLING, objective=L2C(intervals=[2, 3]), budgets=[0.8])
        train(module, num_updates)
        routed.append(module.router.logits.data.any(1).nonzero()[:, 0].tolist())
    assert routed == [[1, 3], [1, 2, 3, 4]]  # step 3 is full in the second update


def test_rollouts_take_turns_with_budgets_and_cool_down(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    gradients = Rollout.gradients

    def watched(self: Rollout, module: RouterModule, batch: dict[str, Any], budget: float) -> dict[str, Any]:
        seen.append((budget, module.router.temperature))
        return gradients(self, module, batch, budget)

    monkeypatch.setattr(Rollout, "gradients", watched)
    objective = Rollout(final_temperature=0.0625, num_warm_start_batches=0)
    train(RouterModule(str(teacher), SAMPLING, objective=objective, budgets=[0.8, 0.4]), 4)
    budgets, temperatures = zip(*seen, strict=True)
    assert budgets == (0.8, 0.4, 0.8, 0.4)
    assert temperatures == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_a_warm_start_holds_dear_what_does_much_for_little(teacher: Path, batch: dict[str, Any]) -> None:
    module = RouterModule(str(teacher), SAMPLING, objective=Rollout(), budgets=[0.8])
    assert isinstance(module.objective, Rollout)
    module.objective.warm_start(module, [batch])
    module.seed(0)
    effects = module.effects(batch, Gates.full(*module.router.logits.shape)).of_each_flip()
    expected = (effects - module.router.savings().log())[1:]
    logits = module.router.logits.data[1:]
    expected = 2 * (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(logits, expected.to(logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [L2C, HarmoniCa])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ["unet:eps", "unet:guidance"]}, "unet:guidance is never blended"),
        ({"dtype": "float16", "errors_of": "latents"}, "gradients vanish. Use bfloat16 or float32"),
        ({"gradient_checkpointing": True}, "keeps the graph of one step only"),
    ],
)
def test_settings_that_a_blend_cannot_do_with_are_refused(
    kind: type[L2C | HarmoniCa], settings: dict[str, Any], message: str, teacher: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RouterModule(str(teacher), SAMPLING, objective=kind(), budgets=[0.8], **settings)


def test_blends_follow_the_pipeline_that_the_module_is_given(teacher: Path) -> None:
    module = RouterModule(str(teacher), SAMPLING, objective=HarmoniCa())
    other = load_pipeline(str(teacher), SAMPLING)
    module.use_pipeline(other)
    assert isinstance(module.objective, HarmoniCa)
    assert module.objective.forwards.pipe is module.forwards.pipe is other


def test_noise_levels_are_not_those_of_half_precision() -> None:
    """1 - alpha of the first timestep is 0.00085, and alpha is 1 in bfloat16."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = add_noise(scheduler, torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), 0)
    assert float(noisy) == pytest.approx(0.00085**0.5, rel=0.01)


@pytest.fixture(scope="module")
def checkpoints(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {policy: str(fit(teacher, folder / policy, 2, *more)) for policy, more in ARGUMENTS.items()}


@pytest.fixture(scope="module")
def setting(teacher: Path, batch: dict[str, Any]) -> Setting:
    return Setting.of_pipeline(load_pipeline(str(teacher), SAMPLING), SAMPLING, [batch])


@pytest.mark.parametrize("policy", list(ARGUMENTS))
def test_drafts_keep_to_the_budget_and_run(
    policy: str, checkpoints: dict[str, str], setting: Setting, batch: dict[str, Any]
) -> None:
    knobs: dict[str, Any] = {"ckpt_path": checkpoints[policy]}
    if policy == "learned":
        knobs |= {"learning_samples": 2, "reorder_trials": 1, "specialise_updates": 1, "fill_updates": 2}
    drafts = [POLICIES[policy].write(setting, budget=budget, **knobs) for budget in BUDGETS]
    kept = [setting.kept(draft) for draft in drafts]
    assert all(0.5 * budget < k <= budget for budget, k in zip(BUDGETS, kept, strict=True))
    assert kept == sorted(kept)
    schedule = POLICIES[policy].schedule(setting, budget=BUDGETS[0], **knobs)
    first = {site: row for site, row in drafts[0].sites.items() if set(row) != {"C"}}
    assert schedule.sites == first  # written again, it is the same
    with apply_schedule(setting.pipe, schedule) as handle:
        assert generate(setting.pipe, SAMPLING, batch).isfinite().all()
        assert handle.stats()["steps_refreshed"] == 0


@pytest.mark.parametrize(("interval", "full"), [(2, [0, 2, 4]), (3, [0, 3]), (None, [0, 2, 4])])
def test_l2c_computes_its_full_steps(
    interval: int | None, full: list[int], checkpoints: dict[str, str], setting: Setting
) -> None:
    draft = POLICIES["l2c"].write(setting, ckpt_path=checkpoints["l2c"], budget=0.8, interval=interval)
    rows = list(draft.sites.values())
    assert all(row[step] == "C" for row in rows for step in full)
    reused = {step for row in rows for step, code in enumerate(row) if code != "C"}
    assert reused == set(range(5)) - set(full)


@pytest.mark.parametrize(
    ("policy", "knobs", "message"),
    [
        ("learned", {}, "learned needs ckpt_path"),
        ("l2c", {"ckpt_path": "absent.ckpt"}, "absent.ckpt: no such checkpoint"),
        ("harmonica", {"ckpt_path": "l2c"}, "trained for the policy l2c, not for harmonica"),
        ("l2c", {"ckpt_path": "l2c", "interval": 4}, r"this router was trained for \[2, 3\]"),
        ("l2c", {"ckpt_path": "l2c", "budget": 0.4}, "A budget of 0.4 cannot be met: with every step in 3 full"),
        ("harmonica", {"ckpt_path": "harmonica", "budget": 0.1}, "A budget of 0.1 cannot be met"),
    ],
)
def test_what_cannot_be_written_is_refused(
    policy: str, knobs: dict[str, Any], message: str, checkpoints: dict[str, str], setting: Setting
) -> None:
    path = knobs.get("ckpt_path", "")
    with pytest.raises(ValueError, match=message):
        POLICIES[policy].write(setting, **{**knobs, "ckpt_path": checkpoints.get(path, path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda models: models.unet.conv_in.weight.data.mul_(2), "trained for another model"),
        (lambda models: None, "trained for SamplingConfig"),
    ],
)
def test_checkpoint_of_another_setting_is_refused(
    change: Callable[[Any], None], message: str, teacher: Path, checkpoints: dict[str, str]
) -> None:
    pipe = load_pipeline(str(teacher), SAMPLING)
    change(pipe)
    steps = 5 if "model" in message else 6
    setting = Setting.of_pipeline(pipe, SamplingConfig(steps, SAMPLING.guidance_scale, 64, 64))
    with pytest.raises(ValueError, match=message):
        POLICIES["learned"].write(setting, ckpt_path=checkpoints["learned"])
