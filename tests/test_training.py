"""The router, its training and its export, on a tiny pipeline with real prompts and control images."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import LightningDataModule
from safetensors.torch import save
from test_data import write_folder
from training_fixtures import BUDGET, SAMPLING, changed, fit, fit_arguments, random_schedule

from hgc_learn.__main__ import guarded, main
from hgc_learn.evaluation import decode
from hgc_learn.export import export, load_run, measure_fidelity
from hgc_learn.hard import HardSchedule
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.learning import Learning
from hgc_learn.lightning_cli import train
from hgc_learn.objectives import HarmoniCa, Rollout
from hgc_learn.plan import compile_plan
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.training import RouterModule


def test_the_price_is_the_lowest_that_keeps_to_the_budget(module: RouterModule) -> None:
    router, kept_before = module.router, 0.0
    router.logits.data.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(0)))
    for budget in (0.3, 0.5, 0.8, 1.0):
        price = router.price(budget)
        kept = router.kept(router.threshold(budget).compute)
        assert kept_before <= kept <= budget
        assert kept == router.kept(router.logits >= price)
        below = router.logits[1:][router.logits[1:] < price]
        assert not len(below) or router.kept(router.logits >= below.max()) > budget
        kept_before = kept
    assert kept_before == 1


def test_kept_is_what_the_plan_says(module: RouterModule) -> None:
    schedule = random_schedule(module, 0.9, seed=3)
    plan = module.setting.plan(module.draft(schedule))
    full = compile_plan(module.graph, {}, len(schedule.compute))
    share = plan.macs(module.costs) / full.macs(module.costs)
    assert module.router.kept(schedule.compute) == pytest.approx(share, rel=1e-6)


def test_dead_gates_make_no_difference(module: RouterModule) -> None:
    schedule = random_schedule(module, 0.7, seed=4)
    dead = module.router.dead(schedule.compute)
    assert 0.02 < dead.float().mean() < 0.9
    other = HardSchedule(schedule.compute ^ dead, schedule.reach)
    assert module.setting.plan(module.draft(other)) == module.setting.plan(module.draft(schedule))
    alive = changed(schedule, *(int(i) for i in (~dead[1:]).nonzero()[-1] + torch.tensor([1, 0])))
    assert module.setting.plan(module.draft(alive)) != module.setting.plan(module.draft(schedule))


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
    assert module.router.kept(module.hard_schedule(least).compute) == least


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


pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:You are trying to `self.log",
)


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    training_step = RouterModule.training_step

    def interrupted(self: RouterModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step == step:
            raise KeyboardInterrupt
        training_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RouterModule, "training_step", interrupted)
        yield


@pytest.mark.parametrize(
    ("objective", "buffers"),
    [
        (["Rollout", "--model.objective.num_warm_start_batches=1"], {"warm_started"}),
        (["L2C", "--model.objective.intervals=[2,3]", "--model.budgets=[0.7]"], set()),
        (["HarmoniCa", "--model.objective.weight_interval=1"], {"weights", "weights_epoch"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_interrupted_training_resumes_to_the_same_router(
    objective: list[str], buffers: set[str], teacher: Path, tmp_path: Path
) -> None:
    more = [f"--model.objective={objective[0]}", *objective[1:]]
    whole = torch.load(fit(teacher, tmp_path / "whole", 4, *more), weights_only=True)
    names = {"router.logits", "router.reach", *(f"objective.{name}" for name in buffers)}
    assert set(whole["state_dict"]) == names  # no frozen model
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))

    with interrupted_at(3):
        fit(teacher, tmp_path / "parts", 4, *more)
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 3
    resumed = torch.load(fit(teacher, tmp_path / "parts", 4, *more, f"--ckpt_path={ckpt_path}"), weights_only=True)
    assert resumed["global_step"] == 4
    for name in names:
        torch.testing.assert_close(resumed["state_dict"][name], whole["state_dict"][name], rtol=0, atol=0)


def test_a_resumed_run_goes_on_where_epochs_end_early(teacher: Path, tmp_path: Path) -> None:
    """Four batches, of which an epoch takes three: after the fourth step one of the second epoch is done."""
    more = ["--data.batch_size=1", "--trainer.limit_train_batches=3"]
    whole = torch.load(fit(teacher, tmp_path / "whole", 6, *more), weights_only=True)
    with interrupted_at(4):
        fit(teacher, tmp_path / "parts", 6, *more)
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    resumed = torch.load(fit(teacher, tmp_path / "parts", 6, *more, f"--ckpt_path={ckpt_path}"), weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    assert torch.equal(resumed["state_dict"]["router.logits"], whole["state_dict"]["router.logits"])


def test_epochs_may_have_another_length_when_resumed_from_the_end_of_one(teacher: Path, tmp_path: Path) -> None:
    """Four batches of one sample an epoch, then two of two: what is left of the training is what the epochs say."""
    more = ["--trainer.max_epochs=4", "--trainer.max_steps=-1"]
    seen: list[float] = []

    def fit_and_watch(*arguments: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            update = RouterModule.update_router
            patch.setattr(RouterModule, "update_router", lambda self, lr: (seen.append(lr), update(self, lr)))
            return fit(teacher, tmp_path, -1, *more, *arguments)

    with interrupted_at(4):  # the first step of the second epoch
        fit_and_watch("--data.batch_size=1")
    ckpt_path = tmp_path / "checkpoints" / "last.ckpt"
    fit_and_watch("--data.batch_size=2", f"--ckpt_path={ckpt_path}")
    done = [i / 16 for i in range(4)] + [i / 8 for i in range(2, 8)]
    assert seen == pytest.approx([0.1 * (1 - share) for share in done])

    with interrupted_at(2):
        fit_and_watch("--data.batch_size=1")
    before = ckpt_path.read_bytes()
    for others in (["--data.batch_size=2"], ["--data.batch_size=2", "--data.num_train=8"]):  # of which is as long
        with pytest.raises(ValueError, match="after 2 of the 4 batches of an epoch, of 4 samples with batch_size 1 on"):
            fit_and_watch(*others, f"--ckpt_path={ckpt_path}")
        assert ckpt_path.read_bytes() == before


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
    for budget in (0.4, 0.7):
        output = tmp_path / str(budget)
        path = export(ckpt_path, output, budget, Learning(learning_samples=2, specialise_updates=1, fill_updates=2))
        schedule = HGCSchedule.load(path)
        assert schedule.macs["cached"] <= budget * schedule.macs["full"]
        assert schedule.producer["settings"]["budget"] == budget
        assert schedule.fidelity["num_samples"] == 2
        assert (output / "hgc_schedule.png").stat().st_size > 1000
        with apply_schedule(module.pipe, path) as handle:
            generate(module.pipe, SAMPLING, batch)
            assert handle.stats()["macs_cached"] == schedule.macs["cached"]
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
    few = Learning(learning_samples=2, specialise_updates=0, fill_updates=0)
    of_scenes = fit(teacher, tmp_path / "c", 1, "--data.num_val=0")
    for name, path in (("out", ckpt_path), ("scenes", of_scenes)):
        assert HGCSchedule.load(export(path, tmp_path / name, learning=few)).fidelity == {}
        assert "nothing has been measured" in capsys.readouterr().out
    module, _ = load_run(of_scenes)
    assert measure_fidelity(module, LightningDataModule(), module.draft(module.hard_schedule(0.9))) == {}


def test_what_is_asked_for_holds_on_resuming(teacher: Path, tmp_path: Path) -> None:
    """Lightning would take the checkpoint's settings without a word."""
    ckpt_path = fit(teacher, tmp_path, 1)
    fit(
        teacher, tmp_path, 2, f"--ckpt_path={ckpt_path}", "--model.gradient_checkpointing=true", "--model.budgets=[0.7]"
    )
    checkpoint = torch.load(ckpt_path, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["hyper_parameters"]["gradient_checkpointing"] is True
    assert checkpoint["hyper_parameters"]["budgets"] == [0.7]
    for other in ("--model.sampling.num_inference_steps=4", "--model.sites=[unet:eps]", "--model.objective=HarmoniCa"):
        with pytest.raises(ValueError, match="ckpt_path: the router was trained with"):
            fit(teacher, tmp_path, 3, f"--ckpt_path={ckpt_path}", other)


def test_a_new_run_keeps_the_checkpoint_that_was_there(teacher: Path, tmp_path: Path) -> None:
    ckpt_path = fit(teacher, tmp_path, 3)
    for num_steps in (2, 1):
        assert fit(teacher, tmp_path, num_steps) == ckpt_path
    names = "last.ckpt", "previous-1.ckpt", "previous.ckpt"
    steps = [torch.load(ckpt_path.with_name(name), weights_only=True)["global_step"] for name in names]
    assert steps == [1, 2, 3]
    kept = ckpt_path.with_name("previous.ckpt")  # going on from another run than that of the folder
    fit(teacher, tmp_path, 4, f"--ckpt_path={kept}")
    assert [path.name for path in sorted(ckpt_path.parent.iterdir())] == [
        names[0],
        names[1],
        "previous-2.ckpt",
        names[2],
    ]
    steps = [
        torch.load(ckpt_path.with_name(name), weights_only=True)["global_step"]
        for name in ("last.ckpt", "previous-2.ckpt")
    ]
    assert steps == [4, 1]
    fit(teacher, tmp_path, 5, f"--ckpt_path={ckpt_path}")
    assert len([*ckpt_path.parent.iterdir()]) == 4


def test_a_new_run_keeps_every_checkpoint_that_was_there(teacher: Path, tmp_path: Path) -> None:
    more = ["--checkpoint.save_last=true", "--checkpoint.filename={step}", "--checkpoint.save_top_k=-1"]
    for num_steps in (2, 1):
        last = fit(teacher, tmp_path, num_steps, *more)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in last.parent.iterdir()}
    assert kept == {"step=2.ckpt": 2, "step=1.ckpt": 1, "last.ckpt": 1, "previous.ckpt": 2}


def test_a_router_of_an_earlier_version_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It held two weights of every gate."""
    ckpt_path = fit(teacher, tmp_path, 1)
    checkpoint = torch.load(ckpt_path, weights_only=True)
    reach = checkpoint["state_dict"].pop("router.reach")
    checkpoint["state_dict"]["router.weights"] = torch.stack([torch.ones_like(reach), reach])
    torch.save(checkpoint, ckpt_path)
    assert guarded(lambda: fit(teacher, tmp_path, 2, f"--ckpt_path={ckpt_path}")) == 2
    assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("its router is one of an earlier version of hgc_learn") == 2


def test_a_router_stays_with_its_models(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("trained"))
    ckpt_path = fit(model, tmp_path / "run", 1)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.conv_out.weight.data *= 2
    unet.save_pretrained(model / "unet")
    assert guarded(lambda: fit(model, tmp_path / "run", 2, f"--ckpt_path={ckpt_path}")) == 2
    assert "ckpt_path: the router was trained for another model" in capsys.readouterr().err
    assert main(["export", "--ckpt_path", str(ckpt_path), "--output", str(tmp_path / "out")]) == 2
    assert "last.ckpt: the router was trained for another model" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["text", "half", "tensors"])
def test_files_that_are_no_checkpoint_are_refused_by_name(
    teacher: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = tmp_path / "some.ckpt", io.BytesIO()
    torch.save({"config": "a: 1", "state_dict": {"router.logits": torch.zeros(100)}}, whole)
    contents = {"text": b"no checkpoint", "half": whole.getvalue()[: len(whole.getvalue()) // 2]}
    path.write_bytes(contents.get(content) or save({"a": torch.zeros(3)}))
    assert main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "out")]) == 2
    arguments = [*fit_arguments(teacher, tmp_path, 1), f"--ckpt_path={path}"]
    for subcommand in ("fit", "validate"):
        assert guarded(lambda subcommand=subcommand: train([subcommand, *arguments[1:]])) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum("some.ckpt: not a checkpoint written by" in line for line in lines) == 3


def test_checkpoint_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"config": "model:\n  model: anything\n  predictors: [hold]\n", "state_dict": {}}, path)
    assert main(["export", "--ckpt_path", str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "old.ckpt: its configuration is not one of this version" in error
    assert "predictors" in error
    assert len(error.strip().splitlines()) < 6


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
        ("--trainer.overfit_batches=1", "Set limit_train_batches, or data.num_train"),
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
