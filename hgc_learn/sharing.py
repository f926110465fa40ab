"""Schedules in folders and on the Hugging Face hub: finding them, uploading them, the card that describes them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc_learn.files import printable

if TYPE_CHECKING:
    from hgc_learn.schedule import HGCSchedule

FILE_NAME = "hgc_schedule.json"
TENSOR_NAME = "hgc_schedule.safetensors"
CARD_NAME = "README.md"
LIBRARY_NAME = "hgc_learn"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MARK = "<!-- Written by hgc_learn, which writes it anew unless it has been edited: "  # the digest follows
_END = " -->\n"
MAX_HUB_ID = 96  # characters, on the hub itself


def find_schedule(
    source: str | os.PathLike[str], *, subfolder: str = "", revision: str | None = None, **download: Any
) -> Path:
    """Path of a schedule file: `source` is the file, a folder that holds one, or a repository on the hub (owner/name),
    of which nothing but the schedule is downloaded.

    Raises:
        ValueError: nothing is here by that name, nor on the hub, or `source` is no name.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(
            f"A schedule is given as an HGCSchedule or by its file, folder or hub id, not as {source!r:.80}. Of a dict "
            "HGCSchedule.from_dict makes one, a handle has its own as handle.schedule."
        )
    path = Path(source)
    if path.is_dir():
        found = path / subfolder / FILE_NAME
        if not found.exists() and (others := sorted(path.glob(f"*/{FILE_NAME}"))):
            names = ", ".join(str(other.parent) for other in others)
            raise ValueError(f"{path}: there is no {FILE_NAME} in this folder; name one of {names}.")
        return found
    if path.suffix == ".json" or not is_hub_id(str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=[prefix + FILE_NAME, prefix + TENSOR_NAME], **download
        )
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source}: no file or folder here, and the hub does not give it ({reason}). Check the name and the "
            "revision; a private repository needs `hf auth login`."
        ) from None
    if not (found := Path(folder, subfolder, FILE_NAME)).exists():
        raise ValueError(f"{source}: this repository has no {prefix}{FILE_NAME}. Set subfolder or revision.")
    return found


def upload_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str,
) -> str:
    """Uploads a folder that holds a schedule as one commit, into a repository that is made if there is none; returns
    the commit's address. A card of somebody else's that is there stays."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        card = hf_hub_download(repo_id, CARD_NAME, subfolder=subfolder or None, revision=revision, token=token)
        ignored = [] if is_own_card(Path(card)) else [CARD_NAME]
    except RemoteEntryNotFoundError:  # and nothing else: a hub that cannot be reached may have one
        ignored = []
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        path_in_repo=subfolder or None,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=ignored,
        delete_patterns=TENSOR_NAME,  # of an earlier schedule; one that is uploaded stays
    )
    return str(commit.commit_url)


def is_own_card(path: Path) -> bool:
    """Whether a README.md is a card that `model_card` wrote, and nobody has changed since."""
    text, _, digest = path.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    return digest == _digest(text) + _END


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(schedule: HGCSchedule, source: str = "path/to/this/folder", subfolder: str = "") -> str:
    """README.md with the metadata that the hub reads, from nothing but the schedule's own figures.

    Args:
        source: what users give to load it: a folder or a repository.
        subfolder: of it.
    """
    from huggingface_hub import ModelCardData

    base_models = _base_models(schedule)
    metadata = ModelCardData(
        library_name=LIBRARY_NAME,
        tags=["hgc_schedule", "diffusers", "controlnet", "caching"],
        base_model=base_models or None,
    ).to_yaml()
    load = f'HGCSchedule.from_pretrained("{source}", subfolder="{subfolder}")' if subfolder else f'"{source}"'
    tables = "\n".join(_table(title, entries) for title, entries in facts(schedule).items())
    card = f"""---
{metadata}
---

# Cache schedule

Says which parts of a diffusers ControlNet pipeline are computed at each step and which are filled in from earlier
steps. It holds no weights and no code.

```python
from hgc_learn.inference import HGCSchedule, apply_schedule

apply_schedule(pipe, {load})  # then call pipe(...) as always
```
{tables}
"""
    return f"{card}{_MARK}{_digest(card)}{_END}"


def facts(schedule: HGCSchedule) -> dict[str, dict[str, Any]]:
    """What the file says of itself but its rows, for people: by heading, name and value. Strings are the file's own."""
    guided = "with" if schedule.guidance_scale > 1 else "without"
    settings = schedule.settings
    made_for = {"made for": ", ".join(names)} if (names := _base_models(schedule)) else {}
    tables: dict[str, dict[str, Any]] = {
        "Valid for": {
            **made_for,
            **{f"architecture of {name}": digest for name, digest in schedule.model.architecture.items()},
            "scheduler": schedule.scheduler,
            "steps": schedule.num_steps,
            "guidance scale": f"{schedule.guidance_scale:g} ({guided} guidance)",
            "size": f"{schedule.height} x {schedule.width} pixels (height x width)",
        },
        "Settings of the scheduler": dict(schedule.scheduler_config),
        "MACs of one picture": {**schedule.reductions(), **schedule.macs},
        "Measured against the uncached pipeline": dict(schedule.fidelity),
        "Written by": {
            **{name: value for name, value in schedule.producer.items() if name != "settings"},
            **{name: value for name, value in settings.items() if not isinstance(value, dict | list)},
        },
    }
    return {title: entries for title, entries in tables.items() if entries}


def _base_models(schedule: HGCSchedule) -> list[str]:
    settings = schedule.settings
    return [str(settings[key]) for key in ("model", "controlnet") if is_hub_id(settings.get(key))]


def is_hub_id(name: Any) -> bool:
    """Whether this can only be the name of a repository on the hub: owner/name, and no folder here."""
    is_id = isinstance(name, str) and len(name) <= MAX_HUB_ID and bool(_HUB_ID.fullmatch(name))
    return is_id and not Path(name).exists()


def _table(title: str, entries: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {_literal(name)} | {_literal(value)} |" for name, value in entries.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _literal(value: Any) -> str:
    """Text that Markdown shows as it is: a schedule's strings may come from a stranger."""
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&$:@])", r"\\\1", text)
