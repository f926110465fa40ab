"""From the cells to a report: rows as JSON, tables in Markdown, a Pareto figure and a picture grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from hgc_learn.comparison import OURS
from hgc_learn.comparison.cells import cell_files
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.markdown import markdown, verdict
from hgc_learn.comparison.ranking import Ranking, collect, public_rows
from hgc_learn.comparison.samples import read_batches
from hgc_learn.evaluation import render
from hgc_learn.figures import picture_grid, save_figure
from hgc_learn.files import save_json, write_atomically
from hgc_learn.sampling import load_pipeline
from hgc_learn.schedule import HGCSchedule


def write_report(config: CompareConfig, *, command: str) -> None:
    """Writes the four files from the cells that are there.

    Raises:
        ValueError: no cell has been run; or, after everything is written, cells have failed.
    """
    console, folder = Console(), Path(config.report)
    rankings, num_missing = collect(config)
    rows = [row for ranking in rankings for row in public_rows(config, ranking)]
    if not rows:
        raise ValueError(f"{config.output}/cells: no cell of this comparison has been run; there is nothing to report.")
    save_json(folder / f"{config.name}.json", rows)
    text = markdown(config, rankings, command=command, num_missing=num_missing)
    write_atomically(folder / f"{config.name}.md", text.encode())
    if any(ranking.cells for ranking in rankings):
        save_figure(pareto_figure(config, rankings), folder / "pareto.png", dpi=110)
    if (grid := grid_figure(config, rankings)) is not None:
        save_figure(grid, folder / "grid.png", dpi=80)
    for ranking in rankings:
        if ranking.cells:
            console.print(
                f"{ranking.sampler} at {ranking.budget:g}: {verdict(ranking)}".replace("**", ""), soft_wrap=True
            )
    console.print(
        f"wrote {folder / config.name}.md" + (f"; {num_missing} cells have not been run" * bool(num_missing)),
        soft_wrap=True,
    )
    failed = [f"{row['sampler']} {row['policy']} {row['budget']:g}" for row in rows if "error" in row]
    if failed:
        raise ValueError(f"{len(failed)} cells failed; their files under {config.output}/cells say how: {failed}")


def pareto_figure(config: CompareConfig, rankings: Sequence[Ranking]) -> Figure:
    """PSNR against kept MACs, a line per policy, a panel per sampler."""
    samplers = list(config.samplers)
    figure = Figure(figsize=(1.5 + 5.5 * len(samplers), 6), layout="constrained")
    panels = figure.subplots(1, len(samplers), squeeze=False)[0]
    others = [name for name in config.policy_names if name != OURS]
    lines = {}
    for panel, sampler in zip(panels, samplers, strict=True):
        cells = [cell for ranking in rankings if ranking.sampler == sampler for cell in ranking.cells]
        for index, policy in enumerate([*others, OURS]):
            points = sorted(
                (cell["kept_macs"], cell["psnr_db"], *cell["psnr_ci"]) for cell in cells if cell["policy"] == policy
            )
            if not points:
                continue
            kept, psnr, low, high = zip(*points, strict=True)
            ours = policy == OURS
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5, "zorder": 3} if ours else {}
            marker = "*" if ours else "osv^D<>Pp"[index % 9]
            (lines[policy],) = panel.plot(
                kept, psnr, marker=marker, color=style.pop("color", f"C{index % 10}"), label=policy,
                linestyle="-" if ours or index < 10 else "--", markersize=11 if ours else 5, **style,
            )  # fmt: skip
            panel.fill_between(kept, low, high, color=lines[policy].get_color(), alpha=0.12, linewidth=0)
        panel.set(title=sampler, xlabel="MACs kept, fraction of the full run")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR to the uncached picture, dB")
    figure.legend(handles=list(lines.values()), loc="outside right center", fontsize=8)
    return figure


def grid_figure(config: CompareConfig, rankings: Sequence[Ranking]) -> Figure | None:
    """Control, uncached picture and every policy's, a sample a column; None before a cell has been run."""
    grid = config.grid
    (ranking,) = [r for r in rankings if (r.sampler, r.budget) == (grid.sampler, grid.budget)]
    if not ranking.cells:
        return None
    (batch,) = read_batches(config, "test", grid.num_pictures, grid.num_pictures, config.test_offset)
    sampling = config.sampling(grid.sampler)
    pipe = load_pipeline(config.model, sampling)
    rows: dict[str, Tensor] = {
        "control": batch["conditioning_image"],
        "full": render(pipe, sampling, [batch]).pictures,
    }
    for cell in ranking.cells:
        schedule = HGCSchedule.load(cell_files(config, grid.sampler, cell["policy"], grid.budget).schedule)
        rows[f"{cell['policy']}\n{cell['psnr_db']:.1f} dB"] = render(pipe, sampling, [batch], schedule).pictures
    return picture_grid(rows, batch["text"])
