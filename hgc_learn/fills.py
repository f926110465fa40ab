"""Learns how a schedule fills in what it skips: per channel, by gradient descent through the runtime itself.

Gates stay as they are. Of the thousands of gates of a schedule only a few dozen are filled in from kept values, all
else is computed or read by nothing: there are few numbers to learn, and every rollout says something about all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgc_learn.inference import apply_schedule
from hgc_learn.predictors.fitted import FITTED
from hgc_learn.predictors.hold import HOLD
from hgc_learn.predictors.linear import LINEAR
from hgc_learn.predictors.tuned import TUNED
from hgc_learn.rollout import generate
from hgc_learn.setting import Draft

if TYPE_CHECKING:
    from hgc_learn.training import RouterModule

LEARNING_RATES = {"scale": 0.006, "reach": 0.03}
"""At the start; they fall to 0 linearly. A scale that is 5 % off ruins a trajectory."""

BATCH_SIZE = 4
"""More and noisier updates do better than fewer of larger batches, for the same number of samples."""

WEIGHTS = {HOLD.code: (1.0, 0.0), LINEAR.code: (1.0, 1.0)}
"""Scale and reach of the predictors that have none of their own."""

Report = Callable[[int, float], None]
"""(update, mean log squared error of the latents on its batch)."""


def tune_fills(
    module: RouterModule,
    draft: Draft,
    batches: Sequence[dict[str, Any]],
    num_updates: int,
    *,
    report: Report = lambda *_: None,
) -> Draft:
    """The draft with `hold`, `linear` and `fitted` replaced by `tuned`, whose scales and reaches lower the mean log
    error of the final latents; the draft itself where samples that were not learned from do not confirm that.

    Args:
        batches: training batches; a quarter of them, the last, judge.
        num_updates: of Adam, each on one batch; the batches are taken in turns.
    """
    learned, judges = batches[: -(len(batches) // 4) or None], batches[-(len(batches) // 4) :]
    targets = [module.teacher_latents(batch) for batch in batches]  # before a schedule is applied
    start = as_tuned(module, draft)
    if not num_updates or not start.tensors:
        return draft
    tensors = {name: tensor.to(module.device).requires_grad_() for name, tensor in start.tensors.items()}
    groups = [{"params": [t], "lr": LEARNING_RATES[name.rpartition("/")[2]]} for name, t in tensors.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
    schedule = module.setting.schedule(start, policy=module.objective.policy, settings={})
    with apply_schedule(module.pipe, schedule) as handle:
        before = _log_error(module, judges, targets[-len(judges) :])
        for update in range(num_updates):
            index = update % len(learned)
            handle.use_tensors(tensors, gradient_checkpointing=module.hparams["gradient_checkpointing"])
            latents = generate(module.pipe, module.sampling, learned[index], grad=True)
            loss = _log_errors(latents, targets[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            report(update, float(loss.detach()))
        found = {name: tensor.detach() for name, tensor in tensors.items()}
        handle.use_tensors(found)
        is_better = _log_error(module, judges, targets[-len(judges) :]) < before
    return Draft(start.sites, {name: tensor.cpu() for name, tensor in found.items()}) if is_better else draft


def as_tuned(module: RouterModule, draft: Draft) -> Draft:
    """The same fill-ins, by `tuned`."""
    sites, tensors = {}, {}
    for site, row in draft.sites.items():
        weights = [_weights(draft, site, step) for step, code in enumerate(row) if code in (*WEIGHTS, FITTED.code)]
        sites[site] = "".join(TUNED.code if code in (*WEIGHTS, FITTED.code) else code for code in row)
        if weights:
            channels = module.costs[site].channels
            for name, values in zip(LEARNING_RATES, zip(*weights, strict=True), strict=True):
                tensors[f"{site}/{name}"] = torch.tensor(values)[:, None].repeat(1, channels)
    return Draft(sites, tensors)


def _weights(draft: Draft, site: str, step: int) -> tuple[float, float]:
    code = draft.sites[site][step]
    if code in WEIGHTS:
        return WEIGHTS[code]
    scale, reach = (float(draft.tensors[f"{site}/{name}"][step]) for name in LEARNING_RATES)
    return scale, reach


def _log_errors(latents: Tensor, target: Tensor) -> Tensor:
    return (latents - target).square().flatten(1).mean(1).clamp_min(1e-30).log()


@torch.no_grad()
def _log_error(module: RouterModule, batches: Sequence[dict[str, Any]], targets: Sequence[Tensor]) -> float:
    errors = [
        _log_errors(generate(module.pipe, module.sampling, batch), target)
        for batch, target in zip(batches, targets, strict=True)
    ]
    return float(torch.cat(errors).mean())
