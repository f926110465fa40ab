"""How much of the lead over the search lies in what may be chosen, and how much in the learning:
`python benchmarks/search_space.py`.

Trains a router by the comparison's configuration on about what the search can choose: the outputs of layers and
attentions, the ControlNet's residuals, the guidance difference and the prediction, all held. There are no residual
branches, nothing is extrapolated, and an export learns no fill-ins. Where the search holds all attentions of a step, or
the whole encoder, or none, the router has a gate for each. What comes out is judged beside the search, whose cells must
be there, on the comparison's test scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from ablation import holding
from seeds import Recipe
from ten_minutes import judge

from hgc_learn.__main__ import guarded
from hgc_learn.comparison.config import read_config
from hgc_learn.comparison.ranking import collect
from hgc_learn.export.learning import Learning
from hgc_learn.files import save_json

SITES = ("unet.*s.?:out", "*.attn?:out", "*:control", "unet:eps", "unet:guidance")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="UniPC-20")
    parser.add_argument("--config", type=Path, default=Path("configs/compare/second.yaml"), help="of the comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/search_space.json"))
    args = parser.parse_args(argv)
    config = read_config(args.config)
    searched = {
        ranking.budget: cell
        for ranking in collect(config)[0]
        for cell in ranking.cells
        if ranking.sampler == args.sampler and cell["policy"] == "evolutionary"
    }  # before the training: they may be missing
    what = {"model": config.model, "sampler": args.sampler, "sites": SITES, "seed": args.seed}
    with holding():
        sites = f"--model.sites={json.dumps(SITES)}"
        ckpt_path, minutes = Recipe(args.sampler, config.model).trained(args.seed, Path("runs/search_space"), sites)
        rows = []
        for row in judge(config, args.sampler, searched, ckpt_path, Learning(fill_updates=0)):
            rows.append(row)
            save_json(args.output, {**what, "training_minutes": minutes, "rows": rows})
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(guarded(main))
