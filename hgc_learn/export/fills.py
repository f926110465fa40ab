"""Learns how a schedule fills in what it skips: per channel, by gradient descent through the runtime itself.

Gates stay as they are. Of the thousands of gates of a schedule only a few dozen are filled in from kept values, all
else is computed or read by nothing: there are few numbers to learn, and every rollout says something about all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hgc_learn.export.kept import NOWHERE, Kept
from hgc_learn.export.learning import OnUpdate, hold_out
from hgc_learn.inference import apply_schedule
from hgc_learn.plan import row_of
from hgc_learn.predictors.fitted_per_channel import FITTED_PER_CHANNEL
from hgc_learn.sampling import generate
from hgc_learn.setting import Draft
from hgc_learn.training.gates import Gates

if TYPE_CHECKING:
    from hgc_learn.training.module import RouterModule

LEARNING_RATES = {"scale": 0.006, "reach": 0.03}
"""At the start; they fall to 0 linearly. A scale that is 5 % off ruins a trajectory."""

BATCH_SIZE = 4
"""More and noisier updates do better than fewer of larger batches, for the same number of samples."""


def learn_fills(
    module: RouterModule,
    gates: Gates,
    batches: Sequence[dict[str, Any]],
    num_updates: int,
    *,
    at_once: int = BATCH_SIZE,
    kept: Kept = NOWHERE,
    on_update: OnUpdate = lambda *_: None,
) -> Draft:
    """The schedule filled in by `fitted_per_channel`, whose scales and reaches lower the mean log error of the outcome;
    the schedule as it is where samples that were not learned from do not confirm that.

    Args:
        batches: training batches; a quarter of them, the last, judge.
        num_updates: of Adam, each on one batch; the batches are taken in turns.
        at_once: samples that run at once; the gradients of a batch are added up.
        kept: to go on from where it was interrupted.
    """
    start = per_channel(module, gates)
    if not num_updates or not start.tensors:
        return module.draft(gates)
    learned, judges = hold_out(batches)
    for batch in learned:
        module.teacher_latents(batch)  # before a schedule is applied
    tensors = {name: tensor.to(module.device).requires_grad_() for name, tensor in start.tensors.items()}
    groups = [{"params": [t], "lr": LEARNING_RATES[name.rpartition("/")[2]]} for name, t in tensors.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
    file = module.setting.schedule(start, policy=module.objective.policy, settings={})
    checkpointing = module.hparams["gradient_checkpointing"]

    def state() -> dict[str, Any]:
        numbers = {name: tensor.detach() for name, tensor in tensors.items()}
        return {"tensors": numbers, "optimizer": optimizer.state_dict(), "decay": decay.state_dict()}

    def restore(states: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            tensor.data.copy_(states["tensors"][name])
        optimizer.load_state_dict(states["optimizer"])
        decay.load_state_dict(states["decay"])

    with apply_schedule(module.pipe, file) as handle:
        for update in kept.updates("fill", num_updates, state, restore):
            samples, loss = learned[update % len(learned)], 0.0
            num_samples = len(samples["text"])
            optimizer.zero_grad()
            for first in range(0, num_samples, at_once):
                part = slice(first, first + at_once)
                handle.use_tensors(tensors, gradient_checkpointing=checkpointing)
                batch = {name: values[part] for name, values in samples.items()}
                outcome = module.outcome(generate(module.pipe, module.sampling, batch, grad=True))
                errors = (outcome - module.target(batch)).square().flatten(1).mean(1)
                share = errors.clamp_min(1e-30).log().sum() / num_samples
                share.backward()
                loss += float(share.detach())
            if all(t.grad is None or t.grad.isfinite().all() for t in tensors.values()):  # else a trajectory is lost
                optimizer.step()
            decay.step()
            on_update("fill", update, loss)
    after = Draft(start.sites, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    drafts = [after, module.draft(gates)]
    return min(drafts, key=lambda draft: module.log_error(judges, draft))


def per_channel(module: RouterModule, gates: Gates) -> Draft:
    """The same fill-ins, by `fitted_per_channel`."""
    sites: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for column, site in enumerate(module.router.sites):
        is_filled = ~gates.compute[:, column]
        if is_filled.any():
            sites[site] = row_of(gates.compute[:, column].tolist(), FITTED_PER_CHANNEL.code)
            reach = gates.reach[is_filled, column, None].repeat(1, module.costs[site].channels)
            tensors |= {f"{site}/scale": torch.ones_like(reach), f"{site}/reach": reach}
    return Draft(sites, tensors)
