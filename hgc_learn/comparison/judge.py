"""Tunes a policy's knobs for a cell, judges it on the test set, and keeps all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgc_learn.comparison.cells import CellFiles, cell_files, check_weights, protocol
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.metrics import Obedience, SceneFID, closeness_figures, optional_metric
from hgc_learn.comparison.samples import full_samples, read_batches
from hgc_learn.comparison.trained import checkpoint, training_configuration, training_folders
from hgc_learn.comparison.tune import Candidate, Candidates, best, count_rollouts, list_candidates, shortlist
from hgc_learn.evaluation import Samples, closeness, picture_psnr, render
from hgc_learn.files import plain
from hgc_learn.models.macs import BudgetError
from hgc_learn.policies import Policy
from hgc_learn.policies.learned import kept_path
from hgc_learn.rollouts import kept_rollouts
from hgc_learn.sampling import load_pipeline
from hgc_learn.setting import Setting

Say = Callable[[str], None]
DIGITS = 6
SEARCH_BATCH_SIZE = 8
"""Small, for a search drops most schedules after the first batch."""


class Judge:
    """A sampler's pipeline and samples, which its cells share; what is expensive is made when it is first used."""

    def __init__(self, config: CompareConfig, sampler: str, redone: Collection[tuple[str, str, float]] = ()):
        """Raises ValueError where a cell that is there, and is not `redone`, was made with other weights."""
        self.config, self.sampler = config, sampler
        self.sampling = config.sampling(sampler)
        self.pipe = load_pipeline(config.model, self.sampling)
        calibration = read_batches(config, "train", config.tuning.num_calibration, config.batch_size)
        search = read_batches(config, "train", config.tuning.num_search, min(SEARCH_BATCH_SIZE, config.batch_size))
        self.setting = Setting.of_pipeline(self.pipe, self.sampling, calibration, search)
        check_weights(config, sampler, self.setting.fingerprint, redone)
        self.test = read_batches(
            config, "test", config.samplers[sampler].num_test, config.batch_size, config.test_offset
        )
        (self.tuning,) = read_batches(config, "validation", config.tuning.num_scenes, config.tuning.num_scenes)
        self.optional = {name: optional_metric(name) for name in config.optional_metrics}

    def _full(self, name: str, split: str, batches: list[dict[str, Any]]) -> Samples:
        path = Path(self.config.output) / "references" / f"{self.sampler}-{name}.safetensors"
        weights = self.setting.fingerprint.to_dict()
        return full_samples(path, self.pipe, self.sampling, split, batches, weights=weights)

    @cached_property
    def test_full(self) -> Samples:
        return self._full("test", "test", self.test)

    @cached_property
    def tuning_full(self) -> Samples:
        return self._full("tuning", "validation", self._tuning_batches(range(self.config.tuning.num_scenes)))

    def make_references(self) -> None:
        for samples in (self.tuning_full, self.test_full):
            assert len(samples)

    @cached_property
    def fid(self) -> SceneFID:
        return SceneFID(torch.cat([batch["image"] for batch in self.test]) / 2 + 0.5)

    @cached_property
    def full_obedience(self) -> Obedience:
        return Obedience.of(self.test_full.pictures, self.test)

    @cached_property
    def full_figures(self) -> dict[str, Any]:
        """Of the uncached pictures themselves."""
        figures = self.full_obedience.figures(self.full_obedience)
        return {
            "control_miou": figures["control_miou"],
            "color_accuracy": figures["color_accuracy"],
            "fid": self.fid(self.test_full.pictures),
        }

    def scene_figures(self, pictures: Tensor) -> dict[str, Any]:
        """Obedience and realism, which only drawn scenes have a measure of: their shapes and colours are known."""
        if self.config.data is not None:
            return {}
        figures = Obedience.of(pictures, self.test).figures(self.full_obedience)
        return figures | {"fid": self.fid(pictures), "fid_num_samples": len(pictures), "full": self.full_figures}

    def tuning_psnr(self, candidate: Candidate, policy: Policy, scenes: range) -> list[float]:
        """PSNR on each of these tuning scenes."""
        schedule = policy.file(self.setting, candidate.draft, plain(candidate.knobs))
        samples = render(self.pipe, self.sampling, self._tuning_batches(scenes), schedule)
        psnr: list[float] = picture_psnr(samples.pictures, self.tuning_full.pictures[_slice(scenes)]).tolist()
        return psnr

    def _tuning_batches(self, scenes: range) -> list[dict[str, Any]]:
        """Of some tuning scenes, no more at once than the configuration says."""
        size = self.config.batch_size
        parts = [scenes[start : start + size] for start in range(0, len(scenes), size)]
        return [{name: values[_slice(part)] for name, values in self.tuning.items()} for part in parts]


class PolicyCells:
    """A policy under a sampler: the candidates that do not depend on the budget are written once for all budgets."""

    def __init__(self, judge: Judge, policy: Policy, say: Say):
        self.judge, self.policy, self.say = judge, policy, say

    @property
    def needs_checkpoint(self) -> bool:
        return "ckpt_path" in self.policy.knobs

    @cached_property
    def ckpt_paths(self) -> list[str]:
        """Of its trainings."""
        which = self.judge.config, self.judge.sampler, self.policy.name
        seeds = range(len(training_folders(*which)))
        return [str(checkpoint(*which, self.judge.setting.fingerprint, seed)) for seed in seeds]

    @cached_property
    def _candidates_at_any_budget(self) -> Candidates:
        return list_candidates(self.policy, self.judge.setting, self._fixed())

    def _fixed(self) -> dict[str, Any]:
        fixed = self.judge.config.fixed.get(self.policy.name, {})
        if not self.needs_checkpoint:
            return fixed
        ckpt_path, *others = self.ckpt_paths
        return {**fixed, "ckpt_path": ckpt_path, **({"other_ckpt_paths": tuple(others)} if others else {})}

    def candidates(self, budget: float) -> Candidates:
        if "budget" in self.policy.knobs:
            return list_candidates(self.policy, self.judge.setting, {**self._fixed(), "budget": budget})
        return self._candidates_at_any_budget

    def run(self, budget: float) -> dict[str, Any]:
        """Tunes and judges one cell, writes its schedule; returns its figures, or the reason why there are
        none."""
        judge, config = self.judge, self.judge.config
        files = cell_files(config, judge.sampler, self.policy.name, budget)
        row: dict[str, Any] = {"policy": self.policy.name, "sampler": judge.sampler, "budget": budget}
        row["protocol"] = protocol(config, judge.sampler)
        row["fixed"] = plain(config.fixed.get(self.policy.name, {}))
        if self.needs_checkpoint:
            row["training"] = training_configuration(config, judge.sampler, self.policy.name)
            row["num_trainings"] = len(self.ckpt_paths)
        judge.make_references()  # shared by all cells: not part of what tuning costs

        start = time.monotonic()
        is_resumed = self.needs_checkpoint and kept_path(self.ckpt_paths[0], budget).is_file()
        with count_rollouts(judge.setting) as rollouts, kept_rollouts(judge.setting, files.kept) as is_resumed_search:
            self.say("writing candidates")
            offered = self.candidates(budget)
            shortlisted = shortlist(offered.found, budget, config.tuning)
            if not shortlisted:
                return row | {"reason": _reason(offered), "num_candidates": offered.num_candidates}

            trial = 0

            def psnr(candidate: Candidate, scenes: range) -> list[float]:
                nonlocal trial
                trial += 1
                self.say(f"trial {trial}, {len(shortlisted)} candidates")
                return judge.tuning_psnr(candidate, self.policy, scenes)

            chosen, num_tried = best(shortlisted, config.tuning, psnr)
        row["tuning"] = {
            "num_candidates": offered.num_candidates,
            "num_refused": len(offered.refused),
            "num_tried": num_tried,
            "sample_rollouts": round(rollouts.num_samples, 1),
            "seconds": round(time.monotonic() - start, 1),
            **({"resumed": True} if is_resumed or is_resumed_search else {}),
        }
        return row | self._figures(chosen, files)

    def _figures(self, chosen: Candidate, files: CellFiles) -> dict[str, Any]:
        judge = self.judge
        self.say("test set")
        schedule = self.policy.file(judge.setting, chosen.draft, plain(chosen.knobs))
        samples = render(judge.pipe, judge.sampling, judge.test, schedule)
        if not samples.latents.isfinite().all():
            raise ValueError("what the chosen schedule makes of the test scenes is not finite")
        per_sample = closeness(samples, judge.test_full)
        figures: dict[str, Any] = closeness_figures(per_sample)
        figures |= judge.scene_figures(samples.pictures)
        prompts = [prompt for batch in judge.test for prompt in batch["text"]]
        figures |= {name: metric(samples, judge.test_full, prompts) for name, metric in judge.optional.items()}
        figures = _rounded(figures)

        fidelity = {name: figures[name] for name in ("psnr_db", "ssim", "latent_rel_l2")}
        fidelity |= {"num_samples": len(samples), "split": "test"}
        replace(schedule, fidelity=fidelity).save(files.schedule)
        attention = schedule.macs["cached_attention"] / schedule.macs["full_attention"]
        return {
            "kept_macs": round(chosen.kept, DIGITS),
            "kept_macs_attention": round(attention, DIGITS),
            "num_samples": len(samples),
            **figures,
            "settings": plain({**self.policy.knobs, **chosen.knobs}),
            "samples": {name: _rounded(values.tolist()) for name, values in per_sample.items()},
        }


def _reason(offered: Candidates) -> str:
    """Why no candidate meets the budget.

    Raises:
        ValueError: the policy refused every candidate, and none for the budget.
    """
    if offered.found:
        least = min(offered.found, key=lambda candidate: candidate.kept)
        knobs = ", ".join(f"{name}={value}" for name, value in plain(least.knobs).items())
        return f"keeps at least {least.kept:.4f} of the MACs, at {knobs or 'its only setting'}"
    for refusal in offered.refused:
        if isinstance(refusal, BudgetError):
            return str(refusal)
    words = f"; the first: {offered.refused[0]}" if offered.refused else ""
    raise ValueError(f"none of its {offered.num_candidates} candidates could be written{words}")


def _slice(scenes: range) -> slice:
    return slice(scenes.start, scenes.stop)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, DIGITS) if isinstance(value, float) else value
