"""What a schedule is written for: the models, the sampler and, for policies that measure, samples to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from hgc_learn import __version__
from hgc_learn.models.architectures import Architecture
from hgc_learn.models.fingerprint import ModelFingerprint
from hgc_learn.models.graph import Graph
from hgc_learn.models.macs import NodeCost
from hgc_learn.plan import COMPUTE, Plan, compile_plan
from hgc_learn.sampling import SamplingConfig
from hgc_learn.schedule import HGCSchedule
from hgc_learn.scheduler_config import scheduler_config

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """What a policy decides.

    Attributes:
        sites: per site, one code per model call: `C` or that of a predictor. Sites not listed are always computed.
        tensors: that predictors read, by `<site>/<parameter>`.
        timesteps: of a run with another number of steps than the setting's; its rows have that length.
    """

    sites: dict[str, str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    timesteps: tuple[float, ...] | None = None


@dataclass
class Setting:
    """Everything that a policy may look at.

    Attributes:
        graph: the models' dataflow, all modules expanded, on the meta device.
        costs: of its nodes, per sample.
        sampling: how pictures are made.
        timesteps: the scheduler's timestep of each model call.
        pipe: the pipeline itself; None where only an architecture is known.
        batches: samples to measure on, as for `hgc_learn.sampling.generate`.
        search_batches: samples that a search tries schedules on; `batches` if not given. Those that do badly on the
            first batch need not be tried on the others.
        memo: what has been measured, for policies to share between their knobs.
    """

    graph: Graph
    costs: Mapping[str, NodeCost]
    sampling: SamplingConfig
    timesteps: tuple[float, ...]
    pipe: Any = None
    batches: Sequence[dict[str, Any]] = ()
    search_batches: Sequence[dict[str, Any]] = ()
    memo: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.search_batches = self.search_batches or self.batches

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives; under the same key it is made only once."""
        if key not in self.memo:
            self.memo[key] = make()
        result: T = self.memo[key]
        return result

    @classmethod
    def of_pipeline(
        cls,
        pipe: Any,
        sampling: SamplingConfig,
        batches: Sequence[dict[str, Any]] = (),
        search_batches: Sequence[dict[str, Any]] = (),
    ) -> Setting:
        """Raises ValueError where the pipeline's scheduler is not the one that `sampling` names, or set otherwise."""
        _check_scheduler(pipe.scheduler, sampling)
        graph, costs = Architecture.of(pipe).measure((sampling.height, sampling.width))
        timesteps = scheduler_timesteps(pipe.scheduler, sampling.num_inference_steps)
        return cls(graph, costs, sampling, timesteps, pipe, batches, search_batches)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        return ModelFingerprint.of(self.pipe.unet, getattr(self.pipe, "controlnet", None))

    @property
    def num_steps(self) -> int:
        """Model calls of a run."""
        return len(self.timesteps)

    @property
    def is_guided(self) -> bool:
        """Whether a model call has an unguided and a guided half."""
        return self.num_halves == 2

    @property
    def num_halves(self) -> int:
        """Samples in a model call per picture."""
        return self.graph.num_halves(self.sampling.guidance_scale)

    def plan(self, draft: Draft) -> Plan:
        return compile_plan(self.graph, draft.sites, len(draft.timesteps or self.timesteps))

    def kept(self, draft: Draft) -> float:
        """Fraction of the full run's MACs (attention matmuls not counted) that a draft keeps."""
        full = self.num_steps * sum(cost.macs for cost in self.costs.values())
        return self.plan(draft).macs(self.costs, num_halves=self.num_halves) / (self.num_halves * full)

    def need_samples(self, policy: str) -> None:
        """Raises ValueError where there is no pipeline or nothing to measure on."""
        if self.pipe is None or not self.batches:
            raise ValueError(
                f"{policy} measures on real trajectories: give it a pipeline and samples to run (--data of `hgc_learn "
                "schedule`)."
            )

    def schedule(
        self,
        draft: Draft,
        *,
        policy: str,
        settings: dict[str, Any],
        paper: str = "",
        fidelity: dict[str, Any] | None = None,
    ) -> HGCSchedule:
        """The file that a draft makes; `policy`, `settings` and `paper` say who wrote it.

        Raises:
            ValueError: there is no pipeline whose fingerprint it could carry.
        """
        if self.pipe is None:
            raise ValueError("A schedule carries the fingerprint of its models: a pipeline is needed.")
        settings = {**settings, "sampling": asdict(self.sampling)}  # of which the file's own fields are not all
        producer = {"policy": policy, "version": __version__, "settings": settings}
        full = compile_plan(self.graph, {}, self.num_steps)
        return HGCSchedule(
            sites={site: row for site, row in draft.sites.items() if set(row) != {COMPUTE}},
            timesteps=draft.timesteps or self.timesteps,
            scheduler=type(self.pipe.scheduler).__name__,
            scheduler_config=scheduler_config(self.pipe.scheduler),
            guidance_scale=self.sampling.guidance_scale,
            height=self.sampling.height,
            width=self.sampling.width,
            model=self.fingerprint,
            producer=producer | ({"paper": paper} if paper else {}),
            macs=self.plan(draft).macs_beside(full, self.costs, num_halves=self.num_halves),
            fidelity=fidelity or {},
            tensors=draft.tensors,
        )


def scheduler_timesteps(scheduler: Any, num_inference_steps: int) -> tuple[float, ...]:
    """The timestep of each model call of a run; the scheduler is set to them."""
    scheduler.set_timesteps(num_inference_steps)
    return tuple(scheduler.timesteps.tolist())


def _check_scheduler(scheduler: Any, sampling: SamplingConfig) -> None:
    name = type(scheduler).__name__
    advice = "Set pipe.scheduler accordingly, or load it with load_pipeline(..., sampling)."
    if sampling.scheduler not in (None, name):
        raise ValueError(f"scheduler: sampling has {sampling.scheduler}, the pipeline {name}. {advice}")
    for setting, value in (sampling.scheduler_config or {}).items():
        if (now := scheduler.config.get(setting)) != value:
            raise ValueError(f"scheduler_config: sampling has {setting}={value!r}, the pipeline {now!r}. {advice}")
