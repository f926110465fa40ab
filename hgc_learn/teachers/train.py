"""Train the demonstration teacher from nothing: `python -m hgc_learn.teachers.train --output DIR`.

With `--data FOLDER`, a small teacher on the photographs, control images and captions of an imagefolder instead.

The stages, each resumable (interrupt with Ctrl-C, run the same command again; other arguments are refused): draw
scenes or cut photographs, text encoder, VAE, encode the pictures, UNet together with ControlNet. The pipeline folder is
`DIR/pipeline`; after every validation of the last stage it is in `DIR/pipeline-early`, and its pictures are in
`DIR/pictures.png`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, StableDiffusionControlNetPipeline
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from transformers import CLIPTextModel, CLIPTokenizer

from hgc_learn.__main__ import guarded
from hgc_learn.demo.scenes import IMAGE_SIZE
from hgc_learn.figures import picture_grid, save_figure
from hgc_learn.files import read_json, save_json
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.teachers.data import (
    LatentDataset,
    PictureDataset,
    encode_training_scenes,
    kill_child_processes,
    read_captions,
)
from hgc_learn.teachers.material import Material, PhotographMaterial, SceneMaterial
from hgc_learn.teachers.modules import AutoencoderModule, DenoiserModule
from hgc_learn.teachers.photographs import Photographs
from hgc_learn.teachers.pipeline import (
    BLOCK_CHANNELS,
    GUIDANCE_SCALE,
    LAYERS_PER_BLOCK,
    build_controlnet,
    build_text_encoder,
    build_unet,
    build_vae,
    tokenize,
)

NUM_SHOWN = 8
MAY_DIFFER = ("output", "num_processes", "validation_interval")
"""Arguments that a training may go on without: where it is, how many share its work, when it is looked at."""


@dataclass(frozen=True)
class TeacherArguments:
    """Sizes of the training run; the defaults are those of the committed teacher.

    Steps are optimizer steps, batch sizes are totals over all processes.

    Attributes:
        data: photographs to train on instead of drawn scenes: folder with `metadata.jsonl` or hub id, with the columns
            `image`, `text` and, unless `condition` is set, `conditioning_image`.
        condition: `canny` makes the control images from the photographs.
        train_split: of `data`, to train on.
        val_split: of `data`, held out.
        num_scenes: scenes to draw, or crops of the photographs to cut.
        validation_scenes: scenes, or photographs, of a validation.
        parts: pipeline folder to take tokenizer, text encoder and VAE from, instead of training them.
        block_out_channels: width of the UNet's and the ControlNet's four levels.
        layers_per_block: their depth.
    """

    output: Path
    data: str | None = None
    condition: str | None = None
    train_split: str = "train[:90%]"
    val_split: str = "train[90%:]"
    parts: Path | None = None
    block_out_channels: tuple[int, ...] = BLOCK_CHANNELS
    layers_per_block: int = LAYERS_PER_BLOCK
    num_scenes: int = 40_000
    num_processes: int = 2
    text_encoder_steps: int = 1500
    text_encoder_batch_size: int = 64
    vae_steps: int = 2000
    vae_batch_size: int = 16
    denoiser_steps: int = 3850
    denoiser_batch_size: int = 32
    validation_interval: int = 1000
    validation_scenes: int = 64
    seed: int = 0

    @property
    def arguments_file(self) -> Path:
        """File of the arguments that a training was begun with."""
        return self.output / "checkpoints" / "arguments.json"

    @property
    def scenes(self) -> Path:
        """Folder of the pictures, drawn or cut, and of their latents."""
        return self.output / "scenes"

    @property
    def material(self) -> Material:
        """What is trained on."""
        if self.data is None:
            return SceneMaterial()
        train, held_out = (
            Photographs(self.data, split, self.condition) for split in (self.train_split, self.val_split)
        )
        return PhotographMaterial(train, held_out)


def save_arguments(args: TeacherArguments) -> None:
    """Beside the checkpoints, for :func:`check_arguments`."""
    save_json(args.arguments_file, _decisive(args))


def check_arguments(args: TeacherArguments) -> None:
    """
    Raises:
        ValueError: the training in `args.output` was begun with others. One of an earlier version does not say.
    """
    begun = read_json(args.arguments_file) if args.arguments_file.is_file() else {}
    for name, value in _decisive(args).items():
        if name in begun and begun[name] != value:
            raise ValueError(
                f"--{name}: {_told(value)} now, {_told(begun[name])} when the training in {args.output} was begun. "
                "Give what it was begun with to go on, or another --output to begin anew."
            )


def _decisive(args: TeacherArguments) -> dict[str, Any]:
    """The arguments that decide what is learned, as JSON has them."""
    values = {name: value for name, value in asdict(args).items() if name not in MAY_DIFFER}
    values["parts"] = str(args.parts) if args.parts else None
    values["block_out_channels"] = list(args.block_out_channels)
    return values


def _told(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def save_folder(save: Callable[[Path], object], folder: Path) -> None:
    """Call `save` with a temporary folder and move it to `folder` when complete, replacing what was there."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def fit(
    stage: L.LightningModule,
    dataset: Dataset,
    args: TeacherArguments,
    *,
    name: str,
    num_steps: int,
    batch_size: int,
    num_processes: int = 1,
    validation: Dataset | None = None,
    validation_interval: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train one stage, from its last checkpoint if there is one.

    Raises:
        ValueError: if the batch size does not divide by the number of processes.
        KeyboardInterrupt: it was interrupted.
    """
    if batch_size % num_processes:
        raise ValueError(f"batch size {batch_size} of stage {name!r} must divide by {num_processes} processes")
    folder = args.output / "checkpoints" / name
    last = folder / "last.ckpt"
    checkpoint = ModelCheckpoint(
        folder, filename="last", every_n_train_steps=max(1, min(250, num_steps // 4)), enable_version_counter=False
    )
    # On a CPU, processes of one thread each are faster than threads within one process.
    distributed = num_processes > 1
    trainer = L.Trainer(
        accelerator="cpu" if distributed or not torch.cuda.is_available() else "gpu",
        devices=num_processes,
        strategy=DDPStrategy(start_method="spawn", gradient_as_bucket_view=True) if distributed else "auto",
        max_steps=num_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        check_val_every_n_epoch=None if validation else 1,
        val_check_interval=validation_interval if validation else None,
        num_sanity_val_steps=0,
        logger=CSVLogger(args.output / "logs", name=name),
        log_every_n_steps=20,
        callbacks=[checkpoint, TQDMProgressBar(refresh_rate=10), *callbacks],
        enable_model_summary=False,
    )
    per_process = batch_size // num_processes
    try:
        trainer.fit(
            stage,
            DataLoader(dataset, per_process, shuffle=True, drop_last=True),
            DataLoader(validation, per_process) if validation else None,
            ckpt_path=last if last.exists() else None,
        )
    except BaseException as error:
        if distributed:  # they would be waited for until they have trained all
            kill_child_processes()
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning's own ends with status 1
        raise


def take_parts(source: Path, output: Path) -> None:
    """Copy tokenizer, text encoder and VAE of a pipeline folder, unless they are there.

    Raises:
        ValueError: `source` has no such part.
    """
    for name in ("tokenizer", "text_encoder", "vae"):
        if not (source / name).is_dir():
            raise ValueError(f"parts: {source} has no folder {name}; give the folder of a whole pipeline.")
        if not (output / name).exists():
            save_folder(partial(shutil.copytree, source / name), output / name)


def train_text_encoder(args: TeacherArguments) -> None:
    """Write `tokenizer` and `text_encoder`."""
    folder = args.output / "text_encoder"
    if folder.exists():
        return
    captions = read_captions(args.scenes)
    tokenizer = args.material.tokenizer(captions)
    save_folder(lambda path: tokenizer.save_pretrained(path), args.output / "tokenizer")
    stage = args.material.text_stage(build_text_encoder(tokenizer), tokenizer)
    fit(
        stage, _Tokens(tokenize(tokenizer, captions)), args, name="text_encoder",
        num_steps=args.text_encoder_steps, batch_size=args.text_encoder_batch_size,
    )  # fmt: skip
    save_folder(lambda path: stage.text_encoder.save_pretrained(path), folder)


class _Tokens(TensorDataset):
    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self.tensors[0][index]


def train_vae(args: TeacherArguments) -> None:
    """Write `vae`, with the scaling factor that gives latents a standard deviation of 1."""
    folder = args.output / "vae"
    if folder.exists():
        return
    stage = AutoencoderModule(build_vae())
    fit(
        stage, PictureDataset(args.scenes, args.material.turned), args, name="vae",
        num_steps=args.vae_steps, batch_size=args.vae_batch_size, num_processes=args.num_processes,
        validation=args.material.validation(args.validation_scenes), validation_interval=max(1, args.vae_steps // 4),
    )  # fmt: skip
    vae = stage.vae.eval()
    dataset: Any = args.material.validation(4 * args.validation_scenes)
    with torch.inference_mode():
        pictures = torch.stack([dataset[index]["image"] for index in range(len(dataset))])
        latents = vae.encode(pictures).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    save_folder(lambda path: vae.save_pretrained(path), folder)


class ExportPipeline(Callback):
    """Write the teacher as it stands to `DIR/pipeline-early` after every validation, and pictures that it makes."""

    def __init__(self, output: Path, samples: Dataset[dict[str, Any]]) -> None:
        self.output, self.samples = output, samples

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called by Lightning."""
        if trainer.is_global_zero:
            assert isinstance(pl_module, DenoiserModule)
            pipeline = pl_module.pipeline()
            save_folder(pipeline.save_pretrained, self.output / "pipeline-early")
            save_pictures(pipeline, self.samples, self.output / "pictures.png")


def save_pictures(pipeline: StableDiffusionControlNetPipeline, samples: Dataset[dict[str, Any]], path: Path) -> None:
    """Save what a teacher makes of some samples, spread over all, and of their controls mirrored with the same captions
    and noise: what the control decides is mirrored too."""
    num_samples = len(samples)  # type: ignore[arg-type]
    spread = range(0, num_samples, max(1, num_samples // NUM_SHOWN))[:NUM_SHOWN]
    batch = next(iter(DataLoader(Subset(samples, spread), NUM_SHOWN)))
    sampling = SamplingConfig(20, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE)
    rows = {}
    for name, control in (("", batch["conditioning_image"]), ("mirrored\n", batch["conditioning_image"].flip(3))):
        rows[f"{name}control"] = control
        rows[f"{name}picture"] = generate(pipeline, sampling, batch | {"conditioning_image": control}, output_type="pt")
    save_figure(picture_grid(rows, batch["text"]), path, dpi=110)


def train_denoiser(args: TeacherArguments) -> None:
    """Write `pipeline`, in float16."""
    folder = args.output / "pipeline"
    if folder.exists():
        return
    tokenizer = CLIPTokenizer.from_pretrained(args.output / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.output / "vae")
    encode_training_scenes(args.scenes, vae)
    material = args.material
    validation = material.validation(args.validation_scenes)
    stage = material.denoiser(
        build_unet(args.block_out_channels, args.layers_per_block),
        build_controlnet(args.block_out_channels, args.layers_per_block),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel.from_pretrained(args.output / "text_encoder"),
        vae=vae,
    )
    token_ids = tokenize(tokenizer, read_captions(args.scenes))
    latents = LatentDataset(args.scenes, material.controls, token_ids, vae.config.scaling_factor)
    fit(
        stage, latents, args, name="denoiser",
        num_steps=args.denoiser_steps, batch_size=args.denoiser_batch_size, num_processes=args.num_processes,
        validation=validation, validation_interval=args.validation_interval,
        callbacks=[ExportPipeline(args.output, validation)],
    )  # fmt: skip
    pipeline = stage.pipeline()
    # The tiny text encoder stays in float32: transformers loads models in the precision of the file, diffusers in
    # float32, and plain `from_pretrained` has to give a pipeline of one precision.
    for model in (pipeline.vae, pipeline.unet, pipeline.controlnet):
        nn.Module.half(model)
    save_folder(pipeline.save_pretrained, folder)


def train_teacher(args: TeacherArguments) -> None:
    """Run all stages that are not done yet."""
    save_arguments(args)
    L.seed_everything(args.seed)
    args.material.prepare(args.scenes, args.num_scenes)
    train_text_encoder(args)
    train_vae(args)
    train_denoiser(args)


def build_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", help="train on these photographs: folder with metadata.jsonl, or hub id")
    parser.add_argument("--condition", choices=("canny",), help="make control images from the photographs")
    parser.add_argument("--train_split", default=TeacherArguments.train_split, help="of the data, to train on")
    parser.add_argument("--val_split", default=TeacherArguments.val_split, help="of the data, held out")
    parser.add_argument("--parts", type=Path, help="pipeline folder to take tokenizer, text encoder and VAE from")
    parser.add_argument("--block_out_channels", type=int, nargs=4, default=BLOCK_CHANNELS)
    for name, field in TeacherArguments.__dataclass_fields__.items():
        if field.type == "int":
            parser.add_argument(f"--{name}", type=int, default=field.default)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    arguments["block_out_channels"] = tuple(arguments["block_out_channels"])
    args = TeacherArguments(**arguments)
    try:  # other arguments, a width that cannot be or a folder without the parts, before the work
        check_arguments(args)
        build_unet(args.block_out_channels, args.layers_per_block)
        if args.parts:
            take_parts(args.parts, args.output)
        if args.data:
            args.material.validation(1)
    except ValueError as error:
        parser.error(str(error))
    train_teacher(args)


def _asked_to_end(signum: int, frame: object) -> None:
    """Ends as at Ctrl-C, no process left behind. Lightning's own ends with status 0, as a training that is done."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _asked_to_end)
    sys.exit(guarded(main))
