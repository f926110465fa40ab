"""A small teacher on any imagefolder: what is cut of its photographs, and the whole training."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from lightning import Trainer
from PIL import Image
from torch.utils.data import default_collate

from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.teachers import train
from hgc_learn.teachers.photographs import PhotographDataset, Photographs, cut_photographs
from hgc_learn.teachers.pipeline import build_caption_tokenizer, tokenize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photographs, 80 wide and 60 high, black on the left and white on the right, with controls that are red where
    they are white, at half the size."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(6):
        photograph = np.zeros((60, 80, 3), np.uint8)
        photograph[:, 30 + 4 * i :] = 255
        control = photograph * np.array([1, 0, 0], np.uint8)
        Image.fromarray(photograph).save(folder / f"{i}.png")
        Image.fromarray(control[::2, ::2]).save(folder / f"control{i}.png")
        row = {"file_name": f"{i}.png", "conditioning_image_file_name": f"control{i}.png", "text": f"Wall {i}, lit"}
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_photograph_and_control_are_cut_alike(folder: Path, tmp_path: Path) -> None:
    photographs = Photographs(str(folder), "train[:4]")
    cut_photographs(photographs, tmp_path / "cut", 40)
    images, controls = (np.load(tmp_path / "cut" / f"{name}.npy").astype(int) for name in ("images", "controls"))
    assert images.shape == controls.shape == (40, 64, 64, 3)
    assert np.abs(images[..., 0] - controls[..., 0]).mean() < 5  # but for the control's coarser edge
    assert not controls[..., 1:].any()
    assert (tmp_path / "cut" / "captions.txt").read_text().splitlines()[:5] == [
        "Wall 0, lit", "Wall 1, lit", "Wall 2, lit", "Wall 3, lit", "Wall 0, lit",
    ]  # fmt: skip
    whole = PhotographDataset(photographs, 2)
    assert len(whole) == 2
    assert whole[1]["seed"] == 1
    np.testing.assert_allclose((whole[1]["image"].permute(1, 2, 0) * 127.5 + 127.5).round(), images[1], atol=1)
    is_left_dark = images[:, :, 0].mean((1, 2)) < images[:, :, -1].mean((1, 2))
    assert is_left_dark[:4].all()  # whole ones
    assert 5 <= (~is_left_dark).sum() <= 31  # mirrored

    first = images.copy()
    (tmp_path / "cut" / "captions.txt").unlink()  # as if it had been interrupted
    cut_photographs(photographs, tmp_path / "cut", 40)
    np.testing.assert_array_equal(np.load(tmp_path / "cut" / "images.npy"), first)


def test_control_images_are_made_from_photographs(folder: Path) -> None:
    control = PhotographDataset(Photographs(str(folder), "train", "canny"), 6)[0]["conditioning_image"]
    assert set(control.unique().tolist()) == {0.0, 1.0}
    assert control[0].sum(0).argmax() in (23, 24)  # the edge, 30 of 80
    assert control[0].sum() <= 2 * 64


def test_every_word_of_any_captions_is_one_token() -> None:
    captions = ["A street with sky, car", "déjà vu: 2 cats"]
    tokenizer = build_caption_tokenizer(captions)
    assert [len(tokenizer(caption).input_ids) - 2 for caption in captions] == [6, 5]
    assert tokenizer.unk_token_id not in [token for text in captions for token in tokenizer(text).input_ids[1:-1]]
    assert tokenize(tokenizer, [*captions, "", "other words fall apart"]).shape == (4, 8)
    assert build_caption_tokenizer(["word " * 500]).model_max_length == 77


def test_a_teacher_is_trained_on_photographs_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "teacher"
    options = ["--output", str(output), "--data", str(folder)]  # by default the last tenth is held out, here one
    options += ["--block_out_channels", "8", "16", "16", "16", "--layers_per_block", "1", "--num_processes", "1"]
    options += ["--num_scenes", "8", "--text_encoder_steps", "2", "--text_encoder_batch_size", "4", "--vae_steps", "2"]
    options += ["--vae_batch_size", "2", "--denoiser_steps", "4", "--denoiser_batch_size", "2"]
    options += ["--validation_interval", "2"]

    def stop(self: object, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            raise ConnectionError

    monkeypatch.setattr(train.ExportPipeline, "on_train_batch_end", stop)
    with pytest.raises(ConnectionError):
        train.main(options)
    assert (output / "pictures.png").stat().st_size > 5000
    monkeypatch.undo()
    train.main(options)
    checkpoint = torch.load(output / "checkpoints" / "denoiser" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == checkpoint["state_dict"]["averaged.n_averaged"] == 4

    with (output / "logs" / "denoiser" / "version_0" / "metrics.csv").open() as file:
        (validated,) = (row for row in csv.DictReader(file) if row["val_loss"])
    assert float(validated["val_loss"]) > 0 and float(validated["val_loss_mirrored_control"]) > 0
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(output / "pipeline")
    held_out = default_collate([PhotographDataset(Photographs(str(folder), "train[5:]"), 2)[0]])
    pictures = generate(pipeline, SamplingConfig(2, height=64, width=64), held_out, output_type="pt")
    assert pictures.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/no/such/folder"], "there is no such folder"),
        (["--val_split", "test"], "split 'test'"),
    ],
)
def test_data_that_cannot_be_read_is_refused_before_the_work(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--output", str(tmp_path / "teacher"), "--data", str(folder), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "teacher").exists()
