"""Pictures with what users give them."""

from __future__ import annotations

from pathlib import Path

import torch

from hgc_learn.figures import picture_grid, save_figure


def test_dollars_in_captions_are_no_formulas(tmp_path: Path) -> None:
    captions = [r"a $\foo$ sign", "burger for $5 and fries for $3"]
    figure = picture_grid({"control": torch.rand(2, 3, 8, 8)}, captions)
    save_figure(figure, tmp_path / "grid.png", dpi=80)
    assert [axes.get_title().replace("\n", " ") for axes in figure.axes] == captions
    assert (tmp_path / "grid.png").stat().st_size > 1000
