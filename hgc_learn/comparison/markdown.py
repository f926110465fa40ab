"""The report in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from hgc_learn.comparison import OURS
from hgc_learn.comparison.cells import tuned_otherwise
from hgc_learn.comparison.config import CompareConfig
from hgc_learn.comparison.ranking import Ranking, Row, public_rows
from hgc_learn.comparison.statistics import Interval
from hgc_learn.comparison.trained import training_folders
from hgc_learn.files import read_json
from hgc_learn.policies import POLICIES

DAGGER = "†"


def verdict(ranking: Ranking) -> str:
    """Who won, in a sentence."""
    winners, best = ranking.winners, ranking.cells[0]
    if len(winners) > 1:
        names = ", ".join(f"`{name}`" for name in winners)
        return f"no single winner: {names} cannot be told apart (highest mean {best['psnr_db']:.2f} dB)."
    text = f"**`{best['policy']}`** wins with {best['psnr_db']:.2f} dB"
    if len(ranking.cells) == 1:
        return f"{text}, alone."
    gap, (low, high) = ranking.gaps[1]
    return f"{text}, {-gap:.2f} dB [{-high:.2f}, {-low:.2f}] above `{ranking.cells[1]['policy']}`."


def markdown(config: CompareConfig, rankings: Sequence[Ranking], *, command: str, num_missing: int = 0) -> str:
    """The report."""
    tuning = config.tuning
    otherwise = _otherwise(config, rankings)
    samplers = "; ".join(
        f"{name}: {sampler.scheduler}{_brackets(sampler.scheduler_config)}, {sampler.num_inference_steps} steps, "
        f"n = {sampler.num_test}"
        for name, sampler in config.samplers.items()
    )
    paragraphs = [
        f"Written by `{command}`; the numbers are in [{config.name}.json]({config.name}.json). Teacher "
        f"`{config.model}`, guidance scale {config.guidance_scale:g}. {samplers}. Every test sample has its own "
        "prompt, control and seed.",
        f"All knobs are tuned for each cell on up to {tuning.num_scenes} other samples, by successive halving "
        f"(arXiv 1502.07943): of a policy's candidates within the budget (+{tuning.tolerance:.1%} of the full MACs) up "
        f"to {tuning.max_candidates}, closest to it and spread over its variants, are judged on "
        f"{tuning.num_screening_scenes} samples each, the better half of them on twice as many, and so on up to "
        f"{tuning.num_scenes}; fewer candidates begin with more samples. The best mean PSNR wins. "
        + f"These are today's settings; {DAGGER} marks cells of others, [listed below](#cells-of-other-settings). "
        * bool(otherwise)
        + "MACs do not count attention matmuls.",
        "PSNR, SSIM and latent error (relative L2) are against the uncached picture of the same seed, means over "
        "samples; brackets are 95 % bootstrap intervals over samples. *To best* is the mean paired difference to the "
        "first row: where its interval contains 0, the test set cannot tell the two apart, and both are marked with =. "
        "*With attention* is the kept fraction of MACs with attention matmuls counted. " + _of_obedience(config),
    ]
    if num_missing:
        paragraphs.append(f"**Incomplete: {num_missing} cells have not been run.**")
    lines = ["# Policies at equal compute", ""]
    for paragraph in paragraphs:
        lines += [fill(paragraph, 118, break_long_words=False, break_on_hyphens=False), ""]
    lines += _summary(config, rankings)
    lines += _policies(config)
    for ranking in rankings:
        lines += _section(config, ranking)
    lines += [*_tuning_costs(config, rankings), *otherwise]
    lines += ["![PSNR against kept MACs](pareto.png)", "", "![the same samples under every policy](grid.png)", ""]
    return "\n".join(lines)


def _of_obedience(config: CompareConfig) -> str:
    if config.data is not None:
        return (
            "Obedience to control and caption is not measured: that takes a network that reads these off pictures. "
            f"Samples are from `{config.data.dataset}`: tests from `{config.data.test_split}`, tuning from "
            f"`{config.data.validation_split}`, measuring from `{config.data.train_split}`."
        )
    return (
        "mIoU and colour accuracy measure obedience to control and caption. FID is to drawn test pictures, with "
        "features of the project's own network (`hgc_learn/demo/features.py`) and n as above: compare it within a "
        "table only."
    )


def _summary(config: CompareConfig, rankings: Sequence[Ranking]) -> list[str]:
    lines = [
        "## In short",
        "",
        f"| sampler | MACs kept | best, or not told apart from it | `{OURS}`, dB | best other | difference, dB |",
        "|---|---|---|---|---|---|",
    ]
    for ranking in rankings:
        own = next((cell for cell in ranking.cells if cell["policy"] == OURS), None)
        lead = ranking.lead(OURS)
        names = {cell["policy"]: _name(config, cell) for cell in ranking.cells}
        winners = ", ".join(names[name] for name in ranking.winners) or "-"
        entries = [ranking.sampler, f"{ranking.budget:.0%}", winners, f"{own['psnr_db']:.2f}" if own else "-"]
        entries += [names[lead[0]], _with_interval(lead[1], lead[2], "+.2f")] if lead else ["-", "-"]
        lines.append(_line(entries))
    return [*lines, ""]


def _policies(config: CompareConfig) -> list[str]:
    papers = {name: POLICIES[name].paper for name in config.policy_names}
    return ["## The policies", "", *(f"- `{name}`: {paper}" for name, paper in papers.items()), ""]


def _section(config: CompareConfig, ranking: Ranking) -> list[str]:
    lines = [f"## {ranking.sampler}, {ranking.budget:.0%} of the MACs", ""]
    is_scenes = config.data is None
    if ranking.cells:
        lines.append(f"{verdict(ranking)[0].upper()}{verdict(ranking)[1:]}")
        if is_scenes:
            full = ranking.cells[0]["full"]
            lines.append(
                f"Uncached pictures: mIoU {full['control_miou']:.4f}, colour {full['color_accuracy']:.4f}, "
                f"FID {full['fid']:.2f}."
            )
        lines.append("")
        optional = config.optional_metrics
        heading = ["", "policy", "PSNR, dB", "to best, dB", "MACs", "with attention", "latent error", "SSIM"]
        heading += ["mIoU", "colour", "FID"] if is_scenes else []
        winners = ranking.winners
        rows = public_rows(config, ranking)[: len(ranking.cells)]
        are_timed = any("wall_clock_speedup" in row for row in rows)
        heading += [*optional, *["speed"] * are_timed, "settings"]
        lines += [_line(heading), "|" + "---|" * len(heading)]
        for place, (cell, row, gap) in enumerate(zip(ranking.cells, rows, ranking.gaps, strict=True), start=1):
            tied = len(winners) > 1 and row["policy"] in winners
            entries = [
                f"{place}{' =' * tied}",
                _name(config, cell, bold=cell["policy"] == OURS),
                _with_interval(row["psnr_db"], row["psnr_ci"], ".2f"),
                _with_interval(*gap, ".2f") if place > 1 else "",
                f"{row['kept_macs']:.4f}",
                f"{row['kept_macs_attention']:.4f}",
                f"{row['latent_rel_l2']:.4f}",
                f"{row['ssim']:.4f}",
                *([f"{row['control_miou']:.4f}", f"{row['color_accuracy']:.4f}"] if is_scenes else []),
                *([f"{row['fid']:.2f}"] if is_scenes else []),
                *[f"{row[name]:.4f}" for name in optional],
                *[f"{row['wall_clock_speedup']:.2f}x" if "wall_clock_speedup" in row else "-"] * are_timed,
                _settings(row["settings"]),
            ]
            lines.append(_line(entries))
        lines.append("")
        for names in ranking.same_pictures:
            lines.append(f"- Tuned to the same pictures: {', '.join(f'`{name}`' for name in names)}.")
    for cell in ranking.others:
        if "reason" in cell:
            lines.append(f"- `{cell['policy']}` is not here: {cell['reason']}.")
        else:
            lines.append(f"- **`{cell['policy']}` failed**: {cell['error'].strip().splitlines()[-1]}")
    return lines if lines[-1] == "" else [*lines, ""]


def _tuning_costs(config: CompareConfig, rankings: Sequence[Ranking]) -> list[str]:
    lines = [
        "## What tuning cost",
        "",
        "Summed over the cells of a policy. Rollouts are pictures made, cached or not, what a policy measures or",
        "searches itself included; training runs are told apart. With ≥ where something was interrupted: of it the",
        "last part counts. Measurements that cells share count once.",
        "",
        "| policy | candidates | tried | rollouts | minutes | training, minutes |",
        "|---|---|---|---|---|---|",
    ]
    for policy in config.policy_names:
        costs = [cell["tuning"] for ranking in rankings for cell in ranking.cells if cell["policy"] == policy]
        folders = [folder for sampler in config.samplers for folder in training_folders(config, sampler, policy)]
        records = [read_json(path) for folder in folders if (path := folder / "trained.json").is_file()]
        trained = [record for record in records if "minutes" in record]  # the others have not ended yet
        if costs:
            totals = Counter[str]()
            for cost in costs:
                totals.update(cost)
            at_least = _at_least(costs)
            entries = [f"`{policy}`", f"{totals['num_candidates']}", f"{totals['num_tried']}"]
            entries += [f"{at_least}{totals['sample_rollouts']:.0f}", f"{at_least}{totals['seconds'] / 60:.1f}"]
            minutes = sum(training["minutes"] for training in trained)
            lines.append(_line([*entries, f"{_at_least(trained)}{minutes:.1f}" if trained else ""]))
    return [*lines, ""]


def _at_least(costs: Sequence[Row]) -> str:
    return "≥ " if any(cost.get("resumed", False) for cost in costs) else ""


def _otherwise(config: CompareConfig, rankings: Sequence[Ranking]) -> list[str]:
    """The section about cells that were tuned or trained otherwise than the text says; none if there are none."""
    budgets: dict[tuple[str, str, str], list[float]] = {}
    for ranking in rankings:
        for cell in (*ranking.cells, *(cell for cell in ranking.others if "reason" in cell)):
            if how := tuned_otherwise(config, cell):
                budgets.setdefault((cell["policy"], ranking.sampler, how), []).append(ranking.budget)
    if not budgets:
        return []
    lines = ["## Cells of other settings", "", "| policy | sampler | MACs kept | tuned with |", "|---|---|---|---|"]
    for (policy, sampler, how), those in sorted(budgets.items()):
        lines.append(_line([f"`{policy}`", sampler, ", ".join(f"{budget:.0%}" for budget in those), how]))
    return [*lines, ""]


def _name(config: CompareConfig, cell: Row, *, bold: bool = False) -> str:
    """Of a cell's policy, with a dagger if it was tuned otherwise than the text says."""
    name = f"`{cell['policy']}`"
    return (f"**{name}**" if bold else name) + f" {DAGGER}" * bool(tuned_otherwise(config, cell))


def _with_interval(value: float, interval: Interval, form: str) -> str:
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _settings(settings: dict[str, Any]) -> str:
    short = {name: value for name, value in settings.items() if name not in ("budget", "ckpt_path", "other_ckpt_paths")}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in short.items()
    )


def _brackets(settings: dict[str, Any] | None) -> str:
    return f" ({_settings(settings)})" if settings else ""


def _line(entries: list[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"
