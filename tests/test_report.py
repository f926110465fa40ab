"""The page about a schedule: its figures are the plan's, strangers' strings stay text, and it works in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from browser import CHROMIUM, Browser
from test_cli import refused
from test_data import write_folder
from test_schedule import SCHEDULE
from tiny_models import NUM_STEPS, TinyPipeline, build_pipeline

from hgc_learn.__main__ import main
from hgc_learn.commands import report
from hgc_learn.inference import HGCSchedule, apply_schedule
from hgc_learn.models.architectures import Architecture
from hgc_learn.plan import compile_plan
from hgc_learn.report.pareto import panels
from hgc_learn.report.strips import strips

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/demo_schedule.json"
TEACHER = ROOT / "hgc_learn/demo/teacher"
COMPARISON = ROOT / "benchmarks/compare/demo.json"

ROWS = {"unet:guidance": "CC0CCC", "unet:eps": "C-CCC-", "unet.mid_block.attentions.0:out": "C--1CC"}


def embedded(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_strips_are_what_the_plan_says(own: TinyPipeline) -> None:
    schedule = own.schedule(ROWS)
    graph, costs = Architecture.of(own.pipe).measure((schedule.height, schedule.width))
    total, blocks, plan = strips(schedule, graph, costs)
    assert plan == compile_plan(graph, ROWS, NUM_STEPS)
    assert total.macs == plan.macs_per_step(costs)
    assert [sum(step) for step in zip(*(block.macs for block in blocks), strict=True)] == total.macs
    with apply_schedule(own.pipe, schedule) as handle:
        assert sum(total.macs) == handle.stats()["macs_cached"]
        assert total.full * NUM_STEPS == handle.stats()["macs_full"]
    sites = {site.name: site for block in blocks for site in block.sites}
    assert set(sites) == set(own.sites())
    assert sites["unet:eps"].states == "RFRRRF"
    assert sites["unet:eps"].fills == ["", "hold, 1 step old", "", "", "", "hold, 1 step old"]
    mid = sites["unet.mid_block.attentions.0:out"]
    assert mid.states == "RDFFRD"
    assert mid.fills[2:4] == ["hold, 2 steps old", "linear, 3 steps old"]
    assert [macs > 0 for macs in mid.macs] == [True, False, False, False, True, False]
    assert mid.full == mid.macs[0] > 0
    assert total.macs[2] < total.macs[3] / 1.9  # step 2 runs the guided half
    assert sites["unet:guidance"].states == "RDFRRD"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    options = ["--output", str(path), "--comparison", str(COMPARISON), "--model", str(TEACHER), "--num_pictures", "1"]
    assert main(["report", str(EXAMPLE), *options]) == 0
    return path


def test_the_page_holds_figures_curves_and_pictures(page: Path) -> None:
    text = page.read_text()
    schedule = HGCSchedule.load(EXAMPLE)
    all_steps = embedded(text)["strips"][0]
    assert sum(all_steps["macs"]) == schedule.macs["cached"]
    assert all_steps["full"] * 20 == schedule.macs["full"]
    for part in (
        "50.0%",
        f"{schedule.fidelity['psnr_db']:.1f} dB",
        "UniPCMultistepScheduler",
        "80a7881975b6adf8",
        "UniPC-20",
        "DDIM-50",
    ):
        assert part in text
    assert text.count('class="chosen"') == 1
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r"https?://", text)


NASTY = (
    """"><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'></script>' \u2028 \x1b[2J {{ 7 * 7 }}"""
)


class Tags(HTMLParser):
    """The page's tags with their attributes' names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, frozenset[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, frozenset(name for name, _ in attrs)))


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page of a stranger's files, and the same with harmless strings."""
    folder, own = tmp_path_factory.mktemp("nasty"), build_pipeline("sd15")
    own.pipe.save_config(folder)
    for name in ("unet", "vae", "controlnet"):
        getattr(own.pipe, name).save_config(folder / name)
    written = []
    for name, text in (("nasty", NASTY), ("harmless", "harmless")):
        file, comparison, output = (folder / f"{name}.{ending}" for ending in ("json", "compare.json", "html"))
        producer = {text: text, "settings": {"model": text, text: text}}
        own.schedule(ROWS, scheduler=text, producer=producer, fidelity={text: text, "psnr_db": text}).save(file)
        rows = [{"policy": text, "sampler": text, "psnr_db": 20.0, "kept_macs": 0.5}]
        comparison.write_text(json.dumps(rows))
        command = ["report", str(file), "--model", str(folder), "--comparison", str(comparison)]
        assert main([*command, "--output", str(output)]) == 0
        written.append(output)
    return written[0], written[1]


def test_strings_of_strangers_stay_text(nasty_page: tuple[Path, Path]) -> None:
    nasty, harmless = (path.read_text() for path in nasty_page)
    assert Tags(nasty).tags == Tags(harmless).tags
    assert "&lt;script&gt;window.pwned = 1" in nasty
    assert "{{ 7 * 7 }}" in nasty
    assert "\x1b" not in nasty
    assert embedded(nasty)["strips"] == embedded(harmless)["strips"]


def test_the_chosen_point_is_in_the_panel_of_its_sampler() -> None:
    rows = [
        {"policy": policy, "sampler": sampler, "psnr_db": psnr, "kept_macs": kept}
        for policy in ("learned", "other")
        for sampler in ("UniPC-5", "UniPC-20", "DDIM-5")
        for kept, psnr in ((0.5, 40.0), (0.25, 30.0))
    ]
    drawn = {panel["sampler"]: panel for panel in panels(rows, SCHEDULE)}
    assert [name for name, panel in drawn.items() if panel["chosen"]] == ["UniPC-5"]
    x, y, words = drawn["UniPC-5"]["chosen"]
    assert words == "45.0% of the MACs, 31.50 dB"
    (low, high) = drawn["UniPC-5"]["lines"][-1]["places"]
    assert drawn["UniPC-5"]["lines"][-1]["is_ours"]
    assert (x - low[0]) / (high[0] - low[0]) == pytest.approx(0.8, abs=0.01)
    assert (y - low[1]) / (high[1] - low[1]) == pytest.approx(0.15, abs=0.01)
    assert low[1] > high[1]  # more decibels are further up

    for row in rows:
        row["architecture"] = {"unet": "of another teacher"}
    assert not any(panel["chosen"] for panel in panels(rows, SCHEDULE))
    for row in rows:
        row["architecture"] = SCHEDULE.model.architecture

    of_twenty = replace(SCHEDULE, producer={"settings": {"sampling": {"num_inference_steps": 20}}})  # fewer_steps
    drawn = {panel["sampler"]: panel for panel in panels(rows, of_twenty)}
    assert [name for name, panel in drawn.items() if panel["chosen"]] == ["UniPC-20"]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of KDPM2
@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_pictures_of_samplers_with_more_calls_than_steps(scheduler: str, teacher: Path, tmp_path: Path) -> None:
    """Heun and KDPM2 call the models twice per step, PNDM four times in the first ones; rows are per call."""
    options = ["--model", str(teacher), "--size", "64", "--steps", "4", "--scheduler", scheduler, "--interval", "2"]
    file = tmp_path / "hgc_schedule.json"
    of_training = ["--controlnet_conditioning_scale", "0.5", "--negative_prompt", "blurred"]
    assert main(["schedule", "uniform", *options, *of_training, "--output", str(file)]) == 0
    sampling = HGCSchedule.load(file).producer["settings"]["sampling"]
    assert (sampling["controlnet_conditioning_scale"], sampling["negative_prompt"]) == (0.5, "blurred")
    assert HGCSchedule.load(file).num_steps == (13 if scheduler.startswith("PNDM") else 7)
    write_folder(tmp_path / "data", 1)
    options = ["--model", str(teacher), "--data", str(tmp_path / "data"), "--num_pictures", "1"]
    assert main(["report", str(file), "--output", str(tmp_path / "report.html"), *options]) == 0
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 4


@pytest.mark.parametrize("said", [4, None, 10**12])
def test_fewer_steps_are_compared_with_all_of_them(said: int | None, teacher: Path, tmp_path: Path) -> None:
    """Where the file does not say how many the full run has, or what cannot be, it is its own number."""
    file = tmp_path / "hgc_schedule.json"
    options = ["--model", str(teacher), "--size", "64", "--steps", "4", "--num_steps", "2", "--output", str(file)]
    assert main(["schedule", "fewer_steps", *options]) == 0
    if said != 4:
        sampling = {} if said is None else {"num_inference_steps": said}
        replace(HGCSchedule.load(file), producer={"settings": {"sampling": sampling}}).save(file)
    write_folder(tmp_path / "data", 1)
    options = ["--model", str(teacher), "--data", str(tmp_path / "data"), "--num_pictures", "1"]
    with patch("hgc_learn.report.write_page") as write_page:
        assert main(["report", str(file), "--output", str(tmp_path / "report.html"), *options]) == 0
    (psnr,) = write_page.call_args.kwargs["pictures"]["psnr_db"]
    assert (psnr < 60) == (said == 4)


def test_a_file_that_says_half_of_what_it_saves_has_no_point() -> None:
    row = {"policy": "a", "sampler": f"UniPC-{SCHEDULE.num_steps}", "psnr_db": 20.0, "kept_macs": 0.5}
    for macs in ({"full": 10}, {"cached": 5}):
        assert panels([row], replace(SCHEDULE, macs=macs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "made for none of the models known here: name its folder with --model"),
        (["--model", str(TEACHER)], "model: the schedule was made for another model (architecture: unet, controlnet"),
        (["--num_pictures", "2"], "--num_pictures needs a pipeline"),
        (["--num_pictures", "-1"], "--num_pictures is -1"),
        (["--num_pictures", "1", "--model", "a/b"], "give a folder of them with --data"),
        (["--data", "folder"], "--data is for pictures: say how many with --num_pictures"),
        (["--controlnet_model", "folder"], "the ControlNet of a pipeline that --model names; there is no --model"),
        (["--variant", "fp16"], "--variant is for pictures"),
        (["--dtype", "bfloat16"], "--dtype is for pictures"),
        (
            ["--num_pictures", "1", "--model", "a/b", "--data", "c", "--streaming"],
            "name the split to look at with --val_split",
        ),
        (["--comparison", "none.json"], "none.json: cannot be read"),
        (["--comparison", str(EXAMPLE)], "no rows with figures"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SCHEDULE.save(tmp_path / "hgc_schedule.json")
    output = tmp_path / "report.html"
    assert message in refused(capsys, "report", str(tmp_path), "--output", str(output), *options)
    assert not output.exists()


def test_comparisons_of_strangers_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"policy": "a", "sampler": "b", "psnr_db": 20.0, "kept_macs": 0.5}
    path = tmp_path / "comparison.json"
    command = ["report", str(EXAMPLE), "--output", str(tmp_path / "report.html"), "--comparison", str(path)]
    for wrong in ({"policy": 1}, {"sampler": None}, {"psnr_db": "x"}, {"kept_macs": True}, {"psnr_db": float("nan")}):
        path.write_text(json.dumps([good, good | wrong]))
        assert "a row lacks policy, sampler, psnr_db or kept_macs" in refused(capsys, *command)
    path.write_text("[" * 100_000)
    assert "not valid JSON" in refused(capsys, *command)


# In a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_and_hovers_at_every_width(width: int, page: Path, browser: Browser) -> None:
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    opened = "document.querySelectorAll('details').forEach(d => d.open = true)"
    browser.evaluate(opened)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('.strip.low').length") == 228
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 64)")
    assert browser.evaluate("getComputedStyle(document.querySelector('.runs')).fill") == "rgb(42, 111, 219)"

    # Its row ends in CfCC, and nothing reads it at step 16.
    site = "controlnet.down_blocks.0.attentions.0.transformer_blocks.0.attn2:out"
    number = next(i for i, strip in enumerate(embedded(page.read_text())["strips"]) if strip["name"] == site)
    browser.point_at(f"[data-strip='{number}']", along=(17 + 0.5) / 20)
    assert not browser.evaluate("tip.hidden")
    assert browser.evaluate("tip.textContent").splitlines()[:3] == [
        site,
        "step 17 (timestep 150)",
        "filled in: fitted_per_channel, 2 steps old",
    ]
    left, right = browser.evaluate("(({left, right}) => [left, right])(tip.getBoundingClientRect())")
    assert 0 <= left < right <= width
    browser.point_at(".ours circle:nth-of-type(1)")
    rows = [row for row in json.loads(COMPARISON.read_text()) if row["policy"] == "learned" and "psnr_db" in row]
    first = min((row for row in rows if row["sampler"] == "UniPC-20"), key=lambda row: row["kept_macs"])
    words = f"{first['kept_macs']:.1%} of the MACs, {first['psnr_db']:.2f} dB"
    assert browser.evaluate("tip.textContent").splitlines() == ["learned", words]
    browser.point_at("h1")
    assert browser.evaluate("tip.hidden")
    assert browser.errors() == []


@needs_chromium
def test_keys_reach_what_the_pointer_does(page: Path, browser: Browser) -> None:
    browser.open(page, width=1280)
    browser.press("Tab")
    assert browser.evaluate("tip.textContent").splitlines()[:2] == ["all", "step 0 (timestep 999)"]
    browser.press("ArrowRight")
    assert "step 1 (timestep 949)" in browser.evaluate("tip.textContent")
    browser.press("Escape")
    assert browser.evaluate("tip.hidden")
    assert browser.errors() == []


@needs_chromium
def test_light_and_dark_are_readable(page: Path, browser: Browser) -> None:
    """Text against the page: a contrast of at least 4.5 to 1 (WCAG AA)."""
    for scheme in ("light", "dark"):
        browser.open(page, width=1280, scheme=scheme)
        body, *inks = (
            luminance(browser.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{prop}"))
            for selector, prop in (("body", "backgroundColor"), ("body", "color"), ("p", "color"), (".name", "color"))
        )
        assert (body > 0.8) == (scheme == "light")
        for ink in inks:
            assert (max(body, ink) + 0.05) / (min(body, ink) + 0.05) > 4.5


def luminance(color: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_chromium
def test_strings_of_strangers_do_not_run(nasty_page: tuple[Path, Path], browser: Browser) -> None:
    browser.open(nasty_page[0], width=390)
    browser.point_at("circle")
    assert "window.pwned = 1" in browser.evaluate("tip.textContent")
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.errors() == []


def test_pictures_are_made_with_the_schedules_own_settings_of_the_scheduler() -> None:
    """But not with as many timesteps as a stranger asks for."""
    own = ROOT / "examples/demo_schedule.json"
    schedule = replace(HGCSchedule.load(own), scheduler_config={"solver_order": 3, "num_train_timesteps": 10**9})
    for spacing, known in (("trailing", {"timestep_spacing": "trailing"}), (["trailing"], {}), ("x", {})):
        settings = {"sampling": {"scheduler_config": {"timestep_spacing": spacing}}}
        of = replace(schedule, producer={"settings": settings})
        assert report._sampling(of).scheduler_config == {"solver_order": 3, **known}
