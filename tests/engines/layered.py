"""What a run with methods inside the LLM must equal: the plain model with columns hidden from some layers on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from oracle import extended, visible_columns
from torch import Tensor

from foveate.core.selection import SpanSelection
from tiny import tiny_of

Cuts = dict[int, list[list[SpanSelection]]]


@torch.no_grad()
def layered(
    net: Any, inputs: dict[str, Tensor], cuts: Cuts, positions: str = "original",
    raised: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return all logits ``[B, L, V]`` of the plain model, in whose layers from each cut on what it dropped is hidden.

    With compact positions these layers also number the columns that are left anew. From layers on, attention logits
    may be raised ``[B, L]``.
    """
    tiny, decoder = tiny_of(net), net.get_decoder()
    content = inputs["attention_mask"].bool()
    visible = {}
    for boundary, selections in cuts.items():
        visible[boundary] = torch.zeros_like(content)
        for i, columns in enumerate(visible_columns(inputs, selections)):
            visible[boundary][i, columns] = True
    hooks = []
    for number, layer in enumerate(decoder.layers):
        shown = next((visible[b] for b in sorted(visible, reverse=True) if number >= b), None)
        more = next((raised[b] for b in sorted(raised, reverse=True) if number >= b), None) if raised else None
        if more is not None:
            hooks.append(layer.register_forward_pre_hook(_raising(more), with_kwargs=True))
        if shown is not None:
            kinds = getattr(decoder.config, "layer_types", None)
            hooks.append(
                layer.register_forward_pre_hook(
                    _hiding(decoder, shown, positions, kinds[number] if kinds else None), with_kwargs=True
                )
            )
    try:
        plain = {k: x for k, x in inputs.items() if k != "labels"}
        plain["attention_mask"] = tiny.mask(net, inputs, visible.get(0, content))
        return net(**plain, position_ids=tiny.position_ids(net, inputs)).logits
    finally:
        for hook in hooks:
            hook.remove()


def _raising(more: Tensor) -> Any:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + more[:, None, None]}

    return hook


def _hiding(decoder: Any, shown: Tensor, positions: str, kind: str | None) -> Any:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        mask = mask.masked_fill(~shown[:, None, None], torch.finfo(mask.dtype).min)
        changes: dict[str, Any] = {"attention_mask": mask}
        if positions == "compact":
            hidden = args[0] if args else kwargs["hidden_states"]
            named = (
                {"layer_type": kind} if "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters else {}
            )
            numbers = (shown.cumsum(1) - 1).clamp(min=0)
            changes["position_embeddings"] = decoder.rotary_emb(hidden, position_ids=numbers, **named)
        return args, {**kwargs, **changes}

    return hook


def layered_answer(
    net: Any, inputs: dict[str, Tensor], cuts: Cuts, answer: Tensor, positions: str,
    raised: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the logits ``[B, T, V]`` from which the plain model draws each token of an answer ``[B, T]``."""
    t = answer.shape[1]
    return layered(net, extended(inputs, answer, tiny_of(net).answer_type), cuts, positions, raised)[:, -t - 1 : -1]
