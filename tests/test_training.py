"""The router, its training and its export, on a tiny pipeline with real prompts and control images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import LightningDataModule
from test_data import write_folder
from torch.utils.data import DataLoader, IterableDataset
from training_fixtures import BUDGET, SAMPLING, changed, fit, random_gates

from hgc_learn.__main__ import guarded, main
from hgc_learn.evaluation import decode
from hgc_learn.export.export import export, load_run, measure_fidelity
from hgc_learn.export.learning import NOTHING, Learning
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.objectives import HarmoniCa, Rollout
from hgc_learn.plan import compile_plan
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


def test_the_price_is_the_lowest_that_keeps_to_the_budget(module: RouterModule) -> None:
    router, kept_before = module.router, 0.0
    router.logits.data.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(0)))
    for budget in (0.3, 0.5, 0.8, 1.0):
        price = router.price(budget)
        kept = router.kept(router.logits >= price)
        assert kept_before <= kept <= budget
        below = router.logits[1:][router.logits[1:] < price]
        assert not len(below) or router.kept(router.logits >= below.max()) > budget
        kept_before = kept
    assert kept_before == 1


def test_kept_is_what_the_plan_says(module: RouterModule) -> None:
    gates = random_gates(module, 0.9, seed=3)
    plan = module.setting.plan(module.draft(gates))
    full = compile_plan(module.graph, {}, len(gates.compute))
    share = plan.macs(module.costs) / full.macs(module.costs)
    assert module.router.kept(gates.compute) == pytest.approx(share, rel=1e-6)


def test_dead_gates_make_no_difference(module: RouterModule) -> None:
    gates = random_gates(module, 0.7, seed=4)
    dead = module.router.dead(gates.compute)
    assert 0.02 < dead.float().mean() < 0.9
    other = Gates(gates.compute ^ dead, gates.reach)
    assert module.setting.plan(module.draft(other)) == module.setting.plan(module.draft(gates))
    alive = changed(gates, *(int(i) for i in (~dead[1:]).nonzero()[-1] + torch.tensor([1, 0])))
    assert module.setting.plan(module.draft(alive)) != module.setting.plan(module.draft(gates))


def test_samples_that_differ_in_their_control_image_alone_have_targets_of_their_own(
    module: RouterModule, batch: dict[str, Any]
) -> None:
    other = batch | {"conditioning_image": 1 - batch["conditioning_image"]}
    first = module.teacher_latents(batch)
    assert torch.equal(module.teacher_latents(batch), first)
    assert not torch.equal(module.teacher_latents(other), first)


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.5])
def test_impossible_budget_is_refused(module: RouterModule, budget: float) -> None:
    with pytest.raises(ValueError, match="fraction of full MACs"):
        module.router.price(budget)


def test_the_least_budget_can_be_met(module: RouterModule) -> None:
    least = module.router.least_budget
    assert module.router.kept(module.gates(least).compute) == least


def test_gradient_does_not_move_the_expected_macs(module: RouterModule, batch: dict[str, Any]) -> None:
    module.generator = torch.Generator().manual_seed(0)
    assert isinstance(module.objective, Rollout)
    logs = module.objective.gradients(module, batch, BUDGET)
    gradient, reach_gradient = module.router.logits.grad, module.router.reach.grad
    assert gradient is not None
    assert reach_gradient is not None
    for values in (gradient, reach_gradient):
        assert values.isfinite().all()
        assert values.abs().sum() > 0
    assert abs(float(gradient.sum())) < 1e-3 * float(gradient.abs().sum())
    assert BUDGET - 0.1 < logs["sampled_macs"] <= BUDGET


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            lambda: {"sampling": SamplingConfig(num_inference_steps=0)},
            "num_inference_steps is 0; it must be",
        ),
        (lambda: {"budgets": []}, "at least one of each is needed"),
        (lambda: {"sites": []}, "at least one of each is needed"),
        (lambda: {"objective": Rollout(final_temperature=0)}, "final_temperature is 0"),
        (lambda: {"objective": Rollout(num_directions=-1)}, "num_directions -1"),
        (lambda: {"objective": HarmoniCa(num_weight_batches=0)}, "num_weight_batches 0"),
    ],
)
def test_wrong_settings_are_refused(settings: Callable[[], dict[str, Any]], message: str, teacher: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RouterModule(**{"model": str(teacher), "sampling": SAMPLING} | settings())


def test_saturated_pictures_keep_their_gradient(module: RouterModule) -> None:
    latents = 40 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = module.outcome(latents.requires_grad_())
    saturated = (pictures < 0) | (pictures > 1)
    assert saturated.any()
    torch.testing.assert_close(pictures.clamp(0, 1), decode(module.pipe, latents))
    (gradient,) = torch.autograd.grad(pictures[saturated].sum(), latents)
    assert gradient.any()


def test_export_writes_a_schedule_that_runs(
    teacher: Path, tmp_path: Path, module: RouterModule, batch: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_path = fit(teacher, tmp_path, 1)
    _, data = load_run(ckpt_path)
    (judges,) = data.val_dataloader()
    full = generate(module.pipe, SAMPLING, judges, output_type="pt")
    for budget in (0.4, 0.7):
        output = tmp_path / str(budget)
        path = export(
            ckpt_path,
            output,
            budget,
            Learning(learning_samples=2, reorder_trials=1, specialise_updates=1, fill_updates=2),
        )
        schedule = HGCSchedule.load(path)
        assert schedule.macs["cached"] <= budget * schedule.macs["full"]
        assert schedule.producer["settings"]["budget"] == budget
        assert schedule.fidelity["num_samples"] == 2
        assert (output / "hgc_schedule.png").stat().st_size > 1000
        with apply_schedule(module.pipe, path) as handle:
            generate(module.pipe, SAMPLING, batch)
            assert handle.stats()["macs_cached"] == schedule.macs["cached"]
            errors = (generate(module.pipe, SAMPLING, judges, output_type="pt") - full).square().flatten(1).mean(1)
        assert schedule.fidelity["psnr_db"] == pytest.approx(float((-10 * errors.log10()).mean()), abs=0.01)
    with pytest.raises(ValueError, match=r"0\.7/hgc_schedule\.json is the schedule of another budget, 0\.7\."):
        export(ckpt_path, output, 0.4)
    assert main(["inspect", str(path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_path", "absent.ckpt", "--output", "out"], "absent.ckpt: no such checkpoint"),
        (["--ckpt_path", __file__, "--output", "out"], "not a checkpoint written by"),
        (["--ckpt_path", "any", "--output", "out", "--fill_updates=-1"], "fill_updates is -1; it must be 0"),
        (
            ["--ckpt_path", "any", "--output", "out", "--specialise_updates=-2"],
            "specialise_updates is -2; it must be 0",
        ),
    ],
)
def test_export_refuses_clearly(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_export_misses_its_folder_at_once_and_does_without_validation(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_path = fit(teacher, tmp_path, 1)
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(FileExistsError, match="taken"):
        export(ckpt_path, taken)
    data = "--data=ControlDataModule", f"--data.dataset={write_folder(tmp_path / 'data')}", "--data.num_val=0"
    sizes = "--data.height=64", "--data.width=64"
    ckpt_path = fit(teacher, tmp_path / "b", 1, *data, *sizes)
    few = replace(NOTHING, learning_samples=2)
    of_scenes = fit(teacher, tmp_path / "c", 1, "--data.num_val=0")
    for name, path in (("out", ckpt_path), ("scenes", of_scenes)):
        assert HGCSchedule.load(export(path, tmp_path / name, learning=few)).fidelity == {}
        assert "nothing has been measured" in capsys.readouterr().out
    module, _ = load_run(of_scenes)
    assert measure_fidelity(module, LightningDataModule(), module.draft(module.gates(0.9))) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.model=nowhere", "model: 'nowhere' is neither a folder here nor a hub id"),
        ("--model.sampling.scheduler=Nonesuch", "no scheduler named 'Nonesuch'"),
        ("--model.sampling.scheduler=UNet2DModel", "no scheduler named 'UNet2DModel'"),
        (
            "--model.sampling.scheduler=EDMEulerScheduler",
            "scheduler: EDMEulerScheduler cannot take the place of the pipeline's UniPCMultistepScheduler",
        ),
        ("--model.budgets=[0.01]", "A budget of 0.01 cannot be met"),
        ("--model.sites=[nothing]", "No site matches 'nothing'"),
        ("--trainer.precision=bf16-mixed", "trainer.precision is bf16-mixed; the router learns in 32-true"),
        ("--trainer.gradient_clip_val=1", "clip"),
        ("--trainer.max_steps=-1 --trainer.max_epochs=-1", "trainer.max_epochs is -1"),
        ("--data.num_train=-1", "num_train is -1; it must be at least 0"),
        (
            "--model.sampling.guidance_scale=1 --model.sites=[unet:guidance]",
            "sites: unet:guidance is the difference that guidance makes",
        ),
        ("--model.controlnet={teacher}/controlnet", "has a ControlNet already, and"),
        ("--trainer.max_time=00:00:10:00", "trainer.max_time would stop before learning rate and temperature"),
        (
            "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val_loss",
            "trainer.callbacks: EarlyStopping would stop before learning rate and temperature",
        ),
        ("--trainer.overfit_batches=1", "Set limit_train_batches, or data.num_train"),
        (
            "--trainer.limit_train_batches=3 --trainer.max_epochs=4 --trainer.max_steps=9",
            "data make 2 batches on each process: 8 updates instead of 9. Set limit_train_batches to 2",
        ),
        ("--model.sampling.guidance_scale=.nan", "guidance_scale is nan; it must be a finite number"),
        ("--model.sampling.controlnet_conditioning_scale=.inf", "controlnet_conditioning_scale is inf"),
    ],
)
def test_training_refuses_in_one_line(
    teacher: Path, tmp_path: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: fit(teacher, tmp_path, 1, *arguments.format(teacher=teacher).split())) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_data_without_a_length_are_refused(module: RouterModule, batch: dict[str, Any], tmp_path: Path) -> None:
    class Endless(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return itertools.repeat(batch)

    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.raises(ValueError, match="do not say how many samples they have"):
        trainer.fit(module, DataLoader(Endless(), batch_size=None), DataLoader(Endless(), batch_size=None))


def test_one_model_call_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match="num_inference_steps gives one model call"):
        RouterModule(str(teacher), replace(SAMPLING, num_inference_steps=1), budgets=[1.0])
