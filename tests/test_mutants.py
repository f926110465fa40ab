"""Schedule files that somebody has changed: each is refused, or means what it says; nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import SCHEDULE, WITH_TENSORS

from hgc_learn.schedule import HGCSchedule
from hgc_learn.schedule_tensors import tensor_path
from hgc_learn.strict import ScheduleError

# Mutants of a good file: one value, key or character at a time

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [path]
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            places += _places(child, (*path, key))
    return places


@st.composite
def mutants(draw: st.DrawFn) -> str:
    data = SCHEDULE.to_dict()
    data = json.loads(json.dumps(data))
    place = draw(st.sampled_from(_places(data)[1:]))
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    how = draw(st.sampled_from(["replace", "remove", "add", "text", "text"]))
    if how == "replace":
        parent[place[-1]] = draw(_JSON)
    elif how == "remove":
        del parent[place[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = draw(_JSON)
    text = json.dumps(data, indent=1)
    if how == "text":
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 4)))
        text = text[:start] + draw(st.text('{}[]",:-0123456789CeE.\\\x00\n', max_size=3)) + text[end:]
    return text


def check_mutant(folder: Path, text: str) -> str:
    path = folder / "mutant.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        schedule = HGCSchedule.load(path)
    except ScheduleError:
        return "refused"
    again = folder / "again.json"
    schedule.save(again)
    assert HGCSchedule.load(again) == schedule
    assert schedule.to_dict() == json.loads(text)
    return "read as it stands"


@settings(max_examples=500)
@given(text=mutants())
def test_a_mutant_is_refused_or_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check_mutant(tmp_path_factory.getbasetemp(), text)


@pytest.mark.nightly
def test_many_mutants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_many("a schedule file", mutants(), partial(check_mutant, tmp_path), capsys)


def check_many(
    what: str, mutants: st.SearchStrategy[Any], check: Callable[[Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = Counter[str]()

    @settings(max_examples=10_000, derandomize=False)
    @given(mutant=mutants)
    def look(mutant: Any) -> None:
        found[check(mutant)] += 1

    look()
    with capsys.disabled():
        print(f"\n{found.total()} mutants of {what}: {dict(found)}")


# Mutants of the tensors beside it, whose SHA-256 the file names: as a stranger would write both


@st.composite
def tensor_mutants(draw: st.DrawFn) -> bytes:
    tensors = dict(WITH_TENSORS.tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["remove", "rename", "dtype", "shape", "value", "bytes", "bytes"]))
    tensor = tensors.pop(name)
    if how == "rename":
        tensors[draw(st.text("unet.:/abz", min_size=1, max_size=12))] = tensor
    elif how == "dtype":
        tensors[name] = tensor.to(draw(st.sampled_from([torch.float64, torch.int64, torch.bool, torch.bfloat16])))
    elif how == "shape":
        tensors[name] = tensor.new_zeros(draw(st.lists(st.integers(0, 6), max_size=3)))
    elif how == "value":
        tensors[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1, 200])))
        if tensor.is_floating_point():
            tensors[name].view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 1e30, 0.5]))
    elif how == "bytes":
        tensors[name] = tensor
    raw = safetensors.torch.save(tensors)
    if how == "bytes":
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(st.binary(max_size=4)) + raw[start + draw(st.integers(0, 9)) :]
    return raw


def check_tensor_mutant(folder: Path, raw: bytes) -> str:
    path = folder / "tensors.json"
    path.write_text(json.dumps(WITH_TENSORS.to_dict() | {"tensors": hashlib.sha256(raw).hexdigest()}))
    tensor_path(path).write_bytes(raw)
    try:
        schedule = HGCSchedule.load(path)
    except ScheduleError:
        return "refused"
    assert schedule.tensors.keys() == WITH_TENSORS.tensors.keys()
    for name, tensor in schedule.tensors.items():
        assert tensor.dtype == WITH_TENSORS.tensors[name].dtype
        assert tensor.isfinite().all()
        # The number of channels is checked against the model's where it is applied.
        assert tensor.ndim == WITH_TENSORS.tensors[name].ndim
    return "read as it stands"


@settings(max_examples=500)
@given(raw=tensor_mutants())
def test_a_mutant_of_the_tensors_is_refused_or_fits(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    check_tensor_mutant(tmp_path_factory.getbasetemp(), raw)


@pytest.mark.nightly
def test_many_mutants_of_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_many("the tensors beside it", tensor_mutants(), partial(check_tensor_mutant, tmp_path), capsys)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for save in (pickle.dump, torch.save):
        with open(tmp_path / "pickle", "wb") as file:
            save(Payload(made), file)
        raw = (tmp_path / "pickle").read_bytes()
        assert check_tensor_mutant(tmp_path, raw) == "refused"
        (tmp_path / "schedule.json").write_bytes(raw)
        with pytest.raises(ScheduleError, match="not valid JSON"):
            HGCSchedule.load(tmp_path / "schedule.json")
    assert not made.exists()


@pytest.mark.parametrize("shape", [[5], [2**40], [2**31, 2**31, 2**31], [0, 2**62, 2**62], [0, 2**63]])
@pytest.mark.parametrize("length", [0, 20, 2**40])
def test_sizes_in_a_file_allocate_nothing(tmp_path: Path, shape: list[int], length: int) -> None:
    """Of the header, of a tensor, of its bytes: none is believed beyond what the file holds."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}
    header = json.dumps(dict.fromkeys(WITH_TENSORS.tensors, entry)).encode()
    before = psutil.Process().memory_info().rss
    for header_length in (len(header), 2**40):
        raw = header_length.to_bytes(8, "little") + header + bytes(20)
        assert check_tensor_mutant(tmp_path, raw) == "refused"
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
