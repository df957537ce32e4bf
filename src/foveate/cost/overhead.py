"""What methods inside the LLM add to a prefill: the attention rows that they read, and their decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.in_llm import InLlmReducer, LayerTokens, of_llm, planned
from foveate.core.probes import LayerAttention, LayerKeys, LayerStates, LlmProbe, Probe, TextStates
from foveate.core.schedules import Images
from foveate.core.spans import Crop, Span
from foveate.cost.anatomy import Anatomy
from foveate.families.tower import attention_of, encoder_layers


def inside_flops(
    anatomy: Anatomy, reducers: Sequence[InLlmReducer], per_layer: Sequence[int], text_tokens: int, images: Images
) -> int:
    """Count what methods inside the LLM read and compare, all text being behind the images.

    Parameters
    ----------
    per_layer
        Visual tokens that each layer receives.
    images
        The kind and the number of tokens of each image that the LLM is given.
    """
    flops, depth = 0, len(anatomy.decoder)
    for reducer, plan in zip(reducers, planned(reducers, depth, images), strict=True):
        for boundary, count in plan.items():
            visual = per_layer[boundary - 1]
            if not visual or (count >= visual and not reducer.adaptive):
                continue
            probes = of_llm(reducer)
            flops += sum(_row_flops(anatomy, p, boundary, visual, text_tokens) for p in probes)
            flops += _key_flops(anatomy, probes, boundary, visual, text_tokens)
            flops += _decision(anatomy, reducer, boundary, visual, count, text_tokens, images)
    return flops


def _rows(probe: LlmProbe, visual: int, text: int) -> int:
    kind = probe.rows if isinstance(probe, LayerAttention) else "last"
    return {"last": 1, "visual": visual, "all": visual + text}.get(kind, max(text, 1))


def _row_flops(anatomy: Anatomy, probe: LlmProbe, boundary: int, visual: int, text: int) -> int:
    if not isinstance(probe, LayerAttention):
        return 0
    layer = anatomy.decoder[boundary if probe.ahead else boundary - 1]
    return 2 * _rows(probe, visual, text) * (visual + text) * layer.width


def _key_flops(anatomy: Anatomy, probes: Sequence[LlmProbe], boundary: int, visual: int, text: int) -> int:
    """Count the projections of the layer behind the boundary that run twice, as `look_ahead` of the engine has it."""
    ahead = [p for p in probes if isinstance(p, LayerKeys) or (isinstance(p, LayerAttention) and p.ahead)]
    if not ahead:
        return 0
    attention = attention_of(encoder_layers(anatomy.model.get_decoder())[boundary])
    length, rows = visual + text, max(_rows(p, visual, text) for p in ahead)
    projections = {name: getattr(attention, f"{name}_proj", None) for name in "qkv"}
    if not all(isinstance(p, nn.Linear) for p in projections.values()):
        return length * anatomy.decoder[boundary].attention
    # As `peek` of the engine runs them: single query rows where they are few; the values, which nobody reads, once.
    runs = {"q": rows if 4 * rows <= length else length, "k": length, "v": 1}
    return sum(2 * runs[name] * p.weight.numel() for name, p in projections.items() if isinstance(p, nn.Linear))


def _decision(
    anatomy: Anatomy, reducer: InLlmReducer, boundary: int, visual: int, count: int, text: int, images: Images
) -> int:
    config: Any = anatomy.model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def plane(probe: LlmProbe) -> Tensor:
        if isinstance(probe, LayerStates):
            return random(visual, width)
        if isinstance(probe, LayerKeys):
            return random(visual, size)
        if isinstance(probe, LayerAttention) and probe.over != "rows and heads":
            return random(visual, heads) if probe.over == "rows" else random(visual, heads, max(text, 1))
        return random(visual)

    side = int(visual**0.5)
    grid = (side, side) if side * side == visual else (1, visual)
    crop = Crop(torch.arange(visual), grid if reducer.unit == "crop" else None)
    planes: dict[Probe, list[Tensor]] = {probe: [plane(probe)] for probe in of_llm(reducer)}
    tokens = LayerTokens(
        spans=(Span("image", 0, 0, torch.arange(visual), (1, *grid), (crop,)),),
        planes=planes,
        device=torch.device("cpu"),
        boundary=boundary,
        depth=len(anatomy.decoder),
        counts=(count,),
        images=(tuple(images),),
        origin=(torch.arange(visual),),
        places=(torch.arange(visual),),
        rows=(torch.arange(visual, visual + max(text, 1)),),
        judging=(torch.ones(max(text, 1), dtype=torch.bool),),
        behind=(text,),
        text=(random(max(text, 1), width),) if TextStates() in reducer.needs else (),
        text_before=(random(max(text, 1), width),) if TextStates() in reducer.needs else (),
        frequencies=torch.ones(size // 2),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reducer.select(tokens)
    return int(counter.get_total_flops())
