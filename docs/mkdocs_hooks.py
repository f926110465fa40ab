"""For mkdocs: files of the repository that the pages link to go along with the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, *, config: Any, files: Any, **_: Any) -> str:
    """Called by mkdocs. `../configs/demo.yaml` becomes a copy at `repository/configs/demo.yaml`."""
    for link, name in set(re.findall(r"(\]\(\.\./([^)#]+)(?:#[^)]*)?\))", markdown)):
        if (ROOT / name).is_file():  # what does not exist stays a dead link, which mkdocs refuses
            uri = f"repository/{name}"
            uri += ".txt" if uri.endswith(".md") else ""  # a page of the site otherwise
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
            markdown = markdown.replace(link, f"]({uri})")
    return markdown
