"""What holds for every policy. A new policy is a row of `CASES`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate
from training_fixtures import SAMPLING, fit
from unmeasured import unmeasured_setting

from hgc_learn.comparison.config import TuningConfig
from hgc_learn.comparison.tune import list_candidates, shortlist
from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.policies import POLICIES
from hgc_learn.sampling import SamplingConfig, generate, load_pipeline, scheduled
from hgc_learn.setting import Setting

NUM_STEPS = SAMPLING.num_inference_steps


@dataclass(frozen=True)
class Case:
    """A policy with its knobs on an SD1.5-shaped pipeline of 5 steps; `kept` is the fraction of the MACs that it
    leaves where that is known beforehand."""

    policy: str
    knobs: dict[str, Any] = field(default_factory=dict)
    kept: float | None = None

    def __str__(self) -> str:
        return "-".join([self.policy, *(str(value) for value in self.knobs.values())])


CASES = [
    Case("uniform", {"interval": 2}, kept=3 / 5),
    Case("uniform", {"interval": 2, "predictor": "linear"}, kept=3 / 5),
    Case("uniform", {"interval": 2, "first_full": 3, "predictor": "taylor2"}, kept=4 / 5),
    Case("fewer_steps", {"num_steps": 3}, kept=3 / 5),
    Case("time_cutoff", {"cutoff": 2, "interval": 2, "site": "unet:eps"}, kept=3 / 5),
    Case("time_cutoff", {"cutoff": 2, "interval": 5}),
    Case("time_cutoff", {"cutoff": 2, "interval": 1.5, "site": "unet.up_blocks.1.resnets.0:out", "control": "held"}),
    Case("taylorseer", {"interval": 2}),
    Case("taylorseer", {"interval": 3, "predictor": "hold", "controlnet": "computed"}),
    Case("taylorseer", {"interval": 2, "branch": 1, "controlnet": "residuals", "predictor": "bdf2"}),
    Case("random", {"budget": 0.5}),
    Case("deepcache", {"interval": 2, "branch": 3}),
    Case("deepcache", {"interval": 3, "control": "fresh", "spacing": "quadratic", "center": 2}),
    Case("faster_diffusion", {"num_keys": 2}),
    Case("tgate", {"gate": 2, "warm_up": 1}),
    Case("tgate_deepcache", {"gate": 3, "interval": 2, "branch": 3}),
    Case("tgate_deepcache", {"gate": 2, "self_attention_interval": 2, "control": "fresh", "controlnet": "computed"}),
    Case("pab"),
    Case("hgc", {"interval": 2.5, "gate": 3}),
    Case("smoothcache", {"alpha": 0.3}),
    Case("smoothcache", {"alpha": 0.3, "grouping": "layer", "controlnet": "residuals"}),
    Case("block_caching", {"delta": 0.3}),
    Case("block_caching_scale_shift", {"delta": 0.3}),
    Case("hyca", {"interval": 2, "site": "prediction"}, kept=3 / 5),
    Case("hyca", {"interval": 3, "site": "last_block"}),
    Case("hyca", {"interval": 3, "first_full": 2, "site": "prediction"}, kept=3 / 5),
    Case("evolutionary", {"budget": 0.5, "population": 2, "generations": 1}),
    Case("learned", {"budget": 0.5, "reorder_trials": 0, "specialise_updates": 0, "fill_updates": 2}),
    Case("l2c", {"budget": 0.7, "interval": 2}),
    Case("harmonica", {"budget": 0.5}),
]
TRAININGS = {  # of the policies that read a checkpoint: arguments
    "learned": [],
    "l2c": ["--model.objective=L2C", "--model.budgets=[0.8]"],
    "harmonica": ["--model.objective=HarmoniCa"],
}


@pytest.fixture
def case(request: pytest.FixtureRequest, teacher: Path) -> Case:
    """A row, with the checkpoint of a training of one step where its policy reads one."""
    row: Case = request.param
    if "ckpt_path" not in POLICIES[row.policy].knobs:
        return row
    folder = teacher / "trained" / row.policy
    ckpt_path = folder / "checkpoints" / "last.ckpt"
    if not ckpt_path.is_file():
        fit(teacher, folder, 1, *TRAININGS[row.policy])
    return replace(row, knobs={**row.knobs, "ckpt_path": str(ckpt_path)})


@pytest.fixture(scope="module")
def setting(teacher: Path) -> Setting:
    """A tiny whole pipeline and two samples; what policies measure is shared by its memo."""
    scenes = SceneDataset("train", 2)
    return Setting.of_pipeline(load_pipeline(str(teacher), SAMPLING), SAMPLING, [default_collate(list(scenes))])


@pytest.fixture(scope="module")
def full(setting: Setting) -> Tensor:
    return generate(setting.pipe, SAMPLING, setting.batches[0])


def test_every_policy_has_a_row() -> None:
    assert {case.policy for case in CASES} == set(POLICIES)


@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_what_it_writes_compiles_and_costs_less(case: Case, setting: Setting) -> None:
    draft = POLICIES[case.policy].write(setting, **case.knobs)
    for row in draft.sites.values():
        assert len(row) == len(draft.timesteps or setting.timesteps)
        assert row[0] == "C"
    kept = setting.kept(draft)
    assert 0 < kept < 1
    assert case.kept is None or kept == pytest.approx(case.kept, abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_its_schedule_is_the_same_from_the_file_and_runs(
    case: Case, setting: Setting, full: Tensor, tmp_path: Path
) -> None:
    schedule = POLICIES[case.policy].schedule(setting, **case.knobs)
    assert schedule.producer["policy"] == case.policy
    assert schedule.macs["cached"] == pytest.approx(
        schedule.macs["full"] * setting.kept(POLICIES[case.policy].write(setting, **case.knobs))
    )
    schedule.save(tmp_path / "hgc_schedule.json")
    loaded = HGCSchedule.load(tmp_path / "hgc_schedule.json")
    assert loaded.sites == schedule.sites
    assert loaded.macs == schedule.macs
    sampling = replace(SAMPLING, num_inference_steps=len(schedule.timesteps))
    latents = []
    for each in (schedule, loaded):
        with apply_schedule(setting.pipe, each) as handle:
            latents.append(generate(setting.pipe, sampling, setting.batches[0]))
            assert handle.stats()["steps_run"] == len(schedule.timesteps)
            assert handle.stats()["steps_refreshed"] == 0
    assert torch.equal(*latents)
    assert latents[0].isfinite().all()
    assert not torch.allclose(latents[0], full)


@pytest.mark.parametrize("case", {case.policy: case for case in CASES}.values(), ids=str, indirect=True)
def test_its_grid_names_its_knobs_and_holds_a_candidate_that_saves(case: Case, setting: Setting) -> None:
    policy = POLICIES[case.policy]
    assert all(knobs.keys() <= policy.knobs.keys() for knobs in policy.candidates(setting))
    assert any(saves(setting, case.policy, {**case.knobs, **knobs}) for knobs in policy.candidates(setting))


def saves(setting: Setting, name: str, knobs: dict[str, Any]) -> bool:
    """Whether a point of the grid can be had (some cannot) and costs less than the full run."""
    try:
        return setting.kept(POLICIES[name].write(setting, **knobs)) < 1
    except ValueError:
        return False


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_its_defaults_are_among_its_candidates(name: str, num_steps: int) -> None:
    """What is published is tried too, the knobs that are not in the grid being at their defaults anyway."""
    policy = POLICIES[name]
    sampling = SamplingConfig(num_steps, 7.5, 512, 512)
    timesteps = tuple(999.0 - 1000.0 * i / num_steps for i in range(num_steps))
    setting = replace(unmeasured_setting("sd15-controlnet"), sampling=sampling, timesteps=timesteps, memo={})
    meant = {  # by a default of None; the modules say so
        "deepcache": {"center": num_steps * 3 // 10},
        "l2c": {"interval": 2},  # the shortest, where the budget allows it
    }.get(name, {})
    defaults = policy.knobs | meant
    assert any(knobs.items() <= defaults.items() for knobs in policy.candidates(setting))
    if name == "deepcache":
        knobs = {"interval": 5, "spacing": "quadratic"}
        assert policy.write(setting, **knobs) == policy.write(setting, **knobs, **meant)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_it_says_in_a_line_what_it_does_and_where_it_is_from(name: str) -> None:
    policy = POLICIES[name]
    assert policy.summary.endswith(".")
    assert policy.paper


def test_an_unknown_knob_is_refused(setting: Setting) -> None:
    with pytest.raises(ValueError, match="deepcache has no knob 'depth'; it has interval, branch"):
        POLICIES["deepcache"].schedule(setting, depth=3)


def test_of_several_grids_all_are_tried(setting: Setting) -> None:
    offered = list_candidates(POLICIES["taylorseer"], setting, {})
    assert not offered.refused
    tried = shortlist(offered.found, 0.6, TuningConfig(max_candidates=16))
    assert len(tried) == 16
    branches = {candidate.knobs["branch"] for candidate in tried}
    assert None in branches
    assert len(branches) > 2


def test_the_random_policy_comes_close_to_its_budget_from_below(setting: Setting) -> None:
    rows = set()
    for seed in (0, 1):
        for budget in (0.3, 0.6, 0.9):
            draft = POLICIES["random"].write(setting, budget=budget, seed=seed)
            assert budget - 1 / NUM_STEPS < setting.kept(draft) <= budget  # one draw may decide about a whole step
            assert draft == POLICIES["random"].write(setting, budget=budget, seed=seed)
            rows.add(str(draft.sites))
    assert len(rows) == 6
    assert setting.kept(POLICIES["random"].write(setting, budget=1.0)) == 1
    with pytest.raises(ValueError, match=r"the least is 0\.200: the first step computes everything\."):
        POLICIES["random"].write(setting, budget=0.1)
    with pytest.raises(ValueError, match="budget is 50"):
        POLICIES["random"].write(setting, budget=50)


def test_fewer_steps_takes_the_samplers_own_timesteps(setting: Setting) -> None:
    draft = POLICIES["fewer_steps"].write(setting, num_steps=3)
    setting.pipe.scheduler.set_timesteps(3)
    assert draft.timesteps == tuple(setting.pipe.scheduler.timesteps.tolist())
    trailing = POLICIES["fewer_steps"].write(setting, num_steps=3, timestep_spacing="trailing")
    assert trailing.timesteps == (999, 666, 332)
    assert setting.pipe.scheduler.timesteps.tolist() == list(draft.timesteps)
    visited = []
    for knobs in ({}, {"timestep_spacing": "trailing"}):
        schedule = POLICIES["fewer_steps"].schedule(setting, num_steps=3, **knobs)
        with scheduled(setting.pipe, setting.sampling, schedule) as sampling:
            setting.pipe.scheduler.set_timesteps(sampling.num_inference_steps)
            visited.append(tuple(setting.pipe.scheduler.timesteps.tolist()))
    assert visited == [draft.timesteps, trailing.timesteps]
    setting.pipe.scheduler.set_timesteps(3)
    assert draft.timesteps == tuple(setting.pipe.scheduler.timesteps.tolist())
    bare = replace(setting, pipe=None)
    assert POLICIES["fewer_steps"].write(bare, num_steps=4).timesteps == (999, 749, 499, 249)
    for num_steps in (0, NUM_STEPS + 1):
        with pytest.raises(ValueError, match="it must be 1 to 5"):
            POLICIES["fewer_steps"].write(setting, num_steps=num_steps)


def test_time_cutoff_rows(setting: Setting) -> None:
    def row(**knobs: Any) -> str:
        return POLICIES["time_cutoff"].write(setting, site="unet:eps", **knobs).sites["unet:eps"]

    assert row(cutoff=1, interval=5) == "C----"
    assert row(cutoff=3, interval=2) == "CCC-C"
    assert row(cutoff=1, interval=2) == "C-C-C"
    assert row(cutoff=2, interval=1) == "CCCCC"
    for knobs, message in (({"cutoff": 0}, "cutoff is 0"), ({"interval": 0}, "interval is 0")):
        with pytest.raises(ValueError, match=message):
            row(**knobs)
    with pytest.raises(ValueError, match="No site matches"):
        POLICIES["time_cutoff"].write(setting, site="nothing")


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("uniform", {"predictor": "nope"}), ("deepcache", {"control": "nope"}), ("faster_diffusion", {"spacing": "nope"})],
)
def test_a_choice_that_there_is_not_is_refused(teacher: Path, name: str, knobs: dict[str, str]) -> None:
    setting = Setting.of_pipeline(load_pipeline(str(teacher), SAMPLING), SAMPLING)
    with pytest.raises(ValueError, match=rf"{name}: {next(iter(knobs))} is 'nope'; it is one of"):
        POLICIES[name].schedule(setting, **knobs)
