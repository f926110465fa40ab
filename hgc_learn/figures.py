"""Pictures to look at: what a schedule does, and what comes out of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from hgc_learn.files import write_atomically


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Writes a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getbuffer())


def gate_heatmap(gates: ArrayLike, sites: Sequence[str], title: str = "", dead: ArrayLike | None = None) -> Figure:
    """Draws gates [steps, sites], 0 reuse to 1 compute, as a picture of sites x steps; `dead` [steps, sites] are those
    that make no difference, because nothing reads their site at that step."""
    values = np.ma.masked_array(np.asarray(gates, dtype=float), False if dead is None else np.asarray(dead, bool)).T
    figure = Figure(figsize=(3 + 0.22 * values.shape[1], 1.5 + 0.13 * len(sites)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(sites)), [_short(site) for site in sites], fontsize=5)
    axes.set_xlabel("step")
    colours = "yellow: compute, dark: reuse" + (", grey: not needed" if dead is not None else "")
    axes.set_title(f"{title}\n{colours}".strip(), fontsize=8)
    return figure


def picture_grid(rows: dict[str, Tensor], titles: Sequence[str] = ()) -> Figure:
    """Draws pictures under each other, a sample a column.

    Args:
        rows: by heading, pictures [samples, 3, height, width] in [0, 1].
        titles: one per sample, shown above it.
    """
    num_samples = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.3 + 1.5 * num_samples, 0.5 + 1.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), num_samples, squeeze=False)
    for row, (heading, pictures) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(heading, fontsize=9)
        for column in range(num_samples):
            axes[row, column].imshow(pictures[column].permute(1, 2, 0).clamp(0, 1).float().cpu().numpy())
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if row == 0 and column < len(titles):
                # A caption with two dollar signs is no formula.
                axes[row, column].set_title("\n".join(wrap(titles[column], 22)), fontsize=7, parse_math=False)
    return figure


def _short(site: str) -> str:
    for long, short in (("_blocks", ""), ("attentions", "attn"), ("transformer", "block"), ("resnets", "res")):
        site = site.replace(long, short)
    return site
