from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from measured import measured_setting, shared_setting, single_sample_setting

from hgc_learn.comparison.tune import count_rollouts
from hgc_learn.genetic import Genes, search
from hgc_learn.plan import Plan, compile_plan
from hgc_learn.policies import POLICIES
from hgc_learn.policies.evolutionary import CLEARLY, Encoding, Race, evolutionary, rules
from hgc_learn.rollouts import mean_psnr


def random_genes(encoding: Encoding, seed: int) -> Genes:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(encoding.sizes) for _ in range(encoding.setting.num_steps - 1)])


@pytest.mark.parametrize("seed", range(8))
def test_kept_is_that_of_the_plan_whatever_the_genes(seed: int) -> None:
    encoding = Encoding(shared_setting())
    genes = random_genes(encoding, seed)
    assert encoding.kept(genes) == pytest.approx(encoding.setting.kept(encoding.draft(genes)), abs=1e-12)


def plan_of(encoding: Encoding, genes: Genes) -> Plan:
    return compile_plan(encoding.setting.graph, encoding.draft(genes).sites, encoding.setting.num_steps)


@pytest.mark.parametrize("seed", range(8))
def test_genes_that_make_no_difference_are_zero(seed: int) -> None:
    encoding = Encoding(shared_setting())
    genes = random_genes(encoding, seed)
    canonical = encoding.canonical(genes)
    assert plan_of(encoding, canonical) == plan_of(encoding, genes)
    for step, gene in np.argwhere(canonical > 0):
        without = canonical.copy()
        without[step, gene] = 0
        assert plan_of(encoding, without) != plan_of(encoding, genes)


def test_a_search_keeps_no_schedule_twice() -> None:
    setting = single_sample_setting()
    knobs = {"budget": 0.3, "population": 12, "generations": 4}
    encoding, drafts = Encoding(setting), [evolutionary(setting, **knobs, rank=rank) for rank in range(12)]
    plans = [compile_plan(setting.graph, draft.sites, setting.num_steps) for draft in drafts]
    assert all(plan not in plans[:i] for i, plan in enumerate(plans))
    assert all(np.array_equal(genes, encoding.canonical(genes)) for genes in rules(encoding, 0.3))


def test_alternatives_are_ordered_and_each_does_something() -> None:
    setting = shared_setting()
    encoding = Encoding(setting)
    assert list(encoding.genes) == ["trunk", "control", "guidance", "attn1", "attn2"]
    for gene, size in enumerate(encoding.sizes):
        kept = []
        for value in range(size):
            genes = np.zeros((setting.num_steps - 1, len(encoding.sizes)), dtype=np.int64)
            genes[:, gene] = value
            kept.append(encoding.kept(genes))
        assert kept[0] == 1
        assert kept == sorted(kept, reverse=True)
        assert kept[1] < 1
    encoder = next(a for a in encoding.genes["trunk"] if "unet.conv_in:out" in a)
    step = compile_plan(setting.graph, dict.fromkeys(encoder, "C----"), setting.num_steps).steps[1]
    assert not [name for name in step.run if name.startswith(("unet.down_blocks", "unet.mid_block"))]


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8])
def test_rules_keep_the_budget_and_hold_the_well_known_ones(budget: float) -> None:
    encoding = Encoding(shared_setting())
    found = rules(encoding, budget)
    assert all(encoding.kept(genes) <= budget for genes in found)
    rows = [encoding.draft(genes).sites for genes in found]
    # At whole intervals, and as many full steps as fit, spread evenly.
    for uniform in {0.25: ["C----"], 0.5: ["C--C-", "C-C--"], 0.8: ["C-C-C", "CCCC-"]}[budget]:
        assert {"unet:eps": uniform} in rows
        assert {"unet:eps": uniform.replace("-", "1")} in rows
    deepcache = [row for row in rows if list(row) == ["unet.up_blocks.3.attentions.1:out"]]
    assert bool(deepcache) == (budget > 0.25)


@pytest.mark.parametrize(("budget", "seed"), [(0.3, 0), (0.5, 1)])
def test_never_beyond_the_budget_nor_worse_than_any_rule(budget: float, seed: int) -> None:
    setting = single_sample_setting()
    draft = evolutionary(setting, budget=budget, population=6, generations=3, seed=seed)
    assert setting.kept(draft) <= budget
    encoding = Encoding(setting)
    best_rule = max(mean_psnr(setting, encoding.draft(genes)) for genes in rules(encoding, budget))
    assert mean_psnr(setting, draft) >= best_rule


def test_the_same_seed_finds_the_same_schedule_and_counts_its_rollouts() -> None:
    drafts = []
    for _ in range(2):
        setting = single_sample_setting()
        with count_rollouts(setting) as rollouts:
            drafts.append(evolutionary(setting, budget=0.4, population=4, generations=2, seed=3))
        num_rules = len(rules(Encoding(setting), 0.4))
        num_samples = sum(len(batch["seed"]) for batch in setting.batches)
        assert num_samples < rollouts.num_samples <= num_samples * (1 + num_rules + 2 * 4)
    assert drafts[0] == drafts[1]


def test_what_is_clearly_worse_than_the_survivors_on_the_first_batch_is_not_tried_on_the_others() -> None:
    setting = measured_setting()
    encoding = Encoding(setting)
    race = Race(encoding, population=2)
    full, held = random_genes(encoding, 0) * 0, random_genes(encoding, 0) * 0
    held[:, 0] = encoding.sizes[0] - 4  # of the forecasts
    near = full.copy()
    near[-1] = held[-1]
    num_samples = [len(batch["seed"]) for batch in setting.search_batches]
    assert race.psnr(full) == 120
    assert race.psnr(near) == mean_psnr(setting, encoding.draft(near))
    assert len(race.survivors) == 2
    with count_rollouts(setting) as rollouts:
        psnr = race.psnr(held)
    assert rollouts.num_samples <= num_samples[0]
    first = [mean_psnr(setting, encoding.draft(genes), num_batches=1) for genes in (held, near)]
    assert first[0] < first[1] - CLEARLY
    assert psnr == pytest.approx(race.survivors[-1][0] + first[0] - first[1])
    assert psnr < race.survivors[-1][0]


def test_ranks_are_those_of_one_search() -> None:
    setting = single_sample_setting()
    knobs = {"budget": 0.5, "population": 4, "generations": 1}
    with count_rollouts(setting) as rollouts:
        psnr = [mean_psnr(setting, evolutionary(setting, **knobs, rank=rank)) for rank in range(4)]
    num_samples = sum(len(batch["seed"]) for batch in setting.batches)
    assert psnr == sorted(psnr, reverse=True)
    assert rollouts.num_samples <= num_samples * (1 + len(rules(Encoding(setting), 0.5)) + 4) + 1e-6
    with pytest.raises(ValueError, match="rank is 4; it can be 0 to 3"):
        evolutionary(setting, **knobs, rank=4)
    num_rules = len(rules(Encoding(setting), 0.5))
    with pytest.raises(ValueError, match=f"has {num_rules} schedules"):
        evolutionary(setting, budget=0.5, population=num_rules + 1, generations=0, rank=num_rules)


def test_the_search_finds_a_known_optimum_within_its_budget() -> None:
    """Steps that are reused cost their weight; half of the steps may be computed, so the heavier half should be."""
    weights = np.array([5.0, 1, 7, 2, 8, 3, 6, 4])
    evaluated = []

    def kept(genes: Genes) -> float:
        return float((genes == 0).mean())

    def error(genes: Genes) -> float:
        evaluated.append(kept(genes))
        return float(weights[genes[:, 0] > 0].sum())

    start = np.array([[0], [0], [0], [0], [1], [1], [1], [1]])
    last = search(error, kept, np.copy, [start], [2], budget=0.5, population=12, generations=20, seed=0)
    assert last[0].ravel().tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [error(genes) for genes in last] == sorted(error(genes) for genes in last)
    assert len({genes.tobytes() for genes in last}) == len(last)
    assert max(evaluated) <= 0.5


def test_in_one_step_there_is_nothing_to_search() -> None:
    setting = shared_setting()
    with pytest.raises(ValueError, match="A run of one step computes everything"):
        evolutionary(replace(setting, timesteps=setting.timesteps[:1]), budget=1.0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"budget": 0.1}, "budget is 0.1; with this model it can be 0.200 to 1"),
        ({"population": 1}, "population is 1"),
        ({"generations": -1}, "generations -1"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES["evolutionary"].write(shared_setting(), **knobs)
