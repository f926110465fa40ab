"""Wall-clock time of schedules and of other packages beside the plain pipeline: interleaved, in one process, paired."""

from __future__ import annotations

import ctypes
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hgc_learn.files import save_json, write_atomically
from hgc_learn.inference import ScheduleHandle
from hgc_learn.models.macs import flop_counter
from hgc_learn.runtime.forwards import routed_models

Setup = Callable[[], AbstractContextManager[ScheduleHandle | None]]
"""Sets the pipeline up for one run, and back."""

KEY = ("machine", "arch", "size", "dtype", "compiled", "num_inference_steps", "guidance_scale", "schedule")
"""What a row is about; all else in it are figures."""


@dataclass(frozen=True)
class RunCost:
    """What is measured once: MACs (attention matmuls counted), peak memory in bytes, and the bytes that are kept from
    step to step, by the plan and at the measured peak."""

    macs: int
    peak_bytes: int
    cache_bytes: int = 0
    predicted_cache_bytes: int = 0


def measure_cost(run: Callable[[], object], setup: Setup, device: torch.device) -> RunCost:
    """In one run, which warms up, too."""
    with setup() as handle:
        with watched_cache(handle) as kept, flop_counter() as counter:
            peak_bytes = _peak_memory(run, device)
        predicted = 0 if handle is None else handle.stats()["cache_bytes"]
    return RunCost(counter.get_total_flops() // 2, peak_bytes, max(kept, default=0), predicted)


def time_once(run: Callable[[], object], setup: Setup, device: torch.device) -> float:
    """Seconds of one run, without setting up."""
    with setup():
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start


def plain() -> AbstractContextManager[None]:
    """The pipeline as it is."""
    return nullcontext()


def compile_blocks(pipe: Any) -> None:
    """Has torch.compile run the transformer blocks of UNet and ControlNets, as `compile_repeated_blocks` of diffusers'
    UNets does."""
    torch._dynamo.config.recompile_limit = 64  # one function for blocks of all widths, sizes and batches
    for model in routed_models(pipe).values():
        for module in model.modules():
            if type(module).__name__ in pipe.unet._repeated_blocks:
                module.compile(fullgraph=True)


def row(
    about: dict[str, Any], of_plain: RunCost, cost: RunCost, pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Figures of one candidate: medians over rounds of the ratios to the plain pipeline's run of the same round, with
    95 % bootstrap intervals of these (`<figure>_interval`).

    Args:
        pairs: seconds of the plain pipeline and of the candidate, per round.
    """
    plain_seconds, seconds = np.array(pairs).T
    speedups = plain_seconds / seconds
    macs_ratio = of_plain.macs / cost.macs
    result = dict(about)
    result |= {"macs_ratio": round(macs_ratio, 4), "macs": cost.macs}
    result |= {"plain_macs": of_plain.macs}
    result |= _median("speedup", speedups) | _median("efficiency", speedups / macs_ratio)
    if about["schedule"].startswith("all-compute"):
        result |= _median("overhead", 1 / speedups - 1)
    known = of_plain.peak_bytes and cost.peak_bytes
    result["peak_memory_ratio"] = round(cost.peak_bytes / of_plain.peak_bytes, 4) if known else None
    result |= {"peak_bytes": cost.peak_bytes, "plain_peak_bytes": of_plain.peak_bytes}
    result |= {"cache_bytes": cost.cache_bytes, "predicted_cache_bytes": cost.predicted_cache_bytes}
    result["pairs"] = [[round(x, 4) for x in pair] for pair in pairs]
    return result


def read_costs(row: dict[str, Any]) -> tuple[RunCost, RunCost]:
    """What a row has of the plain pipeline and of the candidate."""
    of_plain = RunCost(row["plain_macs"], row["plain_peak_bytes"])
    return of_plain, RunCost(row["macs"], row["peak_bytes"], row["cache_bytes"], row["predicted_cache_bytes"])


def read_rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By what they are about; none if there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        rows = json.loads(path.read_text()) if path.is_file() else []
        return {tuple(row[name] for name in KEY): row for row in rows}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: exists, and is no file of hgc_learn bench. Name another one.") from None


def save_rows(path: Path, rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """And beside it, ending in .md, the table of them."""
    save_json(path, [*rows.values()])
    write_atomically(path.with_suffix(".md"), (markdown([*rows.values()]) + "\n").encode())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table per setting: medians, with 95 % intervals where runs were repeated."""
    parts = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY[:-1]), []).append(row)
    for key, group in groups.items():
        machine, arch, size, dtype, compiled, steps, guidance_scale = key
        dtype += ", compiled block by block" * compiled
        parts += [f"{arch}, {size} px, {steps} steps, guidance scale {guidance_scale:g}, {dtype}. {machine}.", ""]
        parts += [
            "| schedule | rounds | fewer MACs | faster | efficiency | peak memory | cache, MB: planned, measured |"
        ]
        parts += ["|---|---|---|---|---|---|---|"]
        for row in group:
            memory = "-" if row["peak_memory_ratio"] is None else f"{row['peak_memory_ratio']:.3f}x"
            cache = f"{row['predicted_cache_bytes'] / 1e6:.1f}, {row['cache_bytes'] / 1e6:.1f}"
            parts.append(
                f"| `{row['schedule']}` | {len(row['pairs'])} | {row['macs_ratio']:.2f}x | {_shown(row, 'speedup')}x | "
                f"{_shown(row, 'efficiency')} | {memory} | {cache} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip()


def _shown(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"CPU, {platform.machine()}, {model}, {torch.get_num_threads()} threads"


def _median(name: str, values: np.ndarray) -> dict[str, Any]:
    random = np.random.default_rng(0)
    medians = np.median(random.choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {name: round(float(np.median(values)), 4), f"{name}_interval": [round(float(low), 4), round(float(high), 4)]}


@contextmanager
def watched_cache(handle: ScheduleHandle | None) -> Iterator[list[int]]:
    """The bytes that the cache holds after each model call."""
    seen: list[int] = []
    if handle is None:
        yield seen
        return
    runtime: Any = handle.runtime
    execute = runtime.execute

    def watched(*args: Any) -> Any:
        values = execute(*args)
        seen.append(runtime.cache.num_bytes)
        return values

    runtime.execute = watched
    try:
        yield seen
    finally:
        del runtime.execute


def _peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes: of the allocator on CUDA; elsewhere what is resident of the whole process, 0 if that cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:  # not Linux with glibc
        run()
        return 0
    run()
    peak = next(line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
