"""Time schedules at real size beside the plain pipeline: speedup against MACs, overhead, memory.

Weights are random, for neither time nor memory depends on them. Runs of the plain pipeline and of the schedules take
turns in one process, and each is compared with its neighbour. Run again with the same --output, it adds rounds.

  hgc_learn bench --arch sd15-controlnet --size 512 --policy deepcache:interval=3,branch=0 --output speed.json
  hgc_learn bench --arch sd15-controlnet --size 512 --schedule hgc_schedule.json --peers --output speed.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc_learn.commands import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, add_architecture, finite, named_architecture
from hgc_learn.commands.schedule import add_knobs

if TYPE_CHECKING:
    from hgc_learn.policies import Policy
    from hgc_learn.schedule import HGCSchedule
    from hgc_learn.setting import Setting
    from hgc_learn.speed import Setup

PEERS = {"DeepCache package I3B0": (3, 0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_architecture(parser, required=True)
    add("--size", type=int, default=512, help="of the square image, in pixels (default %(default)s)")
    add("--steps", type=int, default=DEFAULT_STEPS, help="UniPC steps (default %(default)s)")
    add("--guidance_scale", type=finite, default=DEFAULT_GUIDANCE_SCALE, help="1 or less: none (default %(default)s)")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="NAME[:KNOB=VALUE,...]",
        help="a policy's schedule; or all-compute, what the runtime itself costs; or exact-savings; repeat",
    )
    add(
        "--schedule",
        action="append",
        default=[],
        metavar="FILE",
        help="a file's rows, whatever model they are for, if that has the same sites and steps; repeat",
    )
    add("--peers", action="store_true", help="also other packages, if installed: DeepCache")
    add("--rounds", type=int, default=5, help="to add (default %(default)s)")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    add("--compile", action="store_true", help="with and without a schedule by torch.compile, block by block")
    add("--output", type=Path, required=True, metavar="FILE", help="JSON list of rows")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> None:
    import torch
    from rich.progress import track

    from hgc_learn import speed
    from hgc_learn.files import check_writable
    from hgc_learn.models.random_pipeline import random_arguments, random_pipeline
    from hgc_learn.sampling import SamplingConfig
    from hgc_learn.setting import Setting

    if args.rounds < 1 or args.steps < 2:
        raise ValueError(f"--rounds is {args.rounds} and --steps {args.steps}; at least 1 and 2 are needed.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and this machine or this build of torch has none.")
    if args.output.suffix != ".json":
        raise ValueError(f"--output is {args.output}; it must end in .json (beside it comes a table, ending in .md).")
    check_writable(args.output)
    rows = speed.read_rows(args.output)
    device = torch.device(args.device)
    architecture = named_architecture(args)
    pipe = random_pipeline(architecture, getattr(torch, args.dtype), device)
    if args.size < 1 or args.size % (8 * pipe.vae_scale_factor):
        raise ValueError(f"--size is {args.size}; it must be a multiple of {8 * pipe.vae_scale_factor}.")
    call = random_arguments(pipe, size=args.size, num_inference_steps=args.steps, guidance_scale=args.guidance_scale)
    sampling = SamplingConfig(args.steps, args.guidance_scale, args.size, args.size)
    setting = Setting.of_pipeline(pipe, sampling)
    candidates = _candidates(pipe, setting, args)
    common = {"machine": speed.machine(device), "arch": args.arch or args.model, "size": args.size, "dtype": args.dtype}
    common |= {"compiled": args.compile, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}

    def generate() -> None:
        pipe(**call)

    about = {name: common | {"schedule": name} for name in candidates}
    keys = {name: tuple(row[field] for field in speed.KEY) for name, row in about.items()}
    pairs = {name: [*map(tuple, rows[key]["pairs"])] if key in rows else [] for name, key in keys.items()}
    known = {name: speed.read_costs(rows[key]) for name, key in keys.items() if key in rows}
    new = {name: candidate for name, candidate in candidates.items() if name not in known}
    costs = {name: of_candidate for name, (_, of_candidate) in known.items()}
    of_plain = next(iter(known.values()))[0] if known else speed.measure_cost(generate, speed.plain, device)
    for name, candidate in track(new.items(), description="counting MACs and memory"):
        costs[name] = speed.measure_cost(generate, candidate, device)
    if args.compile:  # after counting: what is compiled cannot be counted
        speed.compile_blocks(pipe)
        for candidate in track([speed.plain, *candidates.values()], description="compiling"):
            speed.time_once(generate, candidate, device)
    for _ in track(range(args.rounds), description="timing"):
        for neighbours in _in_pairs(candidates):  # each beside a run of the plain pipeline
            first, *second = neighbours
            seconds = {first: speed.time_once(generate, candidates[first], device)}
            plain_seconds = speed.time_once(generate, speed.plain, device)
            seconds |= {name: speed.time_once(generate, candidates[name], device) for name in second}
            for name in neighbours:
                pairs[name].append((plain_seconds, seconds[name]))
                rows[keys[name]] = speed.row(about[name], of_plain, costs[name], pairs[name])
            speed.save_rows(args.output, rows)
    print(speed.markdown([rows[key] for key in keys.values()]))


def _in_pairs(names: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(names)
    while pair := list(itertools.islice(remaining, 2)):
        yield pair


def _candidates(pipe: Any, setting: Setting, args: argparse.Namespace) -> dict[str, Setup]:
    from hgc_learn.inference import apply_exact_savings, apply_schedule
    from hgc_learn.policies import POLICIES
    from hgc_learn.schedule import HGCSchedule
    from hgc_learn.setting import Draft

    computes = setting.schedule(Draft({}), policy="all-compute", settings={})
    special: dict[str, Setup] = {
        "all-compute": partial(apply_schedule, pipe, computes, exact_savings=False),
        "exact-savings": partial(apply_exact_savings, pipe),
    }
    found: dict[str, Setup] = {}
    for spec in args.policy:
        name = spec.partition(":")[0]
        if spec in special:
            found[spec] = special[spec]
            continue
        if name not in POLICIES:
            raise ValueError(f"--policy: there is no policy {name!r}; there are {', '.join(sorted(POLICIES))}.")
        found[spec] = partial(
            apply_schedule, pipe, POLICIES[name].schedule(setting, **_knobs(POLICIES[name], spec, args))
        )
    for file in args.schedule:
        schedule = HGCSchedule.from_pretrained(file)
        # Files change, and share names: rounds are added to those of the same schedule only.
        digest = sha256(json.dumps(schedule.to_dict(), sort_keys=True).encode()).hexdigest()
        found[f"{file} {digest[:8]}"] = partial(apply_schedule, pipe, _adapted(schedule, file, pipe, setting))
    if args.peers:
        for name, (interval, branch) in PEERS.items():
            found[name] = partial(_by_deepcache_package, pipe, interval, branch)
    return found or special


def _knobs(policy: Policy, spec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Of NAME:KNOB=VALUE,..., read as `hgc_learn schedule NAME --KNOB=VALUE ...` reads them; a knob may have several
    values, KNOB=VALUE,VALUE."""
    parser = type(args.parser)(prog=f"hgc_learn schedule {policy.name}", allow_abbrev=False)
    add_knobs(parser, policy)
    arguments: list[str] = []
    for part in filter(None, spec.partition(":")[2].split(",")):
        knob, has_value, value = part.partition("=")
        if has_value:
            arguments += [f"--{knob}", value]
        else:
            arguments.append(part if arguments else f"--{part}")  # one more value of the knob before
    return vars(parser.parse_args(arguments))


def _adapted(schedule: HGCSchedule, file: str, pipe: Any, setting: Setting) -> HGCSchedule:
    """The rows of a schedule for this pipeline, whatever it was made for; numbers of channels are repeated. What it
    gives is not looked at here."""
    import torch

    from hgc_learn.predictors import BY_CODE

    if schedule.num_steps != setting.num_steps:
        raise ValueError(
            f"{file} has {schedule.num_steps} steps (model calls), this setting {setting.num_steps}; say "
            "--steps accordingly."
        )
    for site in schedule.sites:
        if site not in setting.graph.nodes:
            raise ValueError(f"{file}: this architecture has no site {site!r}.")
    per_channel = {
        f"{site}/{parameter.name}"
        for site, row in schedule.sites.items()
        for code in {*row} & BY_CODE.keys()
        for parameter in BY_CODE[code].parameters
        if parameter.axes[-1] == "channels"
    }
    tensors = {}
    for name, tensor in schedule.tensors.items():
        channels = setting.costs[name.rpartition("/")[0]].channels
        if name in per_channel and tensor.shape[-1] != channels:
            tensor = tensor[..., torch.arange(channels) % tensor.shape[-1]].contiguous()
        tensors[name] = tensor
    return replace(
        schedule,
        tensors=tensors,
        timesteps=setting.timesteps,
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config={},  # whatever the pipeline's is: time does not depend on it
        guidance_scale=setting.sampling.guidance_scale,
        height=setting.sampling.height,
        width=setting.sampling.width,
        model=setting.fingerprint,
    )


@contextmanager
def _by_deepcache_package(pipe: Any, interval: int, branch: int) -> Iterator[None]:
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise ValueError("--peers: install DeepCache (pip install DeepCache).") from None
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for module in (pipe.unet, *pipe.unet.modules()):  # the package leaves its own behind
            module.__dict__.pop("forward", None)
