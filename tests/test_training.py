"""The router, its training and its export, on a tiny pipeline with real prompts and control images."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import SAMPLING, fit, save_tiny_teacher

from hgc_learn.__main__ import guarded, main
from hgc_learn.cli import train
from hgc_learn.data import ControlDataModule, SceneDataModule
from hgc_learn.export import export
from hgc_learn.hard import HardSchedule
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.objectives import DEFAULT_SITES, Rollout
from hgc_learn.plan import compile_plan
from hgc_learn.predictors import BY_CODE
from hgc_learn.quadratic import QuadraticModel
from hgc_learn.refine import Polisher, log_error, usual_weights
from hgc_learn.rollout import generate
from hgc_learn.starts import rule_schedules
from hgc_learn.training import RouterModule

CONFIGS = [
    path
    for folder in ("configs", "configs/compare/train")
    for path in sorted((Path(__file__).parent.parent / folder).glob("*.yaml"))
]
BUDGET = 0.5


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def module(teacher: Path) -> RouterModule:
    return RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], sites=[*DEFAULT_SITES, "unet:guidance"])


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    return next(iter(SceneDataModule(num_train=2, num_val=2, batch_size=2).train_dataloader()))


@pytest.fixture(autouse=True)
def small_logits(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared module's logits are the same before every test."""
    if "module" in request.fixturenames:
        router = request.getfixturevalue("module").router
        with torch.no_grad():
            router.logits.copy_(torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(0)))
        router.temperature = 1.0
    yield


def random_schedule(module: RouterModule, share: float, seed: int) -> HardSchedule:
    """Computes a share of the gates and fills in the rest with any weights, those of `hold` and `linear` among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.router.logits.shape
    compute = torch.rand(shape, generator=generator) < share
    if share < 1:
        compute[2, module.router.sites.index("unet:guidance")] = False  # a step of half a batch among the full ones
    compute[0] = True
    scale = 1 + 0.1 * torch.randn(shape, generator=generator)
    reach = torch.rand(shape, generator=generator)
    plain = torch.rand(shape, generator=generator) < 0.5
    return HardSchedule(compute, torch.stack([scale.masked_fill(plain, 1), torch.where(plain, reach.round(), reach)]))


@pytest.mark.parametrize("share", [1.0, 0.95, 0.7])
def test_training_path_equals_inference_path(module: RouterModule, batch: dict[str, Any], share: float) -> None:
    schedule = random_schedule(module, share, seed=int(100 * share))
    if share < 1:
        assert {"C", "-", "1", "f"} <= set("".join(module.draft(schedule).sites.values()))
    inference = module.rollout(batch, schedule)
    module.forwards.set_schedule(schedule)
    module.forwards.install()
    training = generate(module.pipe, SAMPLING, batch, grad=True)
    module.forwards.uninstall()
    assert training.requires_grad
    torch.testing.assert_close(training.detach(), inference, rtol=0, atol=1e-5 * float(inference.abs().max()))


def used_values(module: RouterModule, schedule: HardSchedule) -> Callable[[str, int], dict[int, float] | None]:
    """What a site gives at a step, as weights of its fresh values by step: of the guided half; None if not live."""
    draft = module.draft(schedule)
    plan = module.setting.plan(draft)

    def used(site: str, step: int) -> dict[int, float] | None:
        if site in plan.steps[step].run:
            return {step: 1.0}
        for load in plan.steps[step].load:
            if load.site == site:
                names = [parameter.name for parameter in BY_CODE[load.code].parameters]
                parameters = {name: draft.tensors[f"{site}/{name}"] for name in names}
                fill = BY_CODE[load.code].fill([step - j for j in load.guided], step, parameters)
                return {j: float(c) for j, c in zip(load.guided, fill.coefficients, strict=False)}
        return None

    return used


def changed(schedule: HardSchedule, step: int, column: int, weight: int | None) -> HardSchedule:
    """One gate flipped, or 1 added to one of its weights."""
    compute, weights = schedule.compute.clone(), schedule.weights.clone()
    if weight is None:
        compute[step, column] ^= True
    else:
        weights[weight, step, column] += 1
    return HardSchedule(compute, weights)


def test_first_order_effects_are_those_of_a_small_change(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through used + epsilon * (what the plan of the other schedule says - used), written out."""
    schedule = random_schedule(module, 0.9, seed=1)
    schedule.compute[:, module.router.sites.index("unet:guidance")] = True  # the halves are the same then
    forwards, sites = module.forwards, module.router.sites
    before = used_values(module, schedule)
    changes = []
    for column, step in itertools.product(range(0, len(sites), 3), range(1, len(schedule.compute))):
        if sites[column] != "unet:guidance" and before(sites[column], step):
            changes += [(step, column, weight) for weight in (None, 0, 1)]
    changes = changes[:: max(1, len(changes) // 90)]
    others = [used_values(module, changed(schedule, *change)) for change in changes]
    epsilon = torch.zeros(len(changes), requires_grad=True)
    watch = forwards._watch

    def disturbed(used: Tensor, name: str, step: int) -> Tensor:
        value = watch(used, name, step)
        for index, ((_, column, _), other) in enumerate(zip(changes, others, strict=True)):
            if sites[column] != name:
                continue
            mine, after = before(name, step), other(name, step)
            if mine and after and mine != after:
                fresh = forwards.fresh[name]
                change = sum((after.get(j, 0) - mine.get(j, 0)) * fresh[j] for j in {**mine, **after})
                value = value + epsilon[index] * change
        return value

    monkeypatch.setattr(forwards, "_watch", disturbed)
    forwards.set_schedule(schedule)
    forwards.install()
    value = generate(module.pipe, SAMPLING, batch, grad=True).sin().sum()
    forwards.uninstall()
    (expected,) = torch.autograd.grad(value, epsilon, retain_graph=True)
    products = forwards._backward(value)
    for (step, column, weight), derivative in zip(changes, expected.tolist(), strict=True):
        by_half = forwards._by_half(products[sites[column]][:, :, None], 2)
        found = forwards._flips(sites[column], by_half) if weight is None else None
        found = forwards._by_weight(sites[column], by_half)[weight] if found is None else found
        assert found[step].sum() == pytest.approx(derivative, rel=2e-3, abs=1e-4)
    assert expected.abs().gt(1e-3).sum() > 20
    assert len({weight for (*_, weight), d in zip(changes, expected.tolist(), strict=True) if abs(d) > 1e-3}) == 3
    forwards.forget()


def test_effects_predict_what_flips_do(module: RouterModule, batch: dict[str, Any]) -> None:
    schedule = random_schedule(module, 0.99, seed=2)
    target = module.teacher_latents(batch)
    module.generator = torch.Generator().manual_seed(0)
    effects = module.effects(batch, schedule, num_directions=12)
    error = module.rollout_errors(batch, schedule, target)
    torch.testing.assert_close(effects.errors, error, rtol=1e-3, atol=0)
    predicted = effects.of_each_flip()
    actual = []
    for index in (chosen := predicted.abs().flatten().argsort(descending=True)[:200:10]):
        step, column = (int(i) for i in torch.unravel_index(index, predicted.shape))
        flipped = changed(schedule, step, column, None)
        actual.append((module.rollout_errors(batch, flipped, target) / error).log().mean())
    pair = torch.stack([predicted.flatten()[chosen].float(), torch.stack(actual)])
    assert (pair[0].sign() == pair[1].sign()).float().mean() > 0.8
    assert torch.corrcoef(pair)[0, 1] > 0.8


def test_quadratic_model_predicts_joint_changes(module: RouterModule, batch: dict[str, Any]) -> None:
    """Several flips at once: better than the sum of what each does alone."""
    schedule = random_schedule(module, 0.99, seed=2)
    module.generator = torch.Generator().manual_seed(0)
    effects = module.effects(batch, schedule, num_directions=24)
    model = QuadraticModel(module.router, schedule, effects)
    target = module.teacher_latents(batch)
    error = module.rollout_errors(batch, schedule, target)
    live = (effects.flips[0].abs().mean(0) > 0).flatten().nonzero().flatten()
    joint, alone, actual = [], [], []
    for seed in range(12):
        order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
        flipped = torch.zeros_like(model.costs, dtype=torch.bool)
        flipped[live[order[:4]]] = True
        joint.append(model._expected(flipped)[0].log().mean())
        alone.append(effects.of_each_flip().flatten()[flipped].sum())
        after = HardSchedule(schedule.compute ^ flipped.view_as(schedule.compute), schedule.weights)
        actual.append((module.rollout_errors(batch, after, target) / error).log().mean().double())
    truth = torch.stack(actual)
    assert (torch.stack(joint) - truth).abs().mean() < (torch.stack(alone) - truth).abs().mean()
    assert torch.corrcoef(torch.stack([torch.stack(joint), truth]))[0, 1] > 0.9


def test_price_meets_the_budget_and_threshold_keeps_to_it(module: RouterModule) -> None:
    router, kept_before = module.router, 0.0
    for budget in (0.3, 0.5, 0.8, 1.0):
        p = router.probabilities(router.price(budget)).detach()
        assert router.expected_macs(p).item() == pytest.approx(budget, abs=2e-3)
        kept = router.kept(router.threshold(budget).compute)
        assert kept_before <= kept <= budget
        kept_before = kept
    assert kept_before > 0.9


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
    other = HardSchedule(schedule.compute ^ dead, schedule.weights)
    assert module.setting.plan(module.draft(other)) == module.setting.plan(module.draft(schedule))
    alive = changed(schedule, *(int(i) for i in (~dead[1:]).nonzero()[-1] + torch.tensor([1, 0])), None)
    assert module.setting.plan(module.draft(alive)) != module.setting.plan(module.draft(schedule))


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.5])
def test_impossible_budget_is_refused(module: RouterModule, budget: float) -> None:
    with pytest.raises(ValueError, match="fraction of full MACs"):
        module.router.price(budget)


def test_gradient_does_not_move_the_expected_macs(module: RouterModule, batch: dict[str, Any]) -> None:
    module.generator = torch.Generator().manual_seed(0)
    assert isinstance(module.objective, Rollout)
    (gradient, weight_gradient), logs = module.objective.gradients(module, batch, BUDGET)
    for values in (gradient, weight_gradient):
        assert values.isfinite().all()
        assert values.abs().sum() > 0
    assert abs(float(gradient.sum())) < 1e-3 * float(gradient.abs().sum())
    assert float(logs["expected_macs"]) == pytest.approx(BUDGET, abs=2e-3)


def test_polishing_lowers_the_error_within_the_budget(module: RouterModule, batch: dict[str, Any]) -> None:
    module.generator = torch.Generator().manual_seed(1)
    schedule = module.router.threshold(BUDGET)
    before = log_error(module, [batch], schedule)
    polisher = Polisher(module, [batch], schedule, BUDGET, max_swaps=16)
    flips = 0
    for _ in range(2):
        start = polisher.schedule
        polisher.round()
        flips += int((start.compute != polisher.schedule.compute).sum())
        assert module.router.kept(polisher.schedule.compute) <= BUDGET
    assert flips > 0
    assert (polisher.schedule.weights != schedule.weights).any()
    assert log_error(module, [batch], polisher.schedule) == pytest.approx(polisher.log_error)
    assert polisher.log_error < before


def test_weights_are_moved_where_they_lower_the_error(module: RouterModule, batch: dict[str, Any]) -> None:
    schedule = random_schedule(module, 0.8, seed=5)
    module.generator = torch.Generator().manual_seed(0)
    effects = module.effects(batch, schedule, num_directions=8)
    model = QuadraticModel(module.router, schedule, effects)
    nothing = torch.zeros_like(model.costs, dtype=torch.bool)
    better = model.changed(nothing, damping=1.0)
    assert torch.equal(better.compute, schedule.compute)
    moved = (better.weights != schedule.weights).any(0)
    assert moved.any()
    assert not (moved & schedule.compute).any()
    assert log_error(module, [batch], better) < log_error(module, [batch], schedule)
    step = [(model.changed(nothing, damping).weights - schedule.weights).abs().sum() for damping in (1.0, 10.0, 1e4)]
    assert step[0] > step[1] > 50 * step[2]


def test_gates_get_the_usual_weights_of_their_site() -> None:
    filled_in = torch.tensor([[False, False], [True, False], [False, False], [True, False]])
    weights = torch.stack([torch.arange(8.0).view(4, 2), torch.zeros(4, 2)])
    usual = usual_weights(HardSchedule(~filled_in, weights), filled_in)
    assert usual[0].tolist() == [[4, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_polishing_can_start_from_what_rules_write(module: RouterModule, budget: float) -> None:
    router = module.router
    schedules = rule_schedules(router, module.setting, budget)
    assert len(schedules) > 4
    for schedule in schedules:
        assert 0.5 * budget < router.kept(schedule.compute) <= budget
        rows = list(module.draft(schedule).sites.values())
        assert len(set(rows)) == 1  # full steps are full for all that is reused together
    eps = {module.draft(schedule).sites.get("unet:eps") for schedule in schedules}
    assert {row[1:].replace("C", "") for row in eps if row} >= ({"--", "11"} if budget == 0.6 else {"----", "1111"})


pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:You are trying to `self.log",
)


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
    objective: list[str], buffers: set[str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"--model.objective={objective[0]}", *objective[1:]]
    whole = torch.load(fit(teacher, tmp_path / "whole", 4, *more), weights_only=True)
    names = {"router.logits", "router.weights", *(f"objective.{name}" for name in buffers)}
    assert set(whole["state_dict"]) == names  # no frozen model
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))

    training_step = RouterModule.training_step

    def interrupted(self: RouterModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step == 3:
            raise KeyboardInterrupt
        training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(RouterModule, "training_step", interrupted)
        fit(teacher, tmp_path / "parts", 4, *more)
    ckpt_path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert torch.load(ckpt_path, weights_only=True)["global_step"] == 3
    resumed = torch.load(fit(teacher, tmp_path / "parts", 4, *more, f"--ckpt_path={ckpt_path}"), weights_only=True)
    assert resumed["global_step"] == 4
    for name in names:
        torch.testing.assert_close(resumed["state_dict"][name], whole["state_dict"][name], rtol=0, atol=0)


def test_export_writes_a_schedule_that_runs(
    teacher: Path, tmp_path: Path, module: RouterModule, batch: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_path = fit(teacher, tmp_path, 1)
    for budget in (0.4, 0.7):
        output = tmp_path / str(budget)
        path = export(ckpt_path, output, budget, refine_rounds=1, refine_samples=2)
        schedule = HGCSchedule.load(path)
        assert schedule.macs["cached"] <= budget * schedule.macs["full"]
        assert schedule.producer["settings"]["budget"] == budget
        assert schedule.fidelity["num_samples"] == 2
        assert (output / "hgc_schedule.png").stat().st_size > 1000
        with apply_schedule(module.pipe, path) as handle:
            generate(module.pipe, SAMPLING, batch)
            assert handle.stats()["macs_cached"] == schedule.macs["cached"]
    assert main(["inspect", str(path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_path", "absent.ckpt", "--output", "out"], "absent.ckpt: no such checkpoint"),
        (["--ckpt_path", __file__, "--output", "out"], "not a checkpoint written by"),
    ],
)
def test_export_refuses_clearly(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.model=nowhere", "model: 'nowhere' is neither a folder here nor a hub id"),
        ("--model.sampling.scheduler=Nonesuch", "no scheduler named 'Nonesuch'"),
        ("--model.budgets=[0.01]", "A budget of 0.01 cannot be met"),
        ("--model.sites=[nothing]", "No site matches 'nothing'"),
    ],
)
def test_training_refuses_in_one_line(
    teacher: Path, tmp_path: Path, argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: fit(teacher, tmp_path, 1, argument)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_prints_readably(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train(["fit", "--config", str(config), "--print_config"])
    assert exit_info.value.code in (None, 0)
    printed = capsys.readouterr().out
    assert "num_inference_steps" in printed
    assert "budgets" in printed


def test_custom_data_from_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for i in range(6):
        for kind in ("photo", "control"):
            Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / f"{kind}{i}.png")
        rows.append(
            {"file_name": f"photo{i}.png", "conditioning_image_file_name": f"control{i}.png", "text": f"picture {i}"}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ControlDataModule(str(tmp_path), height=16, width=24, num_train=4, num_val=2, batch_size=2)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    assert batches[0]["conditioning_image"].shape == (2, 3, 16, 24)
    assert 0 <= batches[0]["conditioning_image"].min() <= batches[0]["conditioning_image"].max() <= 1
    texts = {text for batch in batches for text in batch["text"]}
    assert texts == {f"picture {i}" for i in range(4)}
    for kwargs, message in (({"text_column": "caption"}, "no column 'caption'"), ({"num_train": 7}, "has 6 rows")):
        with pytest.raises(ValueError, match=message):
            ControlDataModule(str(tmp_path), **{"num_train": 2, "num_val": 1, **kwargs}).setup("fit")
