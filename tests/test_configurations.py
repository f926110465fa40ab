"""Every configuration in configs/ is read, agrees with itself, and trains through the command line, made small."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from test_data import write_folder
from training_fixtures import save_tiny_models

from hgc_learn.comparison.config import read_config
from hgc_learn.training.lightning_cli import train

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = [
    path for folder in ("configs", "configs/compare/train") for path in sorted((ROOT / folder).glob("*.yaml"))
]
TO_FILL_IN = ["custom", "sd15_canny", "sd15_segmentation", "sd15_depth", "sdxl_canny"]
NUM_STEPS = 3


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd15` and `sdxl`, each with a pipeline in `model` and a ControlNet in `controlnet`."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder / "sd15", "small")
    save_tiny_models(folder / "sdxl", "small_sdxl")
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photographs"), 3)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_trains(configuration: Path, models: Path, photographs: Path, tmp_path: Path) -> None:
    """One update on a small model of its shape: dtype, sites, objective and data are the configuration's own."""
    config = yaml.safe_load(configuration.read_text())
    family = models / ("sdxl" if "sdxl" in configuration.stem else "sd15")
    arguments = {
        "model.model": family / "model",
        "model.controlnet": family / "controlnet",
        "model.sampling.num_inference_steps": NUM_STEPS,
        "model.sampling.height": 64,
        "model.sampling.width": 64,
        "model.budgets": "[0.7]",
        "data.num_train": 2,
        "data.num_val": 1,
        "data.batch_size": 1,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.default_root_dir": tmp_path,
        "checkpoint.dirpath": tmp_path / "checkpoints",
    }
    objective = config["model"].get("objective", {"class_path": "Rollout"})["class_path"]
    if objective == "Rollout":
        arguments["model.objective.num_warm_start_batches"] = 1
    if config["data"]["class_path"] == "ControlDataModule":
        arguments |= {"data.dataset": photographs, "data.height": 64, "data.width": 64}
        arguments |= {"data.train_split": "train", "data.val_split": "null"}  # without slices of theirs
    train(["fit", f"--config={configuration}", *(f"--{name}={value}" for name, value in arguments.items())])
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    logits = checkpoint["state_dict"]["router.logits"]
    assert len(logits) == NUM_STEPS
    assert logits.isfinite().all()
    assert logits.std() > 0
    kept = yaml.safe_load(checkpoint["config"])
    assert kept["model"]["objective"]["class_path"].endswith(objective)
    assert kept["model"]["dtype"] == config["model"].get("dtype", "float32")


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_prints_readably(
    configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train(["fit", "--config", str(configuration), "--print_config"])
    assert exit_info.value.code in (None, 0)
    printed = capsys.readouterr().out
    assert "num_inference_steps" in printed
    assert "budgets" in printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_parses(path: Path) -> None:
    assert f"python -m hgc_learn compare --config configs/compare/{path.name}" in path.read_text()
    assert read_config(path).budgets


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_of_every_comparison_what_is_small_can_be_committed(path: Path, tmp_path: Path) -> None:
    """Figures and schedules, not what they are made from."""
    cell, training = f"cells/UniPC-20/{path.stem}", f"trained/UniPC-20/{path.stem}"
    kept = [f"{cell}/0.5.json", f"{cell}/0.5.schedule.json", f"{cell}/0.5.schedule.safetensors"]
    kept += [f"{cell}/0.5.timing.json", f"{training}/trained.json"]
    made_again = ["references/UniPC-20-test.safetensors", "references/UniPC-20-test.lock", f"{training}/last.ckpt"]
    made_again += [f"{training}/lightning_logs/version_0/metrics.csv", f"{cell}/lock", f"{cell}/tmp1.tmp"]
    output = read_config(path).output
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    names = "\n".join(f"{output}/{name}" for name in kept + made_again)
    command = ["git", "-C", str(tmp_path), "check-ignore", "--stdin"]
    ignored = subprocess.run(command, input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    assert ignored == [f"{output}/{name}" for name in made_again]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_says_how_it_is_run_and_has_its_own_folder(configuration: Path) -> None:
    text = configuration.read_text()
    assert f"python train.py fit --config {configuration.relative_to(ROOT)}" in text
    config = yaml.safe_load(text)
    folder = config["trainer"]["default_root_dir"]
    assert folder == f"runs/{configuration.stem}"
    assert config["checkpoint"]["dirpath"] == f"{folder}/checkpoints"


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_configurations_say_what_to_fill_in(name: str) -> None:
    """Model, ControlNet and data are marked; sizes agree."""
    text = (ROOT / f"configs/{name}.yaml").read_text()
    marked = [line.split(":")[0].strip() for line in text.splitlines()[1:] if "# <-" in line]
    assert marked == ["model", "controlnet", "dataset"]
    config = yaml.safe_load(text)
    sampling, data = config["model"]["sampling"], config["data"]["init_args"]
    assert (sampling["height"], sampling["width"]) == (data["height"], data["width"])
    assert (data.get("condition") == "canny") == ("canny" in name)
