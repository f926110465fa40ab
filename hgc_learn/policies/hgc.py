"""Hybrid-grained cache, reconstructed: whole blocks reused between steps, the prompt's influence until a gate."""

from __future__ import annotations

from hgc_learn.models.graph import Graph
from hgc_learn.plan import row_of
from hgc_learn.policies.registry import Grid, register
from hgc_learn.setting import Draft, Setting
from hgc_learn.sites import attention_sites, encoder_outputs
from hgc_learn.spacing import full_steps, intervals

GATE, GATE_STEPS = 13, 20  # the gate that comes closest to the paper's MACs, and the steps of its run


def _grid(setting: Setting) -> Grid:
    num_steps = setting.num_steps
    tenths = {max(1, round(tenths / 10 * num_steps)) for tenths in range(1, 11)}
    # The default, and the same part of this run. One that the run does not reach is as good as the last of the tenths.
    gates = {gate for gate in (GATE, GATE * num_steps // GATE_STEPS) if 1 <= gate <= num_steps}
    return {
        "interval": intervals(num_steps, 10),
        "fresh_decoder_blocks": range(1, len(_up_blocks(setting.graph)) + 1),
        "encoder": (True, False),
        "cross_interval": (1, 2),
        "gate": sorted(tenths | gates),
    }


@register("hgc", paper="Hybrid-Grained Cache, 2025, arXiv 2511.11031 (reconstruction)", grid=_grid)
def hgc(
    setting: Setting,
    *,
    interval: float = 3,
    encoder: bool = True,
    fresh_decoder_blocks: int = 1,
    cross_interval: int = 2,
    gate: int = GATE,
) -> Draft:
    """A reconstruction: blocks at intervals, cross-attention at intervals up to a gate, no guidance from it on.

    The paper gives the two grains and the result, 6.70T MACs for SD1.5 with a ControlNet (20 steps, 512x512, guidance
    7.5, attention matmuls not counted), but neither the densities of its block cache (lambda_intra, lambda_inter) nor
    its gate step. This is the simplest rule with those two grains. Its defaults come within 0.2 % of that figure; of
    the settings within 0.5 % that reuse encoder and decoder they keep the demonstration teacher's pictures best (24.3
    dB PSNR on 8 training scenes, against at most 21.3).

    Coarse: but for every `interval`-th step the ControlNets' residuals and the encoder's outputs (if `encoder`) and the
    outputs of the decoder's blocks but the last `fresh_decoder_blocks` are those of the last step that computed them.
    So 1 - 1/`interval` is the density over the steps, the share of blocks that over the blocks.

    Fine: before `gate` cross-attention, where it runs, is computed at multiples of `cross_interval` and at step
    `gate - 1`. From `gate` on every cross-attention gives the mean of the guided and the unguided half of its last
    output, and only the guided half runs, its prediction taken as it is (as in T-GATE). A gate that the run does not
    reach drops nothing.

    Args:
        interval: steps from one computation of the blocks to the next; 2.5 for the steps 0, 2, 5, 7, ...
        encoder: whether the encoder's outputs are among them.
        fresh_decoder_blocks: how many of the decoder's last blocks are computed at every step.
        cross_interval: steps from one cross-attention to the next before the gate.
        gate: step from which on there is neither cross-attention nor guidance.
    """
    up_blocks = _up_blocks(setting.graph)
    full = full_steps(setting.num_steps, interval)
    for name, value in (("cross_interval", cross_interval), ("gate", gate)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 1 <= fresh_decoder_blocks <= len(up_blocks):
        raise ValueError(f"fresh_decoder_blocks is {fresh_decoder_blocks}; this decoder has 1 to {len(up_blocks)}.")
    steps = range(setting.num_steps)
    coarse = row_of(i in full for i in steps)
    held = "m" if setting.is_guided else "-"  # without guidance there is one half only
    fine = row_of(i < gate and (i % cross_interval == 0 or i == gate - 1) for i in steps)
    fine = fine[:gate] + held * (len(steps) - gate)
    rows = dict.fromkeys(attention_sites(setting.graph, "attn2", "layers"), fine)
    if encoder:
        rows.update(dict.fromkeys(encoder_outputs(setting.graph), coarse))
    if fresh_decoder_blocks < len(up_blocks):
        rows[up_blocks[-fresh_decoder_blocks - 1]] = coarse  # the blocks before it are read by nothing else
    if setting.is_guided:
        rows[setting.graph.guidance] = row_of((i < gate for i in steps), "0")
    return Draft(rows)


def _up_blocks(graph: Graph) -> list[str]:
    """The last tensor of each block of the decoder, from the deepest on."""
    last: dict[str, str] = {}
    for name in graph.nodes:
        if name.startswith("unet.up_blocks."):
            last[name.split(".")[2]] = name
    return list(last.values())
