"""Sets the knobs of a policy for a budget: count all candidates, try few, keep the best."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hgc_learn.comparison.config import TuningConfig
from hgc_learn.plan import COMPUTE
from hgc_learn.policies import Policy
from hgc_learn.setting import Draft, Setting

NEAR = 0.9  # of the MACs of the candidate closest to the budget: as good a use of it


@dataclass(frozen=True)
class Candidate:
    """Knobs, the draft that they make and the fraction of the full MACs that it keeps."""

    knobs: dict[str, Any]
    draft: Draft
    kept: float


@dataclass
class Candidates:
    """What a policy offers.

    Attributes:
        found: drafts that differ, in the order of the policy's grid.
        num_candidates: how many combinations of knobs there were.
        refused: what the policy raised at combinations that it cannot write.
    """

    found: list[Candidate] = field(default_factory=list)
    num_candidates: int = 0
    refused: list[ValueError] = field(default_factory=list)


def combinations(policy: Policy, setting: Setting, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Of knobs. A grid may vary what is fixed, the budget for one: such combinations are the same."""
    grid = [{**knobs, **fixed} for knobs in policy.candidates(setting)]
    return list({repr(sorted(knobs.items())): knobs for knobs in grid}.values())


def list_candidates(policy: Policy, setting: Setting, fixed: dict[str, Any]) -> Candidates:
    """Writes and counts every candidate of a policy; `fixed` are knobs that are not tuned. No pictures are made but by
    policies that do so themselves."""
    result = Candidates()
    seen = set()
    for knobs in combinations(policy, setting, fixed):
        result.num_candidates += 1
        try:
            draft = policy.write(setting, **knobs)
            kept = setting.kept(draft)
        except ValueError as error:
            result.refused.append(error)
            continue
        if (key := _identity(draft)) not in seen:
            seen.add(key)
            result.found.append(Candidate(knobs, draft, kept))
    return result


def shortlist(candidates: Iterable[Candidate], budget: float, tuning: TuningConfig) -> list[Candidate]:
    """Those within the budget that are worth a trial, the policy's variants in turns: candidates are of one variant if
    all their knobs that are not numbers agree."""
    variants: dict[Any, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: -c.kept):
        if candidate.kept <= budget + tuning.tolerance:
            variant = tuple((name, repr(v)) for name, v in candidate.knobs.items() if _is_word(v))
            variants.setdefault(variant, []).append(candidate)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*map(_spread, variants.values())))
    return [candidate for candidate in turns if candidate is not None][: tuning.max_candidates]


def _spread(variant: list[Candidate]) -> list[Candidate]:
    """The candidates of a variant, given by falling MACs, in the order in which they are worth a trial: the one closest
    to the budget; of the others about as close, always the one least like those before it; then the rest.

    The closest ones alone would mostly be the same schedule but for a step or a site.
    """
    near = [candidate for candidate in variant if candidate.kept >= NEAR * variant[0].kept]
    names = [name for name, value in near[0].knobs.items() if not _is_word(value)]
    ranks = {name: {v: i for i, v in enumerate(sorted({c.knobs[name] for c in near}))} for name in names}

    def distance(one: Candidate, other: Candidate) -> float:
        steps = (abs(rank[one.knobs[n]] - rank[other.knobs[n]]) / max(1, len(rank) - 1) for n, rank in ranks.items())
        return sum(steps)

    order, left = near[:1], near[1:]
    nearest = [distance(candidate, order[0]) for candidate in left]
    while left:
        index = max(range(len(left)), key=nearest.__getitem__)
        order.append(left.pop(index))
        nearest.pop(index)
        nearest = [min(d, distance(candidate, order[-1])) for d, candidate in zip(nearest, left, strict=True)]
    return order + variant[len(near) :]


def best(
    shortlisted: Sequence[Candidate], tuning: TuningConfig, judge: Callable[[Candidate, range], Sequence[float]]
) -> tuple[Candidate, int]:
    """The candidate with the best mean PSNR by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), and
    how many were tried.

    No round makes more pictures than a first one of `max_candidates` does: the fewer are left, the more scenes each is
    judged on. The better half goes on, until those left have seen all scenes or are one. A single candidate needs no
    trial.

    Args:
        judge: `judge(candidate, scenes)` makes these scenes of the tuning set and returns the PSNR of each. One that
            is not finite counts as minus infinity.
    """
    left = list(shortlisted)
    num_tried = len(left) if len(left) > 1 else 0
    pictures = tuning.max_candidates * tuning.num_screening_scenes
    seen: list[list[float]] = [[] for _ in left]
    while len(left) > 1:
        num_scenes = min(tuning.num_scenes, max(tuning.num_screening_scenes, pictures // len(left)))
        for candidate, psnr in zip(left, seen, strict=True):
            if len(psnr) < num_scenes:
                psnr.extend(judge(candidate, range(len(psnr), num_scenes)))
        scores = [_mean(psnr) for psnr in seen]
        num_left = 1 if num_scenes == tuning.num_scenes else math.ceil(len(left) / 2)
        order = sorted(range(len(left)), key=lambda i: -scores[i])[:num_left]
        left, seen = [left[i] for i in order], [seen[i] for i in order]
    return left[0], num_tried


def _mean(psnr: Sequence[float]) -> float:
    """Minus infinity if a trajectory is lost."""
    mean = sum(psnr) / len(psnr)
    return mean if math.isfinite(mean) else -math.inf


@dataclass
class RolloutCount:
    """Pictures that were made, cached or not; one of fewer steps is that fraction of a picture."""

    num_samples: float = 0.0


@contextmanager
def count_rollouts(setting: Setting) -> Iterator[RolloutCount]:
    """Counts what runs through the setting's UNet, whoever runs it."""
    count = RolloutCount()
    calls_per_sample = setting.num_steps * setting.num_halves

    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count.num_samples += len(args[0] if args else kwargs["sample"]) / calls_per_sample

    hook = setting.pipe.unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def _is_word(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def _identity(draft: Draft) -> str:
    rows = sorted((site, row) for site, row in draft.sites.items() if set(row) != {COMPUTE})
    digest = hashlib.sha256(repr((rows, draft.timesteps)).encode())
    for name, tensor in sorted(draft.tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
