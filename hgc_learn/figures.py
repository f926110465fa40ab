"""Pictures to look at: what a schedule does, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor


def gate_heatmap(gates: ArrayLike, sites: Sequence[str], title: str = "") -> Figure:
    """Draws gates [steps, sites], 0 reuse to 1 compute, as a picture of sites x steps."""
    values = np.asarray(gates, dtype=float).T
    figure = Figure(figsize=(3 + 0.22 * values.shape[1], 1.5 + 0.13 * len(sites)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(sites)), [_short(site) for site in sites], fontsize=5)
    axes.set_xlabel("step")
    axes.set_title(f"{title}\nyellow: compute, dark: reuse".strip(), fontsize=8)
    return figure


def picture_grid(columns: dict[str, Tensor], titles: Sequence[str] = ()) -> Figure:
    """Draws pictures side by side.

    Args:
        columns: by heading, pictures [rows, 3, height, width] in [0, 1].
        titles: one per row, shown on its left.
    """
    num_rows = len(next(iter(columns.values())))
    figure, axes = plt.subplots(
        num_rows, len(columns), figsize=(1.7 * len(columns), 1.75 * num_rows), squeeze=False, layout="constrained"
    )
    for column, (heading, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(heading, fontsize=8)
        for row in range(num_rows):
            axes[row, column].imshow(pictures[row].permute(1, 2, 0).clamp(0, 1).float().cpu().numpy())
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if column == 0 and row < len(titles):
                axes[row, column].set_ylabel("\n".join(wrap(titles[row], 24)), fontsize=5)
    plt.close(figure)
    return figure


def _short(site: str) -> str:
    for long, short in (("_blocks", ""), ("attentions", "attn"), ("transformer", "block"), ("resnets", "res")):
        site = site.replace(long, short)
    return site
