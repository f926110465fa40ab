"""How good a schedule is that took ten minutes on two cores: `python benchmarks/ten_minutes.py`.

Trains by the comparison's configuration on two devices, so with half as many updates of two samples each, and exports
by rounding alone: nothing is learned at the export. What comes out is judged on the comparison's test scenes, beside
the best other policy of the comparison, whose cells must be there. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hgc_learn.__main__ import guarded
from hgc_learn.comparison.config import CompareConfig, read_config
from hgc_learn.comparison.metrics import Obedience
from hgc_learn.comparison.ranking import collect
from hgc_learn.comparison.statistics import mean_interval, paired_difference
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.evaluation import picture_psnr, render
from hgc_learn.export.export import decide, load_run
from hgc_learn.export.learning import NOTHING, Learning
from hgc_learn.files import save_json

# Adam moves a logit by the learning rate per update: of half as many updates each moves farther, by the root of two.
CHANGES = ("--trainer.devices=2", "--trainer.limit_train_batches=32", "--model.objective.learning_rate=0.14")


def train(config: Path, folder: Path) -> float:
    """Minutes that `train.py` takes, from its start to its end."""
    paths = f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"
    command = [sys.executable, "train.py", "fit", f"--config={config}", *CHANGES, *paths]
    start = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return (time.monotonic() - start) / 60


def judge(
    config: CompareConfig,
    sampler: str,
    others: dict[float, dict[str, Any]],
    ckpt_path: Path,
    learning: Learning = NOTHING,
) -> Iterator[dict[str, Any]]:
    """A row per budget of what the router is exported as, on the comparison's test scenes; `others` are the cells to
    compare with."""
    module, data = load_run(ckpt_path)
    scenes = draw_batches("test", config.samplers[sampler].num_test, config.batch_size, config.test_offset)
    full = render(module.pipe, module.sampling, scenes).pictures
    full_obedience = Obedience.of(full, scenes)
    for budget, other in others.items():
        start = time.monotonic()
        gates, draft = decide(module, data, budget, learning)
        seconds = time.monotonic() - start
        schedule = module.setting.schedule(draft, policy="learned", settings={})
        pictures = render(module.pipe, module.sampling, scenes, schedule).pictures
        psnr = picture_psnr(pictures, full).tolist()
        obedience = Obedience.of(pictures, scenes).figures(full_obedience)
        difference, interval = paired_difference(psnr, other["samples"]["psnr_db"])
        yield {
            "budget": budget,
            "kept_macs": round(module.router.kept(gates.compute), 4),
            "exporting_seconds": round(seconds, 1),
            "num_samples": len(psnr),
            "psnr_db": round(sum(psnr) / len(psnr), 3),
            "psnr_ci": [round(bound, 3) for bound in mean_interval(psnr)],
            **{name: round(value, 5) for name, value in obedience.items() if name.endswith("_loss")},
            "other": other["policy"],
            "difference_db": round(difference, 3),
            "difference_ci": [round(bound, 3) for bound in interval],
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--config", type=Path, default=Path("configs/compare/demo.yaml"), help="of the comparison")
    parser.add_argument("--folder", type=Path, default=Path("runs/ten_minutes"), help="of the training")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/ten_minutes.json"))
    args = parser.parse_args(argv)
    config = read_config(args.config)
    others = {
        ranking.budget: next(cell for cell in ranking.cells if cell["policy"] != "learned")
        for ranking in collect(config)[0]
        if ranking.sampler == args.sampler
    }  # before the training: they may be missing
    minutes = train(Path(f"configs/compare/train/learned-{args.sampler}.yaml"), args.folder)
    result = {
        "sampler": args.sampler,
        "changes": CHANGES,
        "num_cores": os.cpu_count(),
        "training_minutes": round(minutes, 2),
        "rows": list(judge(config, args.sampler, others, args.folder / "last.ckpt")),
    }
    save_json(args.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
