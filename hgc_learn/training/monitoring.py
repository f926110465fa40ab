"""What TensorBoard shows of a training beside its curves: gate heatmaps and full-against-cached pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from hgc_learn.figures import gate_heatmap, picture_grid
from hgc_learn.setting import Draft
from hgc_learn.training.module import RouterModule


class ScheduleMonitor(L.Callback):
    """Draws, after every validation and for every budget, the gates and the pictures that the schedule gives.

    Args:
        num_pictures: pictures per grid, of the first validation samples; 0 for none.
    """

    def __init__(self, num_pictures: int = 4):
        self.num_pictures = num_pictures

    def _first(self, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """As many samples, from as many batches as it takes, as one batch."""
        texts: list[str] = []
        tensors: dict[str, list[Tensor]] = {"conditioning_image": [], "seed": []}
        for batch in batches:
            texts += batch["text"]
            for name, parts in tensors.items():
                parts.append(batch[name])
            if len(texts) >= self.num_pictures:
                break
        joined = {name: torch.cat(parts)[: self.num_pictures] for name, parts in tensors.items()}
        return {"text": texts[: self.num_pictures], **joined}

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RouterModule)
        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or trainer.sanity_checking or not trainer.is_global_zero:
            return
        board, step = boards[0], trainer.global_step
        router = pl_module.router
        for budget in pl_module.hparams["budgets"]:
            gates = pl_module.gates(budget)
            if pl_module.objective.draw(router, budget, torch.Generator(pl_module.device)) is not None:
                p = router.probabilities(router.price(budget))
                board.add_figure(f"gates/{budget:g}/soft", gate_heatmap(p.cpu(), router.sites, "P(compute)"), step)
            heatmap = gate_heatmap(gates.compute, router.sites, "exported", router.dead(gates.compute))
            board.add_figure(f"gates/{budget:g}/hard", heatmap, step)
        if self.num_pictures < 1:
            return
        assert trainer.val_dataloaders is not None
        batch = self._first(trainer.val_dataloaders)
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        full = _one_by_one(pl_module, batch, None)
        for budget in pl_module.hparams["budgets"]:
            cached = _one_by_one(pl_module, batch, pl_module.draft(pl_module.gates(budget)))
            rows = {
                "control": batch["conditioning_image"],
                "full": full,
                f"cached at {budget:g}": cached,
                "difference x 4": 4 * (full - cached).abs(),
            }
            board.add_figure(f"pictures/{budget:g}", picture_grid(rows, batch["text"]), step)


def _one_by_one(pl_module: RouterModule, batch: dict[str, Any], draft: Draft | None) -> Tensor:
    """Pictures [batch, 3, height, width] of samples that run alone: of real models several at once need memory that a
    training with a `batch_size` of 1 may not have."""
    samples = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(len(batch["text"]))]
    return torch.cat([pl_module.rollout(sample, draft, "pt") for sample in samples])
