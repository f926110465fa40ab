"""The commands of `python -m hgc_learn`, one module each; here is what several of them share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hgc_learn.demo import TEACHER_DIR

if TYPE_CHECKING:
    from hgc_learn.models.architectures import Architecture
    from hgc_learn.sampling import SamplingConfig

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 7.5


def add_architecture(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --arch and --model, of which one may be given, and --controlnet_model for the latter."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--arch", metavar="NAME", help="a well-known architecture: sd15-controlnet, sdxl, ...")
    source.add_argument("--model", metavar="DIR", help="folder of a diffusers pipeline; only its configs are read")
    parser.add_argument(
        "--controlnet_model", metavar="DIR", help="of a ControlNet, if the pipeline of --model has none"
    )


def named_architecture(args: argparse.Namespace) -> Architecture:
    """The one that --arch or --model names.

    Raises:
        ValueError: an unknown name, a folder that cannot be used, or a ControlNet without --model.
    """
    from hgc_learn.models.architectures import build_architecture, load_architecture

    check_controlnet_model(args)
    return build_architecture(args.arch) if args.arch else load_architecture(args.model, args.controlnet_model)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds how a pipeline's weights are loaded: --controlnet_model, --variant and --dtype."""
    # Not --controlnet: several policies have a knob of that name.
    parser.add_argument(
        "--controlnet_model", metavar="DIR", help="folder or hub id of a ControlNet, if the pipeline holds none"
    )
    parser.add_argument("--variant", metavar="NAME", help="of the files with the weights, such as fp16")
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, help="of all models (default float32)")


def load_weights(args: argparse.Namespace, sampling: SamplingConfig) -> Any:
    """The pipeline that --model and `add_weights` name.

    Raises:
        ValueError: as of `load_pipeline`.
    """
    from hgc_learn.sampling import load_pipeline

    dtype = args.dtype or "float32"
    return load_pipeline(args.model, sampling, controlnet=args.controlnet_model, variant=args.variant, dtype=dtype)


def check_controlnet_model(args: argparse.Namespace) -> None:
    """Raises ValueError where --controlnet_model is given and --model is not."""
    if args.controlnet_model is not None and not args.model:
        raise ValueError("--controlnet_model is the ControlNet of a pipeline that --model names; there is no --model.")


def add_data(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --data, `what` it is for, and how it is read: as the settings of training's data."""
    parser.add_argument("--data", metavar="DIR", help=f"control images and prompts {what}")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="which of the configurations of --data")
    parser.add_argument("--condition", choices=["canny"], help="make the control images from the photographs of --data")
    for column, content in (("conditioning_image", "control image"), ("image", "photograph"), ("text", "prompt")):
        help_ = f"column of --data with the {content} (default {column})"
        parser.add_argument(f"--{column}_column", default=column, metavar="NAME", help=help_)
    parser.add_argument("--train_split", default="train", metavar="NAME", help="of --data (default %(default)s)")
    help_ = "of --data, to look at (default: the last rows of the training split)"
    parser.add_argument("--val_split", metavar="NAME", help=help_)
    parser.add_argument("--streaming", action="store_true", help="read no more rows of --data than needed")


def samples(
    args: argparse.Namespace, sampling: SamplingConfig, split: Literal["train", "validation"], number: int, size: int
) -> list[dict[str, Any]]:
    """Batches of `size`, `number` samples in all, of what --data names; without it of the demonstration's scenes if
    --model is its teacher, else none."""
    from torch.utils.data import DataLoader

    if args.data is None:
        if Path(args.model).resolve() != TEACHER_DIR.resolve():
            return []
        from hgc_learn.demo.scenes import draw_batches

        return draw_batches(split, number, size)
    from hgc_learn.data import ControlDataModule

    is_training = split == "train"
    if args.streaming and args.val_split is None and not is_training:
        raise ValueError(
            "--streaming reads the first rows of --train_split, which a training learns from; name the split to look "
            "at with --val_split."
        )
    module = ControlDataModule(
        args.data,
        args.dataset_config_name,
        height=sampling.height,
        width=sampling.width,
        conditioning_image_column=args.conditioning_image_column,
        image_column=args.image_column,
        text_column=args.text_column,
        condition=args.condition,
        train_split=args.train_split,
        val_split=args.val_split,
        streaming=args.streaming,
        num_train=number if is_training else 0,
        num_val=0 if is_training else number,
    )
    module.setup("fit" if is_training else "validate")
    return list(DataLoader(module.train_data if is_training else module.val_data, size))


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def image_size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or HEIGHTxWIDTH, as in 512 or 768x512") from None
    if not (1 <= height <= 65_536 and 1 <= width <= 65_536):
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: 1 to 65536 pixels")
    return height, width
