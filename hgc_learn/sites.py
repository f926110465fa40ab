"""Sites: the named tensors that may be kept from an earlier step instead of recomputed.

A site's name is `<module path>:<kind>`, for example
`unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2:out`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hgc_learn.models.graph import Graph

KINDS = {
    "out": "a module's output; all that only feeds it becomes dead",
    "branch": "a module's residual branch alone; the skip path stays fresh",
    "control": "one residual of a ControlNet, scaled as the UNet receives it",
    "eps": "the UNet's prediction; reusing it skips the whole step",
    "guidance": "the guided minus the unguided prediction; reusing it runs the guided half of the batch only",
}
"""The kinds of site."""


def list_sites(graph: Graph) -> list[str]:
    """All sites of a graph, in execution order. The graph must be expanded to show those inside modules."""
    return [name for name in graph.nodes if ":" in name]


def select_sites(graph: Graph, patterns: Iterable[str]) -> list[str]:
    """The sites that match any of the glob `patterns` (as in `fnmatch`), in execution order.

    Raises:
        ValueError: a pattern that matches no site.
    """
    sites = list_sites(graph)
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in sites if fnmatchcase(name, pattern)]
        if not matches:
            examples = ", ".join(sites[:: max(1, len(sites) // 4)][:4])
            lacks = " The pipeline has no ControlNet." if pattern.endswith(":control") and not graph.residuals else ""
            raise ValueError(f"No site matches {pattern!r}.{lacks} Sites of this model are named like: {examples}.")
        chosen.update(matches)
    return [name for name in sites if name in chosen]


ControlNetLayers = Literal["computed", "layers", "residuals"]
"""What rules that decide layer by layer do with ControlNets: they always run, their layers are treated like the
UNet's, or their residuals are."""


def layer_sites(graph: Graph, patterns: Iterable[str], controlnet: ControlNetLayers) -> list[str]:
    """Sites of rules that decide layer by layer, in execution order: those of the UNet that match `patterns` (globs
    without the model), and what `controlnet` adds."""
    wanted = [f"unet.{pattern}" for pattern in patterns]
    if controlnet == "layers":
        wanted += [f"controlnet.{pattern}" for pattern in patterns]
    if controlnet == "residuals":
        wanted.append("*:control")
    return [site for site in list_sites(graph) if any(fnmatchcase(site, pattern) for pattern in wanted)]


def attention_sites(
    graph: Graph, part: Literal["attn1", "attn2"], controlnet: Literal["computed", "layers"]
) -> list[str]:
    """The sites of all self-attentions (`attn1`) or cross-attentions (`attn2`).

    Raises:
        ValueError: there are none that could be reused.
    """
    sites = layer_sites(graph, [f"*.{part}:out"], controlnet)
    if not sites:
        raise ValueError(f"This model has no {part} that can be reused; its transformers are of an unknown kind.")
    return sites


def decoder_inputs(graph: Graph) -> list[list[str]]:
    """The sites that each layer of the UNet's decoder reads from below, from the deepest layer on (12 in SD1.5, 9 in
    SDXL): one, or for the deepest layer of a UNet with ControlNets the mid block's output and its residuals."""
    return [_nearest_sites(graph, below) for below, _ in _decoder_layers(graph)]


def encoder_outputs(graph: Graph) -> list[str]:
    """The sites that the UNet's decoder reads and that are made before it, in execution order: the encoder's outputs,
    the mid block's, and the ControlNets' residuals."""
    layers = _decoder_layers(graph)
    names = [layers[0][0], *(skip for _, skip in layers)]
    read = {site for name in names for site in _nearest_sites(graph, name)}
    return [name for name in graph.nodes if name in read]


def _decoder_layers(graph: Graph) -> list[tuple[str, str]]:
    """Of every decoder layer what it reads: from below, and its skip."""
    return [(node.inputs[0], node.inputs[1]) for name, node in graph.nodes.items() if name.endswith(".concat")]


def _nearest_sites(graph: Graph, name: str) -> list[str]:
    """The node itself if it is a site, else the sites nearest above it."""
    if ":" in name:
        return [name]
    return [site for source in graph.nodes[name].inputs for site in _nearest_sites(graph, source)]


def enclosing_module(site: str) -> str:
    """The path of the resnet or transformer that a site lies in or is."""
    parts = site.split(":")[0].split(".")
    for i, part in enumerate(parts):
        if part in ("resnets", "attentions"):
            return ".".join(parts[: i + 2])
    return ".".join(parts)


def to_lay_open(sites: Iterable[str]) -> set[str]:
    """What `build_graph(expand=)` takes for these sites to be there."""
    return {enclosing_module(site) for site in sites if is_inside(site)}


def enclosing_block(site: str) -> str:
    """The path of the UNet's block that a site lies in, or of its ControlNet; the site itself, if it is in neither."""
    match = re.match(r"unet\.(mid_block|(down|up)_blocks\.\d+)|controlnet(\.nets\.\d+)?", site)
    return match.group() if match else site


def is_inside(site: str) -> bool:
    """Whether the site exists only in an expanded graph: a branch, or a part of a transformer block."""
    return site.endswith(":branch") or ".transformer_blocks." in site
