"""Train the network that FID takes its features from: `python -m hgc_learn.demo.train_features`. Minutes on one core.

It looks at drawn scenes of the training split and tells, for every shape, its colour or that it is absent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import trange

from hgc_learn.__main__ import guarded
from hgc_learn.demo.features import ABSENT, FEATURES_FILE, SceneRecogniser, save_recogniser
from hgc_learn.demo.scenes import SceneDataset


def draw(split: str, num_scenes: int) -> TensorDataset:
    """Pictures uint8 [N, 3, 64, 64] and answers int64 [N, kinds]: the shape's colour, or ABSENT."""
    scenes = SceneDataset(split, num_scenes)
    pictures, answers = [], []
    for index in trange(num_scenes, desc=f"drawing {split} scenes", unit="scene"):
        scene = scenes[index]
        pictures.append((127.5 * scene["image"] + 127.5).round().byte())
        colors = scene["object_colors"][1:]  # without the background
        answers.append(torch.where(colors < 0, ABSENT, colors))
    return TensorDataset(torch.stack(pictures), torch.stack(answers))


class RecogniserModule(L.LightningModule):
    """Cross-entropy over every shape's answer; pictures are turned and mirrored, which no answer depends on."""

    learning_rate = 5e-3

    def __init__(self) -> None:
        super().__init__()
        self.recogniser = SceneRecogniser()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        total = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, answers = batch[0] / 255, batch[1]
        pictures = torch.rot90(pictures, int(torch.randint(4, ())), (2, 3))
        if torch.rand(()) < 0.5:
            pictures = pictures.flip(3)
        loss = F.cross_entropy(self.recogniser(pictures).transpose(1, 2), answers)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = self.recogniser(batch[0] / 255).argmax(-1) == batch[1]
        present = batch[1] != ABSENT
        self.log_dict({"accuracy": right.float().mean(), "accuracy_present": right[present].float().mean()})


def train_features(output: Path, *, num_scenes: int, num_steps: int, batch_size: int, seed: int) -> dict[str, float]:
    """Trains and writes `output`; returns the accuracies on validation scenes: of all answers, and of those about
    shapes that are there."""
    L.seed_everything(seed)
    module = RecogniserModule()
    trainer = L.Trainer(
        accelerator="cpu",  # small enough, and the same everywhere
        max_steps=num_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(draw("train", num_scenes), batch_size, shuffle=True, drop_last=True))
    if trainer.interrupted:
        raise KeyboardInterrupt
    (figures,) = trainer.test(module, DataLoader(draw("validation", max(64, num_scenes // 20)), 64), verbose=False)
    save_recogniser(module.recogniser, output)
    return dict(figures)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=FEATURES_FILE)
    parser.add_argument("--num_scenes", type=int, default=10_000)
    parser.add_argument("--num_steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    figures = train_features(
        args.output, num_scenes=args.num_scenes, num_steps=args.num_steps, batch_size=args.batch_size, seed=args.seed
    )
    print(f"wrote {args.output}: {', '.join(f'{name} {value:.4f}' for name, value in figures.items())}")


if __name__ == "__main__":
    sys.exit(guarded(main))
