from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from measured import measured_setting, shared_setting
from torch import Tensor

from hgc_learn import calibration
from hgc_learn.calibration import SiteStatistics, site_statistics
from hgc_learn.comparison.tune import count_rollouts
from hgc_learn.policies import POLICIES
from hgc_learn.rollouts import reference_pictures
from hgc_learn.sampling import generate
from hgc_learn.sites import ControlNetLayers, layer_sites

# Sites and the modules whose output they are (a resnet's branch ends with its second convolution).
ATTENTION = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2"
FEED_FORWARD = "unet.down_blocks.0.attentions.1.transformer_blocks.0.ff"
MODULES = {
    f"{ATTENTION}:out": ATTENTION,
    f"{FEED_FORWARD}:out": FEED_FORWARD,
    "unet.up_blocks.3.resnets.1:branch": "unet.up_blocks.3.resnets.1.conv2",
    "controlnet.mid_block.attentions.0:out": "controlnet.mid_block.attentions.0",
    "unet:eps": "unet.conv_out",
}


def history_by_hooks(pipe: Any, sampling: Any, batches: Any, module: str) -> list[list[Tensor]]:
    """Per batch, the module's output at every step."""
    name, _, path = module.partition(".")
    outputs: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).double())

    hook = getattr(pipe, name).get_submodule(path).register_forward_hook(note)
    result = []
    for batch in batches:
        outputs.clear()
        generate(pipe, sampling, batch)
        result.append(list(outputs))
    hook.remove()
    return result


@pytest.mark.parametrize("site", MODULES)
def test_statistics_are_those_of_the_modules_outputs(site: str) -> None:
    setting = shared_setting()
    statistics = site_statistics(setting, [site])[site]
    runs = history_by_hooks(setting.pipe, setting.sampling, setting.batches, MODULES[site])
    axis = 1 if runs[0][0].ndim == 4 else -1
    for i in range(setting.num_steps):
        norm = sum(float(run[i].abs().sum()) for run in runs)
        torch.testing.assert_close(float(statistics.l1_norm[i]), norm, rtol=1e-6, atol=0)
        total = sum(run[i].movedim(axis, 0).flatten(1).sum(1) for run in runs)
        torch.testing.assert_close(statistics.total[:, i], total, rtol=1e-6, atol=1e-6)
        for j in range(setting.num_steps):
            distance = sum(float((run[i] - run[j]).abs().sum()) for run in runs)
            torch.testing.assert_close(float(statistics.l1_distance[i, j]), distance, rtol=1e-6, atol=1e-6)
            product = sum((run[i] * run[j]).movedim(axis, 0).flatten(1).sum(1) for run in runs)
            torch.testing.assert_close(statistics.gram[:, i, j], product, rtol=1e-6, atol=1e-6)
    assert statistics.count == sum(run[0].movedim(axis, 0).flatten(1).shape[1] for run in runs)
    assert not site_statistics(setting, [site])[site].change().diagonal().any()


def test_calibration_runs_the_pipelines_own_trajectory_and_leaves_no_trace() -> None:
    setting = measured_setting()
    pipe, batch = setting.pipe, setting.batches[0]
    before = generate(pipe, setting.sampling, batch, output_type="pt")
    site_statistics(setting, ["unet:eps"])
    assert "forward" not in pipe.unet.__dict__ and "forward" not in pipe.controlnet.__dict__
    assert torch.equal(generate(pipe, setting.sampling, batch, output_type="pt"), before)
    assert torch.equal(reference_pictures(setting)[0], before)


def test_what_is_known_is_not_measured_again() -> None:
    setting = measured_setting()
    num_samples = sum(len(batch["seed"]) for batch in setting.batches)
    with count_rollouts(setting) as rollouts:
        site_statistics(setting, ["unet:eps", "unet.conv_in:out"])
        site_statistics(setting, ["unet:eps"])
        assert rollouts.num_samples == pytest.approx(num_samples)
        site_statistics(setting, ["unet:eps", "unet.mid_block.resnets.0:out"])
    assert rollouts.num_samples == pytest.approx(2 * num_samples)


def test_what_was_measured_on_some_samples_only_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, site = replace(measured_setting(), batches=[*shared_setting().batches] * 2), "unet:eps"
    histories, calls = calibration._histories, iter(range(2))

    def fail_at_the_second(*args: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return histories(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_histories", fail_at_the_second)
        with pytest.raises(MemoryError):
            site_statistics(setting, [site])
    whole, half = (site_statistics(each, [site])[site].count for each in (setting, shared_setting()))
    assert whole == 2 * half


def test_sites_that_do_not_fit_into_memory_together_take_more_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = ["unet:eps", "unet.conv_in:out", "unet.up_blocks.0.resnets.0:out"]
    together = site_statistics(shared_setting(), sites)
    monkeypatch.setattr(calibration, "MAX_HISTORY_BYTES", 1)
    setting = measured_setting()
    with count_rollouts(setting) as rollouts:
        apart = site_statistics(setting, sites)
    assert rollouts.num_samples == pytest.approx(3 * sum(len(batch["seed"]) for batch in setting.batches))
    for site in sites:
        assert torch.equal(apart[site].gram, together[site].gram)


def test_squared_error_is_that_of_the_linear_combination() -> None:
    history = torch.randn(4, 3, 50, dtype=torch.float64)
    error = SiteStatistics.of(history).squared_error(3, {2: 1.5, 0: -0.5})
    expected = (history[3] - 1.5 * history[2] + 0.5 * history[0]).square().sum(1)
    torch.testing.assert_close(error, expected)


def test_layers_of_the_controlnet_are_chosen_by_the_knob() -> None:
    graph = shared_setting().graph
    chosen = {how: layer_sites(graph, ["*.attn1:out"], how) for how in get_args(ControlNetLayers)}
    assert all(site.startswith("unet.") and site.endswith(".attn1:out") for site in chosen["computed"])
    assert set(chosen["layers"]) - set(chosen["computed"]) == {
        site for site in graph.nodes if site.startswith("controlnet.") and site.endswith(".attn1:out")
    }
    assert set(chosen["residuals"]) - set(chosen["computed"]) == {s for s in graph.nodes if s.endswith(":control")}
    with pytest.raises(ValueError, match="controlnet is 'none'; it is one of computed, layers, residuals"):
        POLICIES["smoothcache"].check({"controlnet": "none"})
