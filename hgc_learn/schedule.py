"""The schedule file: which sites are computed and which reused at each step, for one pipeline setting.

One human-readable JSON file and, where predictors need tensors, a safetensors file beside it. Both are read strictly:
they may come from a stranger. See `docs/schedule_format.md`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hgc_learn.files import check_writable, to_json, write_atomically
from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.plan import COMPUTE, check_codes
from hgc_learn.predictors import BY_CODE
from hgc_learn.schedule_tensors import MAX_TENSOR_BYTES, check_tensors, digest, read_tensors, tensor_path, to_bytes
from hgc_learn.sharing import CARD_NAME, FILE_NAME, find_schedule, is_own_card, model_card, upload_folder
from hgc_learn.sites import KINDS
from hgc_learn.strict import ScheduleError, check_finite, number, parse_json, read_bytes, take

FORMAT = "hgc_schedule"
VERSION = 6

MAX_FILE_BYTES = 16 * 2**20
MAX_STEPS = 4096
MAX_SITES = 20_000
MAX_NAME = 256
MAX_SETTINGS = 256
MAX_MACS = 10**24

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class HGCSchedule:
    """A static, input-invariant cache schedule.

    Attributes:
        sites: per site, one character per step: `C` compute, or the code of the predictor that fills it in (`-` holds
            the last value; see `hgc_learn.predictors`). Sites not listed are always computed. Every row begins with
            `C`, so the first step computes everything that a later one may reuse.
        timesteps: the scheduler's timestep (0 to 1000 in most models) of each model call, in the order of the run; more
            than steps where a sampler calls the models more than once a step.
        scheduler: class name of the diffusers scheduler.
        scheduler_config: how that is set, single values by name; what it does not name is not compared.
        guidance_scale: the scale it was made for; 1 or less means without guidance (half the batch).
        height, width: of the image, in pixels.
        model: fingerprint of the UNet and the ControlNets it was made for.
        producer: who wrote it: `policy`, `version` and the policy's `settings`.
        macs: multiply-accumulates of one image: `full` and `cached`, `full_attention` and `cached_attention`
            (attention matmuls counted).
        fidelity: measured quality against the uncached pipeline, by name (`psnr_db`, `num_samples`, ...).
        tensors: that predictors read, by `<site>/<parameter>`; dtypes and shapes are those of the predictors'
            parameters (docs/schedule_format.md). `==` does not look at them.

    Raises:
        ScheduleError: a value that no schedule can have; the message begins with the name of the field.
    """

    sites: dict[str, str]
    timesteps: tuple[float, ...]
    scheduler: str
    guidance_scale: float
    height: int
    width: int
    model: ModelFingerprint
    producer: dict[str, Any] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, Scalar] = field(default_factory=dict)
    scheduler_config: dict[str, Scalar] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if not 1 <= steps <= MAX_STEPS:
            raise ScheduleError(f"timesteps: {steps} entries; a schedule has 1 to {MAX_STEPS}.")
        if len(self.sites) > MAX_SITES:
            raise ScheduleError(f"sites: {len(self.sites)} entries; at most {MAX_SITES} are allowed.")
        for site, row in self.sites.items():
            if len(site) > MAX_NAME:
                raise ScheduleError(
                    f"sites: {site[:40]!r}... has {len(site)} characters; at most {MAX_NAME} are allowed."
                )
            kind = site.partition(":")[2]
            if kind not in KINDS:
                raise ScheduleError(f"sites: {site!r} has kind {kind!r}; known kinds are {', '.join(KINDS)}.")
            if len(row) != steps:
                raise ScheduleError(f"sites: {site!r} has {len(row)} steps, timesteps has {steps}.")
            try:
                check_codes(site, row)
            except ValueError as error:
                raise ScheduleError(f"sites: {error}") from None
            if row[0] != COMPUTE:
                raise ScheduleError(
                    f"sites: {site!r} is reused at step 0, where nothing has been computed yet. "
                    f"Its row must begin with {COMPUTE!r}."
                )
        if self.guided_sites and self.guidance_scale <= 1:
            raise ScheduleError(
                f"sites: {self.guided_sites[0]!r} is about the two halves of a guided batch; with guidance_scale "
                f"{self.guidance_scale} there is only one."
            )
        check_tensors(self.tensors, self.sites, steps)

    @property
    def guided_sites(self) -> list[str]:
        """Those that are filled in by what a batch with an unguided and a guided half has alone."""
        return [
            site
            for site, row in self.sites.items()
            if (site.endswith(":guidance") and set(row) != {COMPUTE})
            or any(BY_CODE[code].mean_of_halves for code in set(row) - {COMPUTE})
        ]

    @property
    def num_steps(self) -> int:
        """Model calls of a run, one per timestep: more than `num_inference_steps` with a second-order scheduler."""
        return len(self.timesteps)

    @property
    def settings(self) -> dict[str, Any]:
        """What its producer was set to, as the file says it; empty where it does not."""
        settings = self.producer.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of the run without a schedule that it was made for, as the file says it; empty where it does not."""
        sampling = self.settings.get("sampling")
        return sampling if isinstance(sampling, dict) else {}

    def reductions(self) -> dict[str, str]:
        """Share of the MACs that it saves, as people read it, by convention; empty where the file does not say."""
        shares = {}
        for suffix, words in (("", "not counted"), ("_attention", "counted")):
            full, cached = self.macs.get(f"full{suffix}"), self.macs.get(f"cached{suffix}")
            if full and cached is not None:
                shares[f"saved, attention matmuls {words}"] = f"{1 - cached / full:.1%}"
        return shares

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds; of the tensors, the SHA-256 of their file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "scheduler": self.scheduler,
            "scheduler_config": self.scheduler_config,
            "num_inference_steps": self.num_steps,
            "timesteps": list(self.timesteps),
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "macs": self.macs,
            "fidelity": self.fidelity,
            "producer": self.producer,
            "model": self.model.to_dict(),
            "tensors": digest(to_bytes(self.tensors)) if self.tensors else None,
            "sites": self.sites,
        }

    @classmethod
    def from_dict(cls, data: Any, tensors: Mapping[str, Tensor] | None = None) -> HGCSchedule:
        """Validates strictly. `tensors` are those of the file beside it.

        Raises:
            ScheduleError: names the field that is missing, unknown or wrong.
        """
        if not isinstance(data, dict):
            raise ScheduleError("The file does not hold a JSON object; it is not a schedule.")
        if data.get("format") != FORMAT:
            raise ScheduleError(f"format: is {data.get('format')!r}, not {FORMAT!r}; this is not a schedule file.")
        version = take(data, "version", int)
        if version > VERSION:
            raise ScheduleError(
                f"version: the file has version {version}, this hgc_learn reads up to {VERSION}. Upgrade hgc_learn."
            )
        if version < 1:
            raise ScheduleError(f"version: is {version}; versions start at 1.")
        later = {name for name, first in _SINCE.items() if version >= first}
        known = set(_FIELDS) | {"format", "version", "num_inference_steps"} | later
        if missing := sorted(later - set(data)):
            raise ScheduleError(f"{missing[0]}: missing.")
        unknown = sorted(set(data) - known)
        if unknown:
            raise ScheduleError(f"{unknown[0]}: unknown key; version {version} knows {', '.join(sorted(known))}.")
        fields = {name: take(data, name, kind) for name, kind in _FIELDS.items()}
        fields["timesteps"] = tuple(number(t, "timesteps") for t in fields["timesteps"])
        fields["guidance_scale"] = number(fields["guidance_scale"], "guidance_scale")
        for name in ("height", "width"):
            if not 1 <= fields[name] <= 65_536:
                raise ScheduleError(f"{name}: is {fields[name]}; a picture is 1 to 65536 pixels.")
        steps = take(data, "num_inference_steps", int)
        if steps != len(fields["timesteps"]):
            raise ScheduleError(f"num_inference_steps: is {steps}, but timesteps has {len(fields['timesteps'])}.")
        for site, row in fields["sites"].items():
            if not isinstance(row, str):
                raise ScheduleError(f"sites: {site!r} must be a string with one character per step.")
        for name, value in fields["macs"].items():
            if type(value) is not int or not 0 <= value <= MAX_MACS:
                raise ScheduleError(f"macs: {name!r} must be an integer from 0 to {MAX_MACS:.0e}.")
        fields["scheduler_config"] = take(data, "scheduler_config", dict) if "scheduler_config" in known else {}
        if len(fields["scheduler_config"]) > MAX_SETTINGS:
            raise ScheduleError(f"scheduler_config: has more than {MAX_SETTINGS} entries.")
        for single in ("fidelity", "scheduler_config"):
            for name, scalar in fields[single].items():
                if not isinstance(scalar, Scalar):
                    raise ScheduleError(f"{single}: {name!r} must be a single value, not {type(scalar).__name__}.")
                check_finite(scalar, f"{single}: {name!r}")
        check_finite(fields["producer"], "producer")
        try:
            fields["model"] = ModelFingerprint.from_dict(fields["model"])
        except ValueError as error:
            raise ScheduleError(f"model: {error}") from None
        return cls(**fields, tensors=dict(tensors or {}))

    def resampled(self, timesteps: Sequence[float]) -> HGCSchedule:
        """The same for other timesteps: each step does what this schedule does at the nearest one. What was measured
        is left out."""
        old = [min(range(self.num_steps), key=lambda i: abs(self.timesteps[i] - t)) for t in timesteps]
        sites, tensors = {}, {}
        for site, row in self.sites.items():
            sites[site] = COMPUTE + "".join(row[i] for i in old[1:])
            for code in set(row) - {COMPUTE}:
                fills = [row[:i].count(code) for i in old[1:] if row[i] == code]
                for parameter in BY_CODE[code].parameters if fills else ():
                    rows = {"steps": old, "fills": fills}.get(parameter.axes[0])
                    tensor = self.tensors[f"{site}/{parameter.name}"]
                    tensors[f"{site}/{parameter.name}"] = tensor if rows is None else tensor[rows]
        return replace(self, sites=sites, timesteps=tuple(timesteps), tensors=tensors, macs={}, fidelity={})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, and its tensors beside it if it has any, each whole or not at all.

        Raises:
            ValueError: another ending than `.json`, or what `load` would refuse.
            OSError: it cannot be written there.
        """
        check_output(path := Path(path))
        content, tensors = to_json(self.to_dict()), to_bytes(self.tensors) if self.tensors else b""
        for what, size, most in (("", len(content), MAX_FILE_BYTES), ("'s tensors", len(tensors), MAX_TENSOR_BYTES)):
            if size > most:
                raise ScheduleError(f"{path}: the schedule{what} would take {size} bytes; {most} are read at most.")
        HGCSchedule.from_dict(parse_json(content), self.tensors)  # or it must not replace what is there
        if tensors:
            write_atomically(tensor_path(path), tensors)
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HGCSchedule:
        """Reads and validates a schedule file.

        Raises:
            ScheduleError: the file cannot be read or is not a valid schedule; the message names file and field.
        """
        raw = read_bytes(Path(path), MAX_FILE_BYTES)
        try:
            data = parse_json(raw)
            expected = data.get("tensors") if isinstance(data, dict) else None
            return cls.from_dict(data, read_tensors(tensor_path(path), expected))
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ScheduleError(f"{path}: not valid JSON ({error}); the file may be truncated. Get it again.") from None

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, subfolder: str = "", revision: str | None = None, **download: Any
    ) -> HGCSchedule:
        """Reads `hgc_schedule.json` of a folder or of a repository on the hub, as strictly as `load`.

        Args:
            source: a folder, a repository (owner/name), or the file itself.
            subfolder: of the folder or the repository.
            revision: branch, tag or commit of the repository.
            download: `token`, `cache_dir`, `local_files_only`, ... of `huggingface_hub.snapshot_download`.

        Raises:
            ScheduleError: there is none, or it is not a valid schedule.
        """
        try:
            path = find_schedule(source, subfolder=subfolder, revision=revision, **download)
        except ValueError as error:
            raise ScheduleError(str(error)) from None
        return cls.load(path)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `hgc_schedule.json`, its tensors and, unless somebody else's README.md is there, a model card.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        self.save(folder / FILE_NAME)
        card = folder / CARD_NAME
        if not card.exists() or is_own_card(card):
            write_atomically(card, model_card(self).encode())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload cache schedule",
    ) -> str:
        """Uploads the files and a model card as one commit, into a repository that is made if there is none. A
        README.md of somebody else's that is there stays. Returns the commit's address.

        Args:
            repo_id: `owner/name`.
            subfolder: of the repository, to upload to.
            revision: branch to upload to, made if there is none; the main one if not given.
            private: of a repository that is made.
            token: instead of the one that `hf auth login` has stored.
            commit_message: of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses it.
            OSError: the hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder, FILE_NAME))
            write_atomically(Path(folder, CARD_NAME), model_card(self, repo_id, subfolder).encode())
            options: dict[str, Any] = {"private": private, "token": token, "commit_message": commit_message}
            return upload_folder(folder, repo_id, subfolder=subfolder, revision=revision, **options)


def check_output(path: Path) -> None:
    """Raises what `HGCSchedule.save` would, before what is to be saved is there."""
    if path.suffix != ".json":
        raise ValueError(f"{path}: a schedule's file ends in .json, and its tensors are beside it in .safetensors.")
    check_writable(path)


_SINCE = {"tensors": 2, "scheduler_config": 6}  # versions that fields came with
_FIELDS: dict[str, Any] = {
    "sites": dict,
    "timesteps": list,
    "scheduler": str,
    "guidance_scale": (int, float),
    "height": int,
    "width": int,
    "model": dict,
    "producer": dict,
    "macs": dict,
    "fidelity": dict,
}
