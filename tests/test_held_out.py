"""What an export learns is judged by samples that it has not learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_fixtures import BUDGET, random_gates

from hgc_learn.demo.scenes import SceneDataset
from hgc_learn.export.export import in_batches
from hgc_learn.export.fills import learn_fills
from hgc_learn.export.reorder import reorder
from hgc_learn.export.specialise import specialise
from hgc_learn.setting import Draft
from hgc_learn.training.gates import Gates
from hgc_learn.training.module import RouterModule


def fill(module: RouterModule, budget: float, batches: list[dict[str, Any]], num_updates: int) -> Draft:
    return learn_fills(module, random_gates(module, 0.8, seed=5), batches, num_updates)


@pytest.mark.parametrize("learn", [reorder, specialise, fill])
def test_the_last_quarter_judges_and_only_that(
    learn: Callable[..., Any], module: RouterModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = SceneDataset("train", 4)
    batches = in_batches([scenes[i] for i in range(4)], 1)
    module.router.logits.data.copy_(torch.randn(module.router.logits.shape, generator=torch.Generator().manual_seed(3)))
    judges: list[int] = []
    prompts: list[str] = []

    def judged(batches: list[dict[str, Any]], gates: Gates | Draft) -> float:
        judges.extend(int(batch["seed"]) for batch in batches)
        return 0.0

    encode_prompt = type(module.pipe).encode_prompt

    def seen(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        prompts.extend(prompt)
        return encode_prompt(self, prompt, *args, **kwargs)

    monkeypatch.setattr(module, "log_error", judged)
    monkeypatch.setattr(type(module.pipe), "encode_prompt", seen)
    learn(module, BUDGET, batches, 20)
    assert set(judges) == {int(batches[3]["seed"])}
    assert set(prompts) == {batch["text"][0] for batch in batches[:3]}
