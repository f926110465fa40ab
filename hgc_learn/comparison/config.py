"""What is compared, on what, and how hard the policies are tuned: one YAML file, read by jsonargparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hgc_learn.demo.scenes import IMAGE_SIZE
from hgc_learn.sampling import SamplingConfig


@dataclass
class SamplerConfig:
    """A sampler.

    Args:
        scheduler: class name of a diffusers scheduler.
        num_inference_steps: number of denoising steps.
        num_test: test scenes that its cells are judged on; every one has its own prompt, control and seed.
        scheduler_config: settings of the scheduler that take the place of those in the model's own config.
    """

    scheduler: str
    num_inference_steps: int
    num_test: int
    scheduler_config: dict[str, Any] | None = None


@dataclass
class TuningConfig:
    """How the knobs of a policy are set for a cell: all its candidates are counted by plan, those within the budget and
    closest to it are tried by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), and the best mean
    PSNR wins.

    In every round those left share `max_candidates` x `num_screening_scenes` pictures, and the better half goes on:
    96 candidates are judged on 2 scenes, 48 on 4, 24 on 8, 12 on 16 and 6 on 32; 10, where a policy has no more, on 19
    and 5 of them on 32. A candidate is judged on all scenes that it has seen, and made on those only that are new.

    Args:
        max_candidates: candidates tried, spread over the policy's variants.
        num_screening_scenes: validation scenes of the first round, if there are as many candidates.
        num_scenes: validation scenes of the last round.
        num_calibration: training scenes for policies that measure before they write a schedule.
        num_search: training scenes that a search tries schedules on.
        tolerance: by how much, as a fraction of the full MACs, a schedule may exceed the budget.
    """

    max_candidates: int = 96
    num_screening_scenes: int = 2
    num_scenes: int = 32
    num_calibration: int = 16
    num_search: int = 32
    tolerance: float = 0.002


@dataclass
class DataConfig:
    """Samples of an imagefolder, of parquet files or of the hub, instead of drawn scenes; as for `ControlDataModule`.

    Args:
        dataset: folder with `metadata.jsonl` or parquet files, or id on the hub.
        dataset_config_name: which of its configurations.
        train_split: for policies that measure before they write a schedule. Slices, as in `train[:80%]`, are splits.
        validation_split: that knobs are tuned on.
        test_split: that is judged on.
        conditioning_image_column: column of the control image.
        image_column: column of the photograph; read only where control images are made from it.
        text_column: column of the prompt.
        condition: `canny` makes the control images from the photographs.
    """

    dataset: str
    train_split: str
    validation_split: str
    test_split: str
    conditioning_image_column: str = "conditioning_image"
    image_column: str = "image"
    text_column: str = "text"
    condition: Literal["canny"] | None = None
    dataset_config_name: str | None = None


@dataclass
class GridConfig:
    """The picture that shows the same samples under every policy.

    Args:
        sampler: name of the sampler.
        budget: of the cells to show.
        num_pictures: samples to show, the first of the test scenes.
    """

    sampler: str
    budget: float
    num_pictures: int = 6


@dataclass
class CompareConfig:
    """A comparison.

    Args:
        model: folder of the frozen pipeline.
        samplers: by name, which appears in paths and in the report.
        budgets: fractions of the full MACs to keep.
        grid: what the picture grid shows.
        policies: names of the policies; all if not given.
        data: what is compared on; the demonstration's drawn scenes if not given.
        height: of the pictures, in pixels.
        width: likewise.
        guidance_scale: classifier-free guidance scale.
        test_offset: test scenes left out, those before the first that is judged on.
        batch_size: samples generated at once.
        tuning: how the knobs are set.
        fixed: knobs that are not tuned, by policy: how much a search may try, for example.
        training_config: of the policies that read a checkpoint: path of the training configuration, in which
            `{policy}` and `{sampler}` are filled in.
        num_trainings: of policies that can choose the best of several (`learned`): how many, with the seeds 0, 1, ...;
            1 if not given.
        optional_metrics: further metrics, of which the weights must be on this machine: `lpips`, `clip`.
        output: folder for cells, references and checkpoints; what is there is not made again.
        report: folder for the report.
        name: of the report's files.
    """

    model: str
    samplers: dict[str, SamplerConfig]
    budgets: list[float]
    grid: GridConfig
    policies: list[str] | None = None
    data: DataConfig | None = None
    height: int = IMAGE_SIZE
    width: int = IMAGE_SIZE
    guidance_scale: float = 7.5
    test_offset: int = 0
    batch_size: int = 16
    tuning: TuningConfig = field(default_factory=TuningConfig)
    fixed: dict[str, dict[str, Any]] = field(default_factory=dict)
    training_config: str = "configs/compare/train/{policy}-{sampler}.yaml"
    num_trainings: dict[str, int] = field(default_factory=dict)
    optional_metrics: list[str] = field(default_factory=list)
    output: str = "runs/compare"
    report: str = "benchmarks/compare"
    name: str = "compare"

    def __post_init__(self) -> None:
        from hgc_learn.policies import POLICIES

        if self.policies is None:
            self.policies = sorted(POLICIES)
        unknown = sorted(set(self.policies) - set(POLICIES))
        if unknown:
            raise ValueError(f"policies: {unknown[0]!r} is not one of {', '.join(sorted(POLICIES))}.")
        for name, knobs in self.fixed.items():
            if name not in POLICIES:
                raise ValueError(f"fixed: {name!r} is not one of {', '.join(sorted(POLICIES))}.")
            try:
                POLICIES[name].check(knobs)
            except ValueError as error:
                raise ValueError(f"fixed: {error}") from None
        for name, number in self.num_trainings.items():
            if "other_ckpt_paths" not in (POLICIES[name].knobs if name in POLICIES else ()):
                raise ValueError(f"num_trainings: {name!r} is no policy that chooses the best of several trainings.")
            if number < 1:
                raise ValueError(f"num_trainings: {number} of {name}; it must be at least 1.")
        for name, sampler in self.samplers.items():
            if not name or Path(name).name != name:
                raise ValueError(f"samplers: {name!r} names a folder; use letters, digits and dashes.")
            if sampler.num_test < 2:
                raise ValueError(f"samplers: {name} has num_test {sampler.num_test}; an interval needs at least 2.")
        if self.data is None and (self.height, self.width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"height and width: drawn scenes are {IMAGE_SIZE}x{IMAGE_SIZE}; set data for other samples."
            )
        for what, values in (("policies", self.policies), ("budgets", self.budgets)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what}: {values} has one of them twice.")
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise ValueError(f"budgets: {budget} is not between 0 and 1; it is the fraction of full MACs to keep.")
        if self.test_offset < 0:
            raise ValueError(f"test_offset is {self.test_offset}; it is a number of scenes.")
        for what in ("max_candidates", "num_screening_scenes"):
            if getattr(self.tuning, what) < 1:
                raise ValueError(f"tuning: {what} is {getattr(self.tuning, what)}; it must be at least 1.")
        if self.tuning.num_screening_scenes > self.tuning.num_scenes:
            raise ValueError("tuning: num_screening_scenes is larger than num_scenes.")
        if self.grid.sampler not in self.samplers or self.grid.budget not in self.budgets:
            raise ValueError(f"grid: {self.grid.sampler} at {self.grid.budget:g} is not among samplers and budgets.")

    def sampling(self, sampler: str) -> SamplingConfig:
        """How pictures are made with a sampler."""
        return SamplingConfig(
            num_inference_steps=self.samplers[sampler].num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.samplers[sampler].scheduler,
            scheduler_config=self.samplers[sampler].scheduler_config,
        )

    @property
    def policy_names(self) -> list[str]:
        assert self.policies is not None
        return self.policies


def read_config(path: Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Reads a YAML file; `overrides` are as on a command line, as in `--tuning.num_scenes=4`.

    Raises:
        ValueError: the file is missing or not such a configuration; the message names the key.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if not path.is_file():
        raise ValueError(f"{path}: no such file; run from the root of the repository.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(CompareConfig)
    try:
        settings = parser.parse_args([f"--config={path}", *overrides])
        values = parser.instantiate_classes(settings).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from None
    values.pop("config")
    return CompareConfig(**values)
