"""Custom data: folders, parquet and streams give the same samples; what is wrong with them is said in one line."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import hgc_learn.data
from hgc_learn.data import ControlDataModule

NUM_ROWS = 6
SIZE: dict[str, Any] = {"height": 16, "width": 24}


def write_folder(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """An image folder: row i has the prompt `picture i`, a control image of brightness 40 i and a photograph with one
    edge."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(folder / f"control{i}.png")
        photo = np.zeros((30, 40, 3), np.uint8)
        photo[:, 20:] = 255
        Image.fromarray(photo).save(folder / f"photo{i}.png")
        rows.append(
            {"file_name": f"photo{i}.png", "conditioning_image_file_name": f"control{i}.png", "text": f"picture {i}"}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parquet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows."""
    path = tmp_path_factory.mktemp("parquet")
    datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").to_parquet(str(path / "rows.parquet"))
    return path


def ready(dataset: Path, **options: Any) -> ControlDataModule:
    module = ControlDataModule(str(dataset), **{**SIZE, "num_train": 4, "num_val": 2, "batch_size": 2, **options})
    module.setup("fit")
    return module


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_every_source_gives_the_same_samples(kind: str, streaming: bool, request: pytest.FixtureRequest) -> None:
    data = ready(request.getfixturevalue(kind), streaming=streaming, seed=100)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    assert batches[0]["conditioning_image"].shape == (2, 3, 16, 24)
    seen = {}
    for batch in [*batches, *data.val_dataloader()]:
        for text, picture, seed in zip(batch["text"], batch["conditioning_image"], batch["seed"], strict=True):
            seen[text] = int(seed)
            assert (text in ("picture 4", "picture 5")) == (seed >= 104)  # the last rows validate
            assert torch.allclose(picture[0], torch.tensor(40 * int(text[-1]) / 255), atol=0.01)
            assert not picture[1:].any()
    assert sorted(seen) == [f"picture {i}" for i in range(6)]
    assert sorted(seen.values()) == [100 + i for i in range(6)]
    assert next(iter(data.val_dataloader()))["text"] == ["picture 4", "picture 5"]


def test_splits_have_their_own_rows_and_seeds(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", 3)
    data = ready(tmp_path, val_split="test", num_train=5, num_val=3, batch_size=1)
    assert sorted(int(batch["seed"]) for batch in data.train_dataloader()) == [0, 1, 2, 3, 4]
    assert [int(batch["seed"]) for batch in data.val_dataloader()] == [5, 6, 7]
    assert sorted(batch["text"][0] for batch in data.val_dataloader()) == ["picture 0", "picture 1", "picture 2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_no_patterns(tmp_path: Path, streaming: bool) -> None:
    data = ready(write_folder(tmp_path / "my [best] pictures *", 4), num_train=2, num_val=2, streaming=streaming)
    assert len(list(data.train_dataloader())) > 0


def test_training_rows_are_drawn_from_all(folder: Path) -> None:
    """The first rows of a folder are often alike: moments of one video, pictures of one class."""

    def drawn(num_train: int, **options: Any) -> list[str]:
        data = ready(folder, num_train=num_train, **options).train_data
        return [data[i]["text"][-1] for i in range(num_train)]

    assert drawn(4) == drawn(4)
    assert drawn(2) == drawn(4)[:2]  # more samples: the same and others
    assert len({tuple(drawn(4, seed=seed)) for seed in range(6)}) > 3
    assert {first for seed in range(20) for first in drawn(1, seed=seed)} == set("0123")
    assert drawn(4, streaming=True) == [*"0123"]


def test_columns_have_other_names(folder: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    rows.rename_columns({"text": "caption", "conditioning_image": "edges"}).to_parquet(str(tmp_path / "a.parquet"))
    data = ready(tmp_path, text_column="caption", conditioning_image_column="edges")
    assert data.val_data[1]["text"] == "picture 5"


def test_one_of_several_configurations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")

    def of_the_hub(name: str, config_name: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/name", "train", False)
        if config_name is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['plain', 'loud']")
        return rows.rename_column("text", config_name)

    with pytest.raises(ValueError, match="dataset_config_name is for data sets on the hub"):
        ready(folder, dataset_config_name="loud")
    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    data = ready(Path("owner/name"), dataset_config_name="loud", text_column="loud")
    assert data.val_data[1]["text"] == "picture 5"
    with pytest.raises(ValueError, match=r"owner/name, split 'train': .*'loud'\]; set dataset_config_name$"):
        ready(Path("owner/name"))


def test_a_folder_that_is_not_there_may_be_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("It doesn't exist.")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    with pytest.raises(ValueError, match=r"data/nope, split 'train': It doesn't exist. And there is no folder of"):
        ready(Path("data/nope"))


def test_canny_from_photographs(folder: Path) -> None:
    edges = ready(folder, condition="canny").train_data[0]["conditioning_image"]
    assert edges.shape == (3, 16, 24)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert edges.amax(dim=(0, 1)).nonzero().flatten().tolist()[0] in (11, 12)  # the edge, in the middle
    assert edges[0].sum() <= 2 * 16


def test_prompt_dropout_is_a_matter_of_seeds(folder: Path) -> None:
    def texts(**options: Any) -> list[str]:
        data = ready(folder, num_train=6, num_val=0, **options)
        return [data.train_data[i]["text"] for i in range(6)]

    full = texts()
    assert sorted(full) == [f"picture {i}" for i in range(6)]
    assert texts(prompt_dropout=1.0) == [""] * 6
    half = texts(prompt_dropout=0.5)
    assert 1 <= half.count("") <= 5
    assert half == texts(prompt_dropout=0.5)
    assert all(text in ("", other) for text, other in zip(half, full, strict=True))
    assert any(texts(prompt_dropout=0.5, seed=seed).count("") != half.count("") for seed in range(1, 9))
    val = ready(folder, prompt_dropout=1.0).val_data
    assert val[0]["text"] == "picture 4"


def change_row(folder: Path, index: int, **fields: Any) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[index] = {**rows[index], **fields}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def drop(column: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        rows = [{name: value for name, value in row.items() if name != column} for row in rows]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return change


Change = Callable[[Path], Any]
WRONG: dict[str, tuple[Change, dict[str, Any], str]] = {
    "missing text": (drop("text"), {}, "no column 'text', only image, conditioning_image; set conditioning"),
    "missing control": (
        drop("conditioning_image_file_name"),
        {},
        "no column 'conditioning_image', only image, text; .*canny",
    ),
    "other column": (lambda _: None, {"text_column": "caption"}, "no column 'caption'"),
    "missing file": (lambda f: (f / "control1.png").unlink(), {}, "No such file .*control1.png"),
    "no picture": (lambda f: (f / "control1.png").write_text("x"), {}, "cannot identify image file .*control1.png"),
    "half a picture": (lambda f: (f / "control1.png").write_bytes((f / "control1.png").read_bytes()[:60]), {}, "trunc"),
    "other shape": (
        lambda f: Image.new("RGB", (100, 30)).save(f / "control1.png"),
        {},
        r"row 1: its picture is 30x100 pixels \(height x width\), too far from the shape of 16x24. Crop",
    ),
    "no text": (lambda f: change_row(f, 1, text=None), {}, "row 1: text is NoneType, not a text"),
    "no metadata": (lambda f: (f / "metadata.jsonl").unlink(), {}, "neither a metadata.jsonl nor a parquet file"),
    "empty metadata": (lambda f: (f / "metadata.jsonl").write_text(""), {}, "split 'train'"),
    "broken metadata": (lambda f: (f / "metadata.jsonl").write_text("{oops"), {}, "JSON parse error"),
    "no file_name": (lambda f: (f / "metadata.jsonl").write_text('{"text": "a"}'), {}, "`file_name`"),
    "unknown split": (lambda _: None, {"train_split": "tran"}, "split 'tran'.*train"),
    "unknown val split": (lambda _: None, {"val_split": "val"}, "split 'val'"),
    "too few rows": (lambda _: None, {"num_train": 7}, "has 6 rows, num_train . num_val asks for 9: lower one of both"),
    "no folder": (lambda _: None, {"dataset": "/no/such/folder"}, "/no/such/folder, split 'train': there is no such"),
    "dropout": (lambda _: None, {"prompt_dropout": 2.0}, "prompt_dropout is 2.0"),
}


# PIL and datasets leave a file open when they cannot read the picture in it.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, streaming: bool, tmp_path: Path) -> None:
    change, options, message = WRONG[case]
    write_folder(tmp_path)
    change(tmp_path)
    if case == "too few rows":
        options = options | {"num_val": 2}
    with pytest.raises(ValueError, match=message) as error:
        ready(Path(options.get("dataset", tmp_path)), streaming=streaming, **_without(options, "dataset"))
    assert "\n" not in str(error.value)
    assert str(options.get("dataset", tmp_path)) in str(error.value) or case == "dropout"
    del error
    gc.collect()


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def test_an_empty_split_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    rows.select([]).to_parquet(str(tmp_path / "a.parquet"))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'train': (it is empty|.*corresponds to no data)"):
            ready(tmp_path, streaming=streaming)


def test_canny_without_opencv_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        ready(folder, condition="canny").train_data[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, streaming: bool) -> None:
    """As depth maps come; Pillow makes all above 255 white."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write_folder(tmp_path)
    for i in range(NUM_ROWS):
        Image.fromarray(ramp).save(tmp_path / f"control{i}.png")
    sample = ready(tmp_path, height=256, width=256, streaming=streaming).train_data[0]["conditioning_image"]
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535)
    torch.testing.assert_close(sample, expected.expand(3, -1, -1), rtol=0, atol=1 / 255)


def test_pictures_of_unknown_range_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    metadata = (
        (tmp_path / "metadata.jsonl").read_text().replace("control", "depth").replace(".png", ".tiff", NUM_ROWS * 2)
    )
    (tmp_path / "metadata.jsonl").write_text(metadata)
    for i in range(NUM_ROWS):
        for name in ("depth", "photo"):
            Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(tmp_path / f"{name}{i}.tiff")
    with pytest.raises(ValueError, match="numbers of 32 bits, of unknown range"):
        ready(tmp_path).train_data[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_refused_opaque_ones_are_not(tmp_path: Path, mode: str) -> None:
    """White lines on nothing: Pillow would show the colour that is stored there, mostly white or black by chance."""
    write_folder(tmp_path)
    opaque = ready(tmp_path).train_data[0]["conditioning_image"]
    pictures = {path: Image.open(path).convert("RGBA") for path in tmp_path.glob("*.png")}

    def save(picture: Image.Image, path: Path) -> None:
        (picture.quantize() if mode == "P" else picture.convert(mode)).save(path)

    for path, picture in pictures.items():
        save(picture, path)
    sample = ready(tmp_path).train_data[0]["conditioning_image"]
    if mode == "RGBA":
        assert torch.equal(sample, opaque)
    for path, picture in pictures.items():
        picture.putpixel((3, 4), (255, 255, 255, 0))
        save(picture, path)
    with pytest.raises(ValueError, match=r"row \d+: its picture is transparent in places.*black for edges"):
        ready(tmp_path).train_data[0]


def test_what_is_streamed_stays_as_large_as_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    for path in folder.glob("control*"):
        Image.new("RGB", (2000, 1500), (9, 9, 9)).save(path)
    read, taken = ready(folder, streaming=True).train_data.rows, hgc_learn.data._taken
    assert read.data.nbytes < sum(path.stat().st_size for path in folder.glob("control*"))  # the names

    def from_afar(rows: Any, num_rows: int, *, fetch: bool) -> Any:
        return taken(rows, num_rows, fetch=not fetch)

    monkeypatch.setattr(hgc_learn.data, "_taken", from_afar)
    data = ready(folder, streaming=True).train_data
    expected = data[1]["conditioning_image"]
    for path in folder.iterdir():
        path.unlink()
    assert data.rows.data.nbytes < 2000 * 1500
    assert torch.equal(data[1]["conditioning_image"], expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_make_no_splits(tmp_path: Path, streaming: bool) -> None:
    write_folder(tmp_path)
    metadata = tmp_path / "metadata.jsonl"
    for i in range(NUM_ROWS):
        (tmp_path / f"photo{i}.png").rename(tmp_path / f"test_{i}.png")
    metadata.write_text(metadata.read_text().replace("photo", "test_"))
    assert len(ready(tmp_path, streaming=streaming).train_data) == 4


def test_prompts_in_another_encoding_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path)
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_bytes(metadata.read_text().replace("picture", "d\u00e9cor").encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        ready(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_alone_needs_no_training_split(tmp_path: Path, streaming: bool) -> None:
    """As `report --val_split` looks at samples."""
    data = ready(write_folder(tmp_path), train_split="nothing", val_split="train", num_train=0, streaming=streaming)
    assert len(data.val_data) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_training_alone_needs_no_validation_split(tmp_path: Path, streaming: bool) -> None:
    """As `schedule --val_split` measures on samples of the training split."""
    data = ready(write_folder(tmp_path), val_split="nothing", num_val=0, streaming=streaming)
    assert (len(data.train_data), len(data.val_data)) == (4, 0)


def test_sizes_are_those_that_are_asked_for(folder: Path) -> None:
    """A VAE of two levels takes multiples of 2."""
    batch = next(iter(ready(folder, height=18, width=30).train_dataloader()))
    assert batch["conditioning_image"].shape == (2, 3, 18, 30)


def test_one_column_for_picture_and_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be both the picture and the prompt"):
        ready(folder, text_column="conditioning_image")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_of_the_keys_makes_no_difference(tmp_path: Path, streaming: bool) -> None:
    """Sorted, that of the control image comes before `file_name`."""
    folder = write_folder(tmp_path, 3)
    rows = [dict(sorted(json.loads(line).items())) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [*rows[0]] == ["conditioning_image_file_name", "file_name", "text"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ready(folder, num_train=3, num_val=0, streaming=streaming)
    for sample in data.train_data:
        brightness = 40 * int(sample["text"][-1]) / 255
        assert float(sample["conditioning_image"][0].mean()) == pytest.approx(brightness, abs=1e-3)


def test_a_condition_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="condition is 'cany'; it is canny, or None"):
        ControlDataModule(str(tmp_path), condition="cany")  # type: ignore[arg-type]
