"""Judges the comparisons' schedules on scenes that nothing has seen: `python benchmarks/unseen.py`.

The test scenes of a comparison have judged more than one version of the learned policy, which may have grown to suit
them. Here the schedules that the comparisons chose, of `learned` and of the best other policy, meet scenes after all of
those. What is in the output already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import read_rows
from rich.progress import track

from hgc_learn.__main__ import guarded
from hgc_learn.comparison.cells import cell_files
from hgc_learn.comparison.config import CompareConfig, read_config
from hgc_learn.comparison.ranking import Ranking, collect
from hgc_learn.comparison.statistics import mean_interval, paired_difference
from hgc_learn.demo.scenes import draw_batches
from hgc_learn.evaluation import picture_psnr, render
from hgc_learn.files import save_json
from hgc_learn.sampling import load_pipeline
from hgc_learn.schedule import HGCSchedule

OFFSET = 50_000
"""Beyond the test scenes of all comparisons."""


def judge(config: CompareConfig, rankings: Sequence[Ranking], num_scenes: int) -> Iterator[dict[str, Any]]:
    """A row for each budget of one sampler."""
    sampling = config.sampling(rankings[0].sampler)
    pipe = load_pipeline(config.model, sampling)
    scenes = draw_batches("test", num_scenes, config.batch_size, OFFSET)
    full = render(pipe, sampling, scenes).pictures

    def psnr(ranking: Ranking, policy: str) -> list[float]:
        schedule = HGCSchedule.load(cell_files(config, ranking.sampler, policy, ranking.budget).schedule)
        values: list[float] = picture_psnr(render(pipe, sampling, scenes, schedule).pictures, full).tolist()
        return values

    for ranking in track(rankings, rankings[0].sampler):
        other = next(cell["policy"] for cell in ranking.cells if cell["policy"] != "learned")
        own, values = psnr(ranking, "learned"), psnr(ranking, other)
        difference, interval = paired_difference(own, values)
        yield {
            "model": config.model,
            "sampler": ranking.sampler,
            "budget": ranking.budget,
            "offset": OFFSET,
            "num_samples": num_scenes,
            "psnr_db": round(sum(own) / num_scenes, 3),
            "psnr_ci": [round(bound, 3) for bound in mean_interval(own)],
            "other": other,
            "other_psnr_db": round(sum(values) / num_scenes, 3),
            "difference_db": round(difference, 3),
            "difference_ci": [round(bound, 3) for bound in interval],
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configs", type=Path, nargs="+", default=[Path(f"configs/compare/{n}.yaml") for n in ("demo", "second")])
    add("--samplers", nargs="+", metavar="NAME", help="of the comparisons (default all)")
    add("--num_scenes", type=int, default=128)
    add("--output", type=Path, default=Path("benchmarks/unseen.json"))
    args = parser.parse_args(argv)
    rows = read_rows(args.output)
    for config in map(read_config, args.configs):
        found, _ = collect(config)
        for sampler in args.samplers or config.samplers:
            rankings = [r for r in found if r.sampler == sampler and len(r.cells) > 1]
            if rankings and not any((row["model"], row["sampler"]) == (config.model, sampler) for row in rows):
                rows += judge(config, rankings, args.num_scenes)
                save_json(args.output, rows)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
