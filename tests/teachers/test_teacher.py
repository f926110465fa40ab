import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from lightning import Trainer
from torch.utils.data import default_collate

from hgc_learn.demo import TEACHER_DIR
from hgc_learn.demo.scenes import COLORS, IMAGE_SIZE, KINDS, SceneDataset, draw_scene
from hgc_learn.evaluation import picture_psnr
from hgc_learn.sampling import SamplingConfig, generate
from hgc_learn.teachers import train
from hgc_learn.teachers.evaluate import evaluate_teacher
from hgc_learn.teachers.evaluate import main as evaluate
from hgc_learn.teachers.modules import warmup_stable_decay
from hgc_learn.teachers.pipeline import (
    GUIDANCE_SCALE,
    LAYERS_PER_BLOCK,
    MAX_TOKENS,
    build_tokenizer,
    build_vae,
    tokenize,
)

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
needs_weights = pytest.mark.skipif(not (TEACHER_DIR / "model_index.json").exists(), reason="no teacher weights")


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for seed in range(50):
        caption = draw_scene(seed).caption
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(caption.replace(",", " ,").split()) + 2 <= MAX_TOKENS
    assert tokenize(tokenizer, [""]).shape == (1, MAX_TOKENS)
    for word in (*KINDS, *COLORS):
        assert tokenizer.convert_tokens_to_ids(f"{word}</w>") != tokenizer.unk_token_id


def test_vae_makes_latents_of_a_quarter_of_the_size() -> None:
    latents = build_vae().encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 4, 16, 16)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    factors = [warmup_stable_decay(step, num_steps=100, num_warmup_steps=10, decay_share=0.2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[10] == factors[80] == 1 and factors[100] == 0
    assert factors[90] == pytest.approx(0.5)


def test_training_runs_through_all_stages_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "num_scenes": 8, "num_processes": 1, "text_encoder_steps": 2, "text_encoder_batch_size": 4, "vae_steps": 2,
        "vae_batch_size": 2, "denoiser_steps": 3, "denoiser_batch_size": 2, "validation_interval": 2,
        "validation_scenes": 2,
    }  # fmt: skip

    widths = ["--block_out_channels", "8", "16", "16", "16"]

    def run(**changes: int) -> None:
        options = [f"--{name}={value}" for name, value in {**sizes, **changes}.items()]
        train.main(["--output", str(tmp_path), *widths, "--layers_per_block=1", *options])

    stop_after(2, monkeypatch)
    with pytest.raises(ConnectionError, match="after step 2"):
        run()
    checkpoint_file = tmp_path / "checkpoints" / "denoiser" / "last.ckpt"
    assert torch.load(checkpoint_file, weights_only=False)["global_step"] == 1

    # Stages that are done stay as they are; an unfinished one goes on from its checkpoint.
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()}
    monkeypatch.undo()
    run(validation_interval=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()} == finished
    checkpoint = torch.load(checkpoint_file, weights_only=False)
    assert checkpoint["global_step"] == 3
    assert checkpoint["state_dict"]["averaged.n_averaged"] == 3
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.unet.dtype == torch.float32
    figures = evaluate_teacher(pipeline, split="validation", num_scenes=2, num_steps=(2, 1))
    assert 0 <= figures["scores"]["steps_2"]["control_miou"] <= 1

    assert pipeline.controlnet.config.block_out_channels == pipeline.unet.config.block_out_channels == [8, 16, 16, 16]
    assert pipeline.unet.config.layers_per_block == 1

    # Another width and depth, on the parts of the first.
    options = [f"--{name}={value}" for name, value in {**sizes, "denoiser_steps": 1}.items()]
    options += ["--parts", str(tmp_path / "pipeline"), "--block_out_channels", "16", "16", "16", "16"]
    train.main(["--output", str(tmp_path / "wide"), *options])
    wide = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "wide" / "pipeline")
    assert wide.unet.config.block_out_channels == [16, 16, 16, 16]
    assert wide.unet.config.layers_per_block == LAYERS_PER_BLOCK
    for mine, other in zip(wide.vae.parameters(), pipeline.vae.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage, before that step is saved."""

    def stop(self: object, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == step:
            raise ConnectionError(f"stopped after step {step}")

    monkeypatch.setattr(train.ExportPipeline, "on_train_batch_end", stop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "3"], "--seed: 3 now, 0 when the training in {} was begun"),
        (["--parts", "elsewhere"], "--parts: elsewhere now, not given when"),
        (["--block_out_channels", "8", "16", "16", "16"], "--block_out_channels: 8 16 16 16 now, 32 64 128 128 when"),
        (["--denoiser_steps", "7"], "Give what it was begun with to go on, or another --output"),
    ],
)
def test_a_training_does_not_go_on_with_other_arguments(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.save_arguments(train.TeacherArguments(tmp_path))
    with pytest.raises(SystemExit) as end:
        train.main(["--output", str(tmp_path), *options])
    assert end.value.code == 2
    assert message.format(tmp_path) in capsys.readouterr().err


def test_a_training_goes_on_elsewhere_with_as_many_processes_as_one_likes(tmp_path: Path) -> None:
    train.save_arguments(train.TeacherArguments(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    there = train.TeacherArguments(tmp_path / "there", num_processes=1, validation_interval=5)
    train.check_arguments(there)
    with pytest.raises(ValueError, match="--data: photographs now, not given when"):
        train.check_arguments(replace(there, data="photographs"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sent", "to_all", "num_processes", "num_scenes"),
    [
        (signal.SIGTERM, False, 1, 8),
        (signal.SIGINT, False, 2, 8),
        (signal.SIGTERM, True, 2, 8),
        (signal.SIGINT, True, 1, 40_000),  # while processes draw them
        (signal.SIGTERM, False, 1, 40_000),
    ],
)
def test_a_training_that_is_to_end_does_so_without_a_stack_trace_and_leaves_no_process(
    sent: signal.Signals, to_all: bool, num_processes: int, num_scenes: int, tmp_path: Path
) -> None:
    """Whether the signal is sent to the command alone or, as by Ctrl-C, to all its processes."""
    command = [sys.executable, "-m", "hgc_learn.teachers.train", "--output", str(tmp_path / "teacher")]
    command += [f"--num_scenes={num_scenes}", f"--num_processes={num_processes}", "--validation_scenes=2"]
    command += ["--text_encoder_steps=1", "--text_encoder_batch_size=4", "--vae_steps=100000", "--vae_batch_size=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begun = "scenes/images.npy.partial" if num_scenes > 8 else "logs/vae/version_0"
    with (tmp_path / "printed").open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        while not (tmp_path / "teacher" / begun).exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        (os.killpg if to_all else os.kill)(process.pid, sent)
        assert process.wait(60) == 128 + sent
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    printed = (tmp_path / "printed").read_text()
    assert "Traceback" not in printed
    assert printed.count("hgc_learn: interrupted\n") == (sent == signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "absent"], "absent has no folder tokenizer"),
        (["--block_out_channels", "10", "16", "16", "16"], "divisible"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    args = train.TeacherArguments(tmp_path)
    with pytest.raises(ValueError, match="must divide by 2 processes"):
        train.fit(
            torch.nn.Identity(), [], args, name="vae", num_steps=1, batch_size=3, num_processes=2  # type: ignore[arg-type]
        )  # fmt: skip


@needs_weights
def test_teacher_loads_and_obeys() -> None:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(TEACHER_DIR)
    scores = evaluate_teacher(pipeline, split="validation", num_scenes=8, num_steps=(10,))["scores"]
    assert scores["steps_10"]["control_miou"] > 0.65
    assert scores["steps_10"]["color_accuracy"] > 0.75


@needs_weights
def test_pictures_are_seeded_one_by_one() -> None:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(TEACHER_DIR)
    batch = default_collate([SceneDataset("validation", 2)[index] for index in range(2)])

    def sample(chosen: slice) -> torch.Tensor:
        sampling = SamplingConfig(2, GUIDANCE_SCALE, IMAGE_SIZE, IMAGE_SIZE)
        return generate(pipeline, sampling, {name: batch[name][chosen] for name in batch}, output_type="pt")

    assert picture_psnr(sample(slice(1, 2)), sample(slice(0, 2))[1:]).item() > 50


@needs_weights
def test_figures_belong_to_the_weights() -> None:
    figures = json.loads((TEACHER_DIR / "figures.json").read_text())
    assert figures["scores"]["drawn"]["control_miou"] > 0.95
    assert sum(path.stat().st_size for path in TEACHER_DIR.rglob("*") if path.is_file()) < 30 * 2**20


def test_a_teacher_that_is_not_there_is_told_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate(["--pipeline", str(tmp_path / "nowhere"), "--output", str(tmp_path / "figures")])
    assert "nowhere; there is no such folder." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
