"""Schedules in folders and on the Hugging Face hub: finding them, uploading them, the card that describes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc_learn.__main__ import printable

if TYPE_CHECKING:
    from hgc_learn.schedule import HGCSchedule

FILE_NAME = "hgc_schedule.json"
TENSOR_NAME = "hgc_schedule.safetensors"
CARD_NAME = "README.md"
LIBRARY_NAME = "hgc_learn"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def find_schedule(
    source: str | os.PathLike[str], *, subfolder: str = "", revision: str | None = None, **download: Any
) -> Path:
    """Path of a schedule file: `source` is the file, a folder that holds one, or a repository on the hub (owner/name),
    of which nothing but the schedule is downloaded.

    Raises:
        ValueError: nothing is here by that name, nor on the hub.
    """
    path = Path(source)
    if path.is_dir():
        return path / subfolder / FILE_NAME
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
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    try:
        card = hf_hub_download(repo_id, CARD_NAME, subfolder=subfolder or None, revision=revision, token=token)
        ignored = [] if is_own_card(Path(card)) else [CARD_NAME]
    except EntryNotFoundError:
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
    """Whether a README.md is a card that `model_card` wrote."""
    return f"library_name: {LIBRARY_NAME}\n" in path.read_text(encoding="utf-8", errors="replace")


def model_card(schedule: HGCSchedule, source: str = "path/to/this/folder", subfolder: str = "") -> str:
    """README.md with the metadata that the hub reads, from nothing but the schedule's own figures.

    Args:
        source: what users give to load it: a folder or a repository.
        subfolder: of it.
    """
    from huggingface_hub import ModelCardData

    settings = schedule.producer.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    base_models = [str(settings[key]) for key in ("model", "controlnet") if is_hub_id(settings.get(key))]
    metadata = ModelCardData(
        library_name=LIBRARY_NAME,
        tags=["hgc_schedule", "diffusers", "controlnet", "caching"],
        base_model=base_models or None,
    ).to_yaml()
    guided = "with" if schedule.guidance_scale > 1 else "without"
    setting = {
        "made for": ", ".join(base_models) or "see the architectures",
        **{f"architecture of {name}": digest for name, digest in schedule.model.architecture.items()},
        "scheduler": schedule.scheduler,
        "steps": schedule.num_inference_steps,
        "guidance scale": f"{schedule.guidance_scale:g} ({guided} guidance)",
        "size": f"{schedule.height} x {schedule.width} pixels (height x width)",
    }
    written_by = {**schedule.producer, **{k: v for k, v in settings.items() if not isinstance(v, dict | list)}}
    written_by.pop("settings", None)
    load = f'HGCSchedule.from_pretrained("{source}", subfolder="{subfolder}")' if subfolder else f'"{source}"'
    return f"""---
{metadata}
---

# Cache schedule

Says which parts of a diffusers ControlNet pipeline are computed at each step and which are filled in from earlier
steps. It holds no weights and no code.

```python
from hgc_learn.inference import HGCSchedule, apply_schedule

apply_schedule(pipe, {load})  # then call pipe(...) as always
```
{_table("Valid for", setting)}
{_table("MACs of one picture", schedule.reductions() | schedule.macs)}
{_table("Measured against the uncached pipeline", schedule.fidelity)}
{_table("Written by", written_by)}
"""


def is_hub_id(name: Any) -> bool:
    """Whether this can only be the name of a repository on the hub: owner/name, and no folder here."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _table(title: str, entries: Mapping[str, Any]) -> str:
    if not entries:
        return ""
    rows = "\n".join(f"| {_literal(name)} | {_literal(value)} |" for name, value in entries.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{rows}"


def _literal(value: Any) -> str:
    """Text that Markdown shows as it is: a schedule's strings may come from a stranger."""
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&$:@])", r"\\\1", text)
