"""Write one HTML page about a schedule: what runs at each step, what it saves, how it looks.

The page needs no network. The models are recognised among the demonstration's teacher and well-known architectures;
for others name their folder. Of it only configs are read, unless pictures are asked for.

  hgc_learn report runs/demo --output runs/demo/report.html
  hgc_learn report hgc_schedule.json --model path/to/pipeline --data my_images --num_pictures 4 --output report.html
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc_learn.commands import add_data, add_weights, check_controlnet_model, load_weights, samples
from hgc_learn.demo import TEACHER_DIR
from hgc_learn.timesteps import SPACINGS

if TYPE_CHECKING:
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.sampling import SamplingConfig
    from hgc_learn.schedule import HGCSchedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a schedule file, or a folder or hub id with one")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="page to write, .html")
    parser.add_argument("--model", metavar="DIR", help="folder of the pipeline; with --num_pictures a hub id, too")
    add_weights(parser)
    parser.add_argument("--comparison", type=Path, metavar="JSON", help="of `hgc_learn compare`, for its Pareto curves")
    parser.add_argument("--num_pictures", type=int, default=0, help="full and cached, same seeds (default 0)")
    add_data(parser, "for the pictures (default: the demonstration's scenes)")


def run(args: argparse.Namespace) -> None:
    from hgc_learn.files import check_writable
    from hgc_learn.report import write_page
    from hgc_learn.report.pareto import read_comparison
    from hgc_learn.schedule import HGCSchedule

    check_writable(args.output)
    if args.output.suffix in (".json", ".safetensors"):
        raise ValueError(f"--output: {args.output} would be an HTML page; give it another ending.")
    schedule = HGCSchedule.from_pretrained(args.source)
    comparison = read_comparison(args.comparison) if args.comparison else ()
    if args.num_pictures < 0:
        raise ValueError(f"--num_pictures is {args.num_pictures}; it must be 0 (none) or more.")
    for name in ("data", "variant", "dtype"):
        if getattr(args, name) is not None and not args.num_pictures:
            raise ValueError(f"--{name} is for pictures: say how many with --num_pictures.")
    check_controlnet_model(args)
    if args.num_pictures:
        architecture, pictures = _draw(args, schedule)
    else:
        architecture, pictures = _find_architecture(args.model, args.controlnet_model, schedule), None
    graph, costs = architecture.measure((schedule.height, schedule.width))
    write_page(args.output, schedule, graph, costs, comparison=comparison, pictures=pictures)
    print(f"wrote {args.output}")


def _find_architecture(model: str | None, controlnet: str | None, schedule: HGCSchedule) -> Architecture:
    """Raises ValueError if it is not the one that the schedule was made for, or none is known."""
    from hgc_learn.models.architectures import ARCHITECTURES, build_architecture, load_architecture

    if model is not None:
        architecture = load_architecture(model, controlnet)
        architecture.check(schedule)
        return architecture
    # The demonstration's folder is part of the repository, and not of an installed package.
    known = [partial(load_architecture, TEACHER_DIR)] if TEACHER_DIR.is_dir() else []
    for make in [*known, *(partial(build_architecture, name) for name in ARCHITECTURES)]:
        with suppress(ValueError):
            (architecture := make()).check(schedule)
            return architecture
    raise ValueError("The schedule was made for none of the models known here: name its folder with --model.")


def _draw(args: argparse.Namespace, schedule: HGCSchedule) -> tuple[Architecture, dict[str, Any]]:
    """The pipeline's architecture, and pictures with and without the schedule: those without take all steps of the
    setting that it was made for, which may be more than its own (`fewer_steps`)."""
    from rich.progress import track

    from hgc_learn.evaluation import picture_psnr, render
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.timesteps import steps_for_calls

    if args.model is None:
        raise ValueError("--num_pictures needs a pipeline to make them: give it with --model.")
    sampling = _sampling(schedule)
    batches = samples(args, sampling, "validation", args.num_pictures, 1)  # pictures of real models need the memory
    if not batches:
        raise ValueError("--num_pictures needs control images and prompts: give a folder of them with --data.")
    pipe = load_weights(args, sampling)
    if "num_inference_steps" not in _own_sampling(schedule):
        steps = steps_for_calls(pipe.scheduler, schedule.num_steps)
        sampling = replace(sampling, num_inference_steps=steps or schedule.num_steps)
    pictures: dict[str, Any] = {"text": [], "control": [], "full": [], "cached": [], "psnr_db": []}
    for batch in track(batches, description="making pictures"):
        full, cached = (render(pipe, sampling, [batch], each).pictures for each in (None, schedule))
        pictures["text"] += batch["text"]
        pictures["control"] += batch["conditioning_image"]
        pictures["full"] += full
        pictures["cached"] += cached
        pictures["psnr_db"] += picture_psnr(cached, full).tolist()
    return Architecture.of(pipe), pictures


def _sampling(schedule: HGCSchedule) -> SamplingConfig:
    """That of the uncached pipeline that the schedule was made for."""
    from hgc_learn.sampling import SamplingConfig

    return SamplingConfig(
        guidance_scale=schedule.guidance_scale,
        height=schedule.height,
        width=schedule.width,
        scheduler=schedule.scheduler,
        scheduler_config=_scheduler_config(schedule),
        **_own_sampling(schedule),
    )


def _own_sampling(schedule: HGCSchedule) -> dict[str, Any]:
    """What a schedule's fields do not say, from the settings of who wrote it, a stranger maybe."""
    from hgc_learn.schedule import MAX_STEPS

    own = schedule.sampling
    types = {"num_inference_steps": int, "negative_prompt": str, "controlnet_conditioning_scale": float}
    known = {name: own[name] for name, kind in types.items() if type(own.get(name)) is kind}
    if not 1 <= known.get("num_inference_steps", 1) <= MAX_STEPS:
        del known["num_inference_steps"]
    return known


def _scheduler_config(schedule: HGCSchedule) -> dict[str, Any]:
    """What the schedule's field says, and the spacing that it leaves to timesteps to tell. Not how many timesteps there
    are: a stranger's file could ask for billions; where that, or a list among the settings, differs, it is refused in
    the run."""
    from hgc_learn.scheduler_config import is_stand_in

    settings = {name: value for name, value in schedule.scheduler_config.items() if not is_stand_in(value)}
    settings.pop("num_train_timesteps", None)
    own = schedule.sampling.get("scheduler_config")
    if isinstance(own, dict) and own.get("timestep_spacing") in SPACINGS:
        settings["timestep_spacing"] = own["timestep_spacing"]
    return settings
