"""Wall-clock time of the cells' schedules, in a pass of its own: nothing else should run on the machine."""

from __future__ import annotations

import torch
from rich.progress import track

from hgc_learn.comparison.cells import Selection, cell_files
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.samples import read_batches
from hgc_learn.evaluation import side_by_side, timed
from hgc_learn.files import save_json
from hgc_learn.sampling import load_pipeline
from hgc_learn.schedule import HGCSchedule

NUM_PAIRS = 3
BATCH_SIZE = 4


def time_cells(config: CompareConfig, selection: Selection) -> None:
    """Times every selected cell that has a schedule and no time yet: the median, over pairs of runs in turns, of the
    ratio of the full run's time to the cached run's."""
    torch.set_flush_denormal(True)
    (batch,) = read_batches(config, "validation", BATCH_SIZE, BATCH_SIZE)
    for sampler in selection.samplers:
        cells = [cell_files(config, *cell) for cell in selection.cells() if cell[0] == sampler]
        cells = [files for files in cells if files.schedule.is_file() and not files.timing.is_file()]
        if not cells:
            continue
        sampling = config.sampling(sampler)
        pipe = load_pipeline(config.model, sampling)
        timed(pipe, sampling, batch)  # warm-up
        for files in track(cells, description=f"timing {sampler}"):
            _, _, speedup = side_by_side(pipe, sampling, HGCSchedule.load(files.schedule), [batch] * NUM_PAIRS)
            timing = {"wall_clock_speedup": round(speedup, 3), "num_pairs": NUM_PAIRS}
            save_json(files.timing, timing | {"batch_size": BATCH_SIZE, "num_threads": torch.get_num_threads()})
