"""The router, its training and its export, on a tiny pipeline with real prompts and control images."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
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
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.objectives import DEFAULT_SITES, Rollout
from hgc_learn.plan import Plan, compile_plan
from hgc_learn.predictors import BY_CODE
from hgc_learn.refine import exchange_predictors, refine
from hgc_learn.rollout import generate
from hgc_learn.starts import best_start, rule_schedules
from hgc_learn.training import RouterModule, predictor_codes

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


def random_choices(module: RouterModule, share: float, seed: int) -> Tensor:
    """A hard schedule that computes a share of the gates and fills in the rest by any of the predictors."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.router.logits.shape
    choices = torch.randint(1, len(module.router.codes), shape, generator=generator)
    choices[torch.rand(shape, generator=generator) < share] = 0
    if share < 1:
        choices[2, module.router.sites.index("unet:guidance")] = 1  # a step of half a batch among the full ones
    choices[0] = 0
    return choices


@pytest.mark.parametrize("share", [1.0, 0.95, 0.7])
def test_training_path_equals_inference_path(module: RouterModule, batch: dict[str, Any], share: float) -> None:
    choices = random_choices(module, share, seed=int(100 * share))
    inference = module.rollout(batch, choices)
    module.forwards.set_rows(module.router.rows(choices))
    module.forwards.install()
    training = generate(module.pipe, SAMPLING, batch, grad=True)
    module.forwards.uninstall()
    assert training.requires_grad
    torch.testing.assert_close(training.detach(), inference, rtol=0, atol=1e-5 * float(inference.abs().max()))


def weights(plan: Plan, site: str, step: int) -> dict[int, float] | None:
    """What a site gives at a step, as weights of its fresh values by step: of the guided half; None if not live."""
    if site in plan.steps[step].run:
        return {step: 1.0}
    for load in plan.steps[step].load:
        if load.site == site:
            fill = BY_CODE[load.code].fill([step - j for j in load.guided], step, {})
            return {j: float(c) for j, c in zip(load.guided, fill.coefficients, strict=False)}
    return None


def test_first_order_effects_are_those_of_a_small_change(
    module: RouterModule, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through used + epsilon * (what the plan of the other schedule says - used), written out."""
    choices = random_choices(module, 0.9, seed=1)
    choices[:, module.router.sites.index("unet:guidance")] = 0  # the halves are the same then
    forwards, codes = module.forwards, module.router.codes
    rows = module.router.rows(choices)
    graph, num_steps = forwards.graph, len(choices)
    plan = compile_plan(graph, rows, num_steps)
    flips = []
    for site in module.router.sites[::3]:
        row = rows.get(site, "C" * num_steps)
        for step, code in itertools.product(range(1, num_steps), codes):
            if site != "unet:guidance" and code != row[step] and weights(plan, site, step):
                flips.append((site, step, code, {**rows, site: row[:step] + code + row[step + 1 :]}))
    flips = flips[:: max(1, len(flips) // 60)]
    others = [compile_plan(graph, flipped, num_steps) for *_, flipped in flips]
    epsilon = torch.zeros(len(flips), requires_grad=True)
    watch = forwards._watch

    def disturbed(used: Tensor, name: str, step: int) -> Tensor:
        value = watch(used, name, step)
        for index, ((site, *_), other) in enumerate(zip(flips, others, strict=True)):
            before, after = weights(plan, name, step), weights(other, name, step)
            if site == name and before and after and before != after:
                fresh = forwards.fresh[name]
                change = sum((after.get(j, 0) - before.get(j, 0)) * fresh[j] for j in {**before, **after})
                value = value + epsilon[index] * change
        return value

    monkeypatch.setattr(forwards, "_watch", disturbed)
    forwards.set_rows(rows)
    forwards.install()
    value = generate(module.pipe, SAMPLING, batch, grad=True).sin().sum()
    forwards.uninstall()
    (expected,) = torch.autograd.grad(value, epsilon, retain_graph=True)
    products = forwards._backward(value)
    for (site, step, code, _), derivative in zip(flips, expected.tolist(), strict=True):
        changes = forwards._changes(site, codes, forwards._by_half(products[site], 2))
        assert changes[codes.index(code), step].sum() == pytest.approx(derivative, rel=2e-3, abs=1e-4)
    assert expected.abs().gt(1e-3).sum() > 20
    forwards.set_rows({})


def test_effects_predict_what_other_choices_do(module: RouterModule, batch: dict[str, Any]) -> None:
    choices = random_choices(module, 0.99, seed=2)
    target = module.teacher_latents(batch)
    module.generator = torch.Generator().manual_seed(0)
    predicted = torch.stack([module.effects(batch, choices)[1] for _ in range(12)]).mean(0)
    error = module.rollout_errors(batch, choices, target)
    order = predicted.abs().flatten().argsort(descending=True)
    actual = []
    for index in (chosen := order[:300:15]):
        code, step, site = (int(i) for i in torch.unravel_index(index, predicted.shape))
        other = choices.clone()
        other[step, site] = code
        actual.append((module.rollout_errors(batch, other, target) / error - 1).mean())
    pair = (predicted.flatten()[chosen], torch.stack(actual))
    assert (pair[0].sign() == pair[1].sign()).float().mean() > 0.8
    logs = torch.stack([x.abs().clamp_min(1e-9).log() for x in pair])
    assert torch.corrcoef(logs)[0, 1] > 0.8


def test_price_meets_the_budget_and_threshold_keeps_to_it(module: RouterModule) -> None:
    router, kept_before = module.router, 0.0
    for budget in (0.3, 0.5, 0.8, 1.0):
        p = router.probabilities(router.price(budget)).detach()
        assert router.expected_macs(p).item() == pytest.approx(budget, abs=2e-3)
        kept = router.kept(router.threshold(budget))
        assert kept_before <= kept <= budget
        kept_before = kept
    assert kept_before > 0.9


def test_kept_is_what_the_plan_says(module: RouterModule) -> None:
    choices = random_choices(module, 0.9, seed=3)
    plan = module.setting.plan(module.draft(choices))
    full = compile_plan(module.graph, {}, len(choices))
    assert module.router.kept(choices) == pytest.approx(plan.macs(module.costs) / full.macs(module.costs), rel=1e-6)


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.5])
def test_impossible_budget_is_refused(module: RouterModule, budget: float) -> None:
    with pytest.raises(ValueError, match="fraction of full MACs"):
        module.router.price(budget)


def test_gradient_does_not_move_the_expected_macs(module: RouterModule, batch: dict[str, Any]) -> None:
    module.generator = torch.Generator().manual_seed(0)
    assert isinstance(module.objective, Rollout)
    (gradient, predictor_gradient), logs = module.objective.gradients(module, batch, BUDGET)
    for values in (gradient, predictor_gradient):
        assert values.isfinite().all()
        assert values.abs().sum() > 0
    assert abs(float(gradient.sum())) < 1e-3 * float(gradient.abs().sum())
    assert float(logs["expected_macs"]) == pytest.approx(BUDGET, abs=2e-3)


@pytest.mark.parametrize("predictors", [["hold"], ["hold", "linear"]])
def test_refining_lowers_the_error_within_the_budget(
    predictors: list[str], teacher: Path, batch: dict[str, Any]
) -> None:
    module = RouterModule(str(teacher), SAMPLING, budgets=[BUDGET], predictors=predictors)
    module.generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.router.logits.copy_(torch.randn(module.router.logits.shape, generator=module.generator))
    choices = module.router.threshold(BUDGET)
    target = module.teacher_latents(batch)
    before = module.rollout_errors(batch, choices, target).mean()
    refined = refine(module, [batch], choices, BUDGET, num_rounds=2, max_changes=16)
    assert module.router.kept(refined) <= BUDGET
    assert module.rollout_errors(batch, refined, target).mean() < before


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_polishing_can_start_from_what_rules_write(module: RouterModule, budget: float) -> None:
    router = module.router
    schedules = rule_schedules(router, module.setting, budget)
    assert len(schedules) > 4
    for choices in schedules:
        assert 0.5 * budget < router.kept(choices) <= budget
        rows = list(router.rows(choices).values())
        assert len(set(rows)) == 1  # full steps are full for all that is reused together
    eps = {router.rows(choices).get("unet:eps") for choices in schedules}
    assert {row[1:].replace("C", "") for row in eps if row} >= ({"--", "11"} if budget == 0.6 else {"----", "1111"})


def test_the_best_start_wins_on_more_batches() -> None:
    tried = []

    def error(schedule: Tensor, num_batches: int) -> float:
        tried.append((int(schedule), num_batches))
        return float(schedule) if num_batches == 1 else -float(schedule)

    assert best_start([torch.tensor(i) for i in (0, 1, 4, 3, 2)], error, num_finalists=3) == 2
    assert tried[4:] == [(0, 4), (1, 4), (2, 4)]


def test_predictors_are_exchanged_where_that_promises_most(module: RouterModule) -> None:
    choices = random_choices(module, 0.5, seed=4)
    effects = torch.randn(len(module.router.codes), *choices.shape, generator=torch.Generator().manual_seed(4))
    effects.scatter_(0, choices[None], 0.0)
    nothing = torch.zeros_like(choices, dtype=torch.bool)
    changed = exchange_predictors(choices, effects, nothing, 5)
    assert (changed != choices).sum() == 5
    assert not ((exchange_predictors(choices, effects, changed != choices, 5) != choices) & (changed != choices)).any()
    assert (choices[changed != choices] > 0).all()
    promised = effects.gather(0, changed[None])[0][changed != choices]
    rest = effects[1:].min(0).values[(choices > 0) & (changed == choices)]
    assert promised.max() <= rest.min()


@pytest.mark.parametrize("names", [["nothing"], ["per_channel"], ["taylor2"], []])
def test_predictors_that_a_router_cannot_choose_are_refused(names: list[str], teacher: Path) -> None:
    with pytest.raises(ValueError, match="cannot be chosen by a router; one or more of hold, linear"):
        predictor_codes(names)


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
    names = {"router.logits", "router.predictor_logits", *(f"objective.{name}" for name in buffers)}
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
        path = export(ckpt_path, output, budget, refine_rounds=1, refine_batches=1)
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
