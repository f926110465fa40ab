"""Schedules in folders and on the hub. The hub is a folder here: `snapshot_download` and `HfApi` work on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from markdown_it import MarkdownIt
from test_schedule import SCHEDULE
from tiny_models import build_pipeline

from hgc_learn.__main__ import main
from hgc_learn.inference import HGCSchedule, ScheduleError, apply_schedule
from hgc_learn.schedule_tensors import tensor_path

SCALED = HGCSchedule(
    **vars(SCHEDULE)
    | {
        "sites": {"unet.mid_block.attentions.0:out": "C-sCs"},
        "tensors": {
            f"unet.mid_block.attentions.0:out/{name}": torch.arange(20.0).reshape(5, 4) for name in ("scale", "shift")
        },
    }
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories by name and revision, as folders."""
    root = tmp_path / "hub"
    root.mkdir()

    def repository(repo_id: str, revision: str | None) -> Path:
        return root / repo_id / (revision or "main")

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str], token: Any = None) -> str:
        folder = repository(repo_id, revision)
        if not folder.is_dir():
            raise RepositoryNotFoundError(
                f"404 Client Error.\n\nRepository Not Found: {repo_id}",
                response=SimpleNamespace(headers={}, request=None),
            )
        copy = tmp_path / "cache" / repo_id / (revision or "main")
        for pattern in allow_patterns:
            if (folder / pattern).is_file():
                (copy / pattern).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / pattern, copy / pattern)
        copy.mkdir(parents=True, exist_ok=True)
        return str(copy)

    def hf_hub_download(repo_id: str, name: str, *, subfolder: str | None, revision: str | None, token: Any) -> str:
        path = repository(repo_id, revision) / (subfolder or "") / name
        if not path.is_file():
            raise RemoteEntryNotFoundError(name, response=SimpleNamespace(headers={}, request=None))
        return str(path)

    class Api:
        def __init__(self, token: Any = None):
            pass

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
            repository(repo_id, None).mkdir(parents=True, exist_ok=exist_ok)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            repository(repo_id, branch).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: str, path_in_repo: str | None, **options: Any) -> Any:
            target = repository(repo_id, options["revision"]) / (path_in_repo or "")
            new = {path.name: path for path in Path(folder_path).iterdir()}
            for path in target.glob(options["delete_patterns"]):
                path.unlink()
            for name in new.keys() - set(options["ignore_patterns"]):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(new[name], target / name)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return root


def same(one: HGCSchedule, other: HGCSchedule) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )
    return one == other and tensors


@pytest.mark.parametrize("schedule", [SCHEDULE, SCALED], ids=["plain", "with tensors"])
def test_a_folder_round_trip(schedule: HGCSchedule, tmp_path: Path) -> None:
    schedule.save_pretrained(tmp_path / "shared")
    for source, subfolder in ((tmp_path / "shared", ""), (tmp_path, "shared")):
        assert same(HGCSchedule.from_pretrained(source, subfolder=subfolder), schedule)
    assert same(HGCSchedule.from_pretrained(tmp_path / "shared" / "hgc_schedule.json"), schedule)


@pytest.mark.parametrize("place", [{}, {"subfolder": "fast/half"}, {"revision": "v2"}])
def test_a_hub_round_trip(place: dict[str, str], hub: Path) -> None:
    assert SCALED.push_to_hub("someone/schedule", **place) == "https://hub/someone/schedule/commit/1"
    assert same(HGCSchedule.from_pretrained("someone/schedule", **place), SCALED)
    SCHEDULE.push_to_hub("someone/schedule", **place)  # without tensors: the old ones go
    assert same(HGCSchedule.from_pretrained("someone/schedule", **place), SCHEDULE)
    assert not list(hub.rglob("*.safetensors"))
    if place:
        with pytest.raises(ScheduleError, match=r"someone/schedule: this repository has no hgc_schedule.json"):
            HGCSchedule.from_pretrained("someone/schedule")


def test_a_card_that_the_hub_does_not_give_is_not_replaced(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be there: a request that times out ends in LocalEntryNotFoundError."""
    SCHEDULE.push_to_hub("someone/schedule")
    card = hub / "someone/schedule/main/README.md"
    card.write_text("somebody's own")

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(LocalEntryNotFoundError):
        SCHEDULE.push_to_hub("someone/schedule")
    assert card.read_text() == "somebody's own"


def test_a_repository_or_folder_is_applied_by_name(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = build_pipeline("sd15")
    schedule = own.schedule({"unet:eps": "C-C-C-"})
    schedule.push_to_hub("someone/schedule")
    schedule.save_pretrained(tmp_path / "folder")
    full = own()
    with apply_schedule(own.pipe, schedule):
        expected = own()
    assert not torch.equal(full, expected)
    for source in ("someone/schedule", tmp_path / "folder"):
        with apply_schedule(own.pipe, source) as handle:
            assert torch.equal(own(), expected)
            assert handle.schedule == schedule
    assert main(["inspect", "someone/schedule"]) == 0
    assert "unet:eps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("some/one", r"^some/one: no file or folder here, and the hub does not give it \(404 .*some/one\). Check"),
        ("some/one.json", r"^some/one.json: cannot be read"),
        ("a/b/c", r"^a/b/c: cannot be read"),
        ("../up", r"^../up: cannot be read"),
    ],
)
def test_what_is_nowhere_is_refused_in_one_line(source: str, message: str, hub: Path) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        HGCSchedule.from_pretrained(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [None, "", {"format": "hgc_schedule"}, 3])
def test_what_is_no_name_is_refused(source: Any) -> None:
    with pytest.raises(ScheduleError, match="A schedule is given as an HGCSchedule or by its file, folder or hub id"):
        HGCSchedule.from_pretrained(source)


def test_files_of_the_hub_are_read_as_strictly(hub: Path) -> None:
    SCALED.push_to_hub("someone/schedule")
    path = hub / "someone/schedule/main/hgc_schedule.json"
    text = path.read_text()
    path.write_text(text.replace('"height": 512', '"height": -1'))
    with pytest.raises(ScheduleError, match=r"hgc_schedule.json: height: is -1"):
        HGCSchedule.from_pretrained("someone/schedule")
    path.write_text(text)
    tensor_path(path).write_bytes(tensor_path(path).read_bytes()[:-1] + b"\x01")
    with pytest.raises(ScheduleError, match="not the file that belongs to this schedule"):
        HGCSchedule.from_pretrained("someone/schedule")


def metadata(card: str) -> dict[str, Any]:
    start, header, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header)


def test_the_card_holds_the_figures(tmp_path: Path) -> None:
    settings = {"model": "owner/base", "controlnet": "owner/net-1.0", "budget": 0.5}
    HGCSchedule(**vars(SCHEDULE) | {"producer": {"policy": "learned", "settings": settings}}).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert metadata(card) == {
        "library_name": "hgc_learn",
        "tags": ["hgc_schedule", "diffusers", "controlnet", "caching"],
        "base_model": ["owner/base", "owner/net-1.0"],
    }
    page = MarkdownIt().enable("table").render(card.split("---\n", 2)[2])
    for row in (
        ("scheduler", "UniPCMultistepScheduler"),
        ("size", "512 x 768 pixels (height x width)"),
        ("saved, attention matmuls not counted", "55.0%"),
        ("psnr_db", "31.5"),
        ("policy", "learned"),
        ("budget", "0.5"),
    ):
        assert "<td>{}</td>\n<td>{}</td>".format(*row) in page
    for model in ("hgc_learn/demo/teacher", str(tmp_path), "nothing", None, 3, "owner/" + "b" * 5000):
        producer = {"settings": {"model": model}}
        HGCSchedule(**vars(SCHEDULE) | {"producer": producer}).save_pretrained(tmp_path)
        assert "base_model" not in metadata((tmp_path / "README.md").read_text())


def test_strings_of_strangers_stay_text_in_the_card(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=y> [a](javascript:b) `c` | d\n# e\n---\n**f** \\| g"
    HGCSchedule(
        **vars(SCHEDULE)
        | {"scheduler": nasty, "producer": {nasty: nasty, "settings": {"model": nasty}}, "fidelity": {nasty: nasty}}
    ).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert set(metadata(card)) == {"library_name", "tags"}
    page = MarkdownIt().enable("table").render(card.split("---\n", 2)[2])
    for tag in ("<img", "<a ", "<strong>", "<h1>e", "<hr"):
        assert tag not in page
    assert page.count("<code") == 1  # the example's
    shown = "<td>&lt;img src=x onerror=y&gt; [a](javascript:b) `c` | d\\n# e\\n---\\n**f** \\| g</td>"
    assert page.count(shown) == 6


def test_cards_of_others_stay(hub: Path, tmp_path: Path) -> None:
    SCHEDULE.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    SCALED.save_pretrained(tmp_path)
    edited = card.read_text().replace("# Cache schedule", "# My notes")
    card.write_text(edited)
    SCHEDULE.save_pretrained(tmp_path)
    assert card.read_text() == edited
    card.write_text("# my pipeline\n")
    SCALED.save_pretrained(tmp_path)
    assert card.read_text() == "# my pipeline\n"
    shutil.copytree(tmp_path, hub / "someone/pipeline/main", ignore=shutil.ignore_patterns("hub", "cache"))
    SCHEDULE.push_to_hub("someone/pipeline")
    assert (hub / "someone/pipeline/main/README.md").read_text() == "# my pipeline\n"
    assert HGCSchedule.from_pretrained("someone/pipeline") == SCHEDULE
    for schedule in (SCHEDULE, HGCSchedule(**vars(SCHEDULE) | {"scheduler": "Other"})):
        schedule.push_to_hub("someone/schedule")
        card_text = (hub / "someone/schedule/main/README.md").read_text()
        assert schedule.scheduler in card_text
        assert 'apply_schedule(pipe, "someone/schedule")' in card_text
