"""Files: written whole or not at all, and their text shown safely."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.umask(UMASK := os.umask(0))  # the only way to read it, and not one that threads may use


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """The file appears under its name only when it is complete and on the disk, whatever happens in between. Its folder
    is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~UMASK)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check_writable(path: Path) -> None:
    """Before long work: makes the folder of a file that is to be written.

    Raises:
        OSError: it could not be written there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to.")


def save_json(path: Path, value: Any) -> None:
    """Writes a JSON file, atomically; raises ValueError as `to_json`."""
    write_atomically(path, to_json(value))


def to_json(value: Any) -> bytes:
    """A JSON file's content.

    Raises:
        ValueError: it has numbers that JSON has not, infinite or none at all.
    """
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """`value` as JSON has it: knobs may be tuples, paths, numpy numbers."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(entry) for entry in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is not JSON; the message names the file.
        OSError: it cannot be read.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    return value


def printable(text: str) -> str:
    """`text` on one line, without control characters: names in files may come from a stranger."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
