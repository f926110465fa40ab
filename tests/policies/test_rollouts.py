"""Rollouts of drafts: what they are judged by, each once, and kept while a search is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measured import measured_setting, single_sample_setting
from torch import Tensor

import hgc_learn.rollouts
from hgc_learn.comparison.tune import count_rollouts
from hgc_learn.inference import HGCSchedule, apply_schedule, remove_schedule
from hgc_learn.policies.evolutionary import evolutionary
from hgc_learn.rollouts import kept_rollouts, mean_psnr
from hgc_learn.sampling import generate
from hgc_learn.setting import Draft, Setting

DRAFTS = [Draft({"unet:eps": row}) for row in ("CC-C-", "C-CC-", "CCC--")]


def test_mean_psnr_is_that_of_the_applied_schedule() -> None:
    setting = measured_setting()
    draft = Draft({"unet:eps": "CC-C-"})
    schedule: HGCSchedule = setting.schedule(draft, policy="by_hand", settings={})
    expected: list[float] = []
    for batch in setting.batches:
        full = generate(setting.pipe, setting.sampling, batch, output_type="pt")
        apply_schedule(setting.pipe, schedule)
        cached = generate(setting.pipe, setting.sampling, batch, output_type="pt")
        remove_schedule(setting.pipe)
        expected += (-10 * (cached - full).square().flatten(1).mean(1).log10()).tolist()
    assert mean_psnr(setting, draft) == pytest.approx(sum(expected) / len(expected))
    with count_rollouts(setting) as rollouts:
        assert mean_psnr(setting, draft) == pytest.approx(sum(expected) / len(expected))
        assert rollouts.num_samples == 0
    assert mean_psnr(setting, Draft({})) == 120
    num_first = len(setting.batches[0]["seed"])
    assert mean_psnr(setting, draft, num_batches=1) == pytest.approx(sum(expected[:num_first]) / num_first)
    with count_rollouts(setting) as rollouts:
        other = replace(setting, search_batches=setting.batches[1:], memo={})
        assert mean_psnr(other, draft) == pytest.approx(sum(expected[num_first:]) / (len(expected) - num_first))
        assert rollouts.num_samples == pytest.approx(2 * (len(expected) - num_first))  # uncached and cached


@contextmanager
def interrupted_after(number: int) -> Iterator[None]:
    """Ctrl-C in the middle of a rollout."""
    measure, left = hgc_learn.rollouts._psnr, number

    def measured(*args: Any) -> dict[int, Tensor]:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hgc_learn.rollouts, "_psnr", measured)
        yield


def anew() -> Setting:
    """As another process has it."""
    return replace(single_sample_setting(), memo={})


def test_an_interrupted_search_goes_on_and_finds_what_an_unbroken_one_finds(tmp_path: Path) -> None:
    knobs = {"budget": 0.5, "population": 4, "generations": 2}
    whole, parts, path = anew(), [anew(), anew(), anew()], tmp_path / "a" / "search.kept"
    with count_rollouts(whole) as expected:
        found = evolutionary(whole, **knobs)
    num_samples = 0.0
    for setting, after in ((parts[0], 3), (parts[1], 4)):
        with (
            count_rollouts(setting) as rollouts,
            pytest.raises(KeyboardInterrupt, match="the same command goes on"),
            interrupted_after(after),
            kept_rollouts(setting, path) as is_resumed,
        ):
            evolutionary(setting, **knobs)
        assert is_resumed == (setting is parts[1])
        num_samples += rollouts.num_samples
    with count_rollouts(parts[2]) as rollouts, kept_rollouts(parts[2], path) as is_resumed:
        assert is_resumed
        assert evolutionary(parts[2], **knobs) == found
        assert path.is_file()
    assert not path.exists()
    num_references = 2 * sum(len(batch["seed"]) for batch in whole.search_batches)  # made by each of three
    assert num_samples + rollouts.num_samples == pytest.approx(expected.num_samples + num_references)


def test_what_was_cut_off_or_is_of_another_setting_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "search.kept"
    expected = [mean_psnr(measured_setting(), draft) for draft in DRAFTS]

    def begin(setting: Setting) -> None:
        with pytest.raises(RuntimeError), kept_rollouts(setting, path):
            for draft in DRAFTS[:2]:
                mean_psnr(setting, draft)
            raise RuntimeError

    def num_resumed(setting: Setting) -> float:
        with count_rollouts(setting) as rollouts, kept_rollouts(setting, path):
            assert [mean_psnr(setting, draft) for draft in DRAFTS] == expected
        return rollouts.num_samples

    def fresh() -> Setting:
        return replace(measured_setting(), memo={})

    num_samples = sum(len(batch["seed"]) for batch in fresh().search_batches)
    begin(fresh())
    whole = path.read_bytes()
    assert num_resumed(fresh()) == pytest.approx(2 * num_samples)  # uncached, and the third
    path.write_bytes(whole[:-9])
    assert 2 * num_samples < num_resumed(fresh()) < 3 * num_samples
    for other in (whole.replace(whole[:8], b"00000000", 1), b"", b"\n", b"{oops"):
        path.write_bytes(other)
        assert num_resumed(fresh()) == pytest.approx(4 * num_samples)


def test_where_nothing_was_measured_no_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.kept"
    with pytest.raises(KeyboardInterrupt, match=r"^$"), kept_rollouts(anew(), path):
        raise KeyboardInterrupt
    assert not path.exists()
