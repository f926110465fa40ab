"""Write a schedule file by one of the policies.

`hgc_learn policies` lists them, `hgc_learn schedule POLICY --help` shows the options and the policy's knobs. The
pipeline is loaded, for the file carries its fingerprint; policies that measure run it on samples too.

  hgc_learn schedule deepcache --model path/to/pipeline --interval 3 --output hgc_schedule.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc_learn.commands import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    add_data,
    add_weights,
    finite,
    image_size,
    load_weights,
    samples,
)

if TYPE_CHECKING:
    from hgc_learn.policies import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What follows is parsed in `run`: policies and their knobs are known only with torch and diffusers imported.
    parser.usage = f"{parser.prog} POLICY --model DIR --output FILE [options] [knobs]"
    parser.add_argument("policy", metavar="POLICY", help="a name that `hgc_learn policies` lists")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> None:
    from hgc_learn.policies import POLICIES

    if args.policy not in POLICIES:
        raise ValueError(f"There is no policy {args.policy!r}; there are {', '.join(sorted(POLICIES))}.")
    policy = POLICIES[args.policy]
    prog = f"{args.parser.prog} {policy.name}"
    write(policy, policy_parser(policy, type(args.parser), prog).parse_args(args.arguments))


def policy_parser(policy: Policy, kind: type[argparse.ArgumentParser], prog: str) -> argparse.ArgumentParser:
    """The options of `schedule` and the knobs of one policy, with their defaults."""
    description = f"{policy.summary}\n\nFrom: {policy.paper}"
    parser = kind(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or hub id of a diffusers pipeline")
    add("--output", type=Path, required=True, metavar="FILE", help="schedule file to write")
    add_weights(parser)
    add("--scheduler", metavar="NAME", help="class of a diffusers scheduler (default: the pipeline's)")
    add("--scheduler_config", type=_settings, metavar="JSON", help="settings of it, instead of those in its own config")
    add("--steps", type=int, default=DEFAULT_STEPS, help=f"denoising steps (default {DEFAULT_STEPS})")
    add(
        "--guidance_scale",
        type=finite,
        default=DEFAULT_GUIDANCE_SCALE,
        help=f"1 or less: without guidance (default {DEFAULT_GUIDANCE_SCALE})",
    )
    add("--size", type=image_size, help="image size in pixels, N or HEIGHTxWIDTH (default: the model's)")
    add("--controlnet_conditioning_scale", type=finite, default=1.0, help="weight of the ControlNet (default 1)")
    add("--negative_prompt", default="", metavar="TEXT", help="for policies that measure (default: none)")
    add_data(
        parser,
        "for policies that measure: an image folder with metadata.jsonl (default: drawn scenes for the demonstration's "
        "teacher, none for other models)",
    )
    add("--num_samples", type=int, default=8, help="samples that such a policy measures on (default 8)")
    add("--batch_size", type=int, default=4, help="samples that run at once (default 4)")
    add_knobs(parser, policy)
    return parser


def add_knobs(parser: argparse.ArgumentParser, policy: Policy) -> None:
    """An option per knob, of the knob's type."""
    knobs = parser.add_argument_group("knobs")
    texts = _argument_texts(policy)
    hints = typing.get_type_hints(policy.write)
    for name, default in policy.knobs.items():
        shown = "" if default in (None, (), "") else f"(default {default})"
        text = f"{texts.get(name, '')} {shown}".strip().replace("%", "%%")
        knobs.add_argument(f"--{name}", default=default, help=text, **_option(hints[name]))


def write(policy: Policy, args: argparse.Namespace) -> None:
    """Loads the pipeline, lets the policy write, saves the file and prints what is left of the MACs."""
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.rollouts import kept_rollouts
    from hgc_learn.sampling import SamplingConfig
    from hgc_learn.schedule import check_output
    from hgc_learn.setting import Setting

    check_output(args.output)
    for name in ("steps", "num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    sampling = SamplingConfig(
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        controlnet_conditioning_scale=args.controlnet_conditioning_scale,
        scheduler=args.scheduler,
        scheduler_config=args.scheduler_config,
    )
    pipe = load_weights(args, sampling)
    height, width = args.size or Architecture.of(pipe).default_size
    sampling = replace(sampling, height=height, width=width)
    setting = Setting.of_pipeline(pipe, sampling, samples(args, sampling, "train", args.num_samples, args.batch_size))
    with kept_rollouts(setting, Path(args.output).with_suffix(".kept")):
        schedule = policy.schedule(setting, **{name: getattr(args, name) for name in policy.knobs})
    schedule.save(args.output)
    print(f"wrote {args.output}")
    for suffix, words in (("", "not counted"), ("_attention", "counted")):
        full, cached = schedule.macs[f"full{suffix}"], schedule.macs[f"cached{suffix}"]
        print(f"{cached / full:.1%} of {full:.4e} MACs kept (attention matmuls {words})")


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object of settings")
    return settings


def _argument_texts(policy: Policy) -> dict[str, str]:
    """What the `Args:` section of a policy's docstring says about each knob."""
    section = (inspect.getdoc(policy.write) or "").partition("Args:\n")[2]
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _option(annotation: Any) -> dict[str, Any]:
    """How argparse reads a knob of a type: int, float, str, bool, a Literal, a tuple of one type, or one of these
    with None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (annotation,) = (a for a in arguments if a is not types.NoneType)
        return _option(annotation)
    if origin is typing.Literal:
        return {"choices": arguments, "type": type(arguments[0])}
    if origin is tuple:
        return {"nargs": "*", "type": _reader(arguments[0]), "action": _StoreTuple}
    return {"type": _reader(annotation)}


def _reader(kind: type) -> Callable[[str], Any]:
    assert kind in (int, float, str, bool), kind
    if kind is bool:
        return _bool
    return finite if kind is float else kind


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))
