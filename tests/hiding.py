"""What a reduced run must equal, of any model: the stock one in which dropped columns are hidden from the LLM."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.families import family_of

NAME = "sdpa_hiding"
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_hidden: list[Tensor] = []


def _mask(*args: Any, **kwargs: Any) -> Any:
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    visible = _hidden[0][:, None, None, : mask.shape[-1]]
    return mask & visible


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def hiding(net: Any, visible: Tensor) -> Any:
    """Let the LLM see nothing but the visible columns ``[B, L]``."""
    config = net.config.get_text_config()
    before = config._attn_implementation
    _hidden.append(visible)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _hidden.clear()


def recurrent(net: Any) -> bool:
    """Return whether layers pass on what they saw of dropped tokens, whatever the mask says."""
    return not set(getattr(net.config.get_text_config(), "layer_types", None) or ()) <= ATTENTION


def visible_columns(inputs: dict[str, Tensor], reduced: Any) -> Tensor:
    visible = inputs["attention_mask"].bool()
    for span, chosen in zip(reduced.spans, reduced.selection, strict=True):
        dropped = torch.ones(len(span.columns), dtype=torch.bool)
        dropped[chosen.kept] = False
        visible[span.sample, span.columns[dropped]] = False
    return visible


@torch.no_grad()
def expected(net: Any, inputs: dict[str, Tensor], reduced: Any) -> Tensor:
    """Return the logits ``[B, V]`` behind the prompts of a model that sees nothing but their visible columns."""
    visible = visible_columns(inputs, reduced)
    if not recurrent(net):
        with hiding(net, visible):
            return net(**inputs).logits[:, -1]
    return torch.stack([x[-1] for x in _alone(net, inputs, visible, "original")])


def _alone(net: Any, inputs: dict[str, Tensor], visible: Tensor, positions: str) -> list[Tensor]:
    """Return the logits ``[k, V]`` of each prompt of the LLM that runs on its k visible columns and on no others."""
    caught: list[Tensor] = []
    hook = net.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        net(**inputs)
    finally:
        hook.remove()
    full = family_of(net).positions(net, inputs)
    if full is None:
        full = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    rows = []
    for i, seen in enumerate(visible):
        count = int(seen.sum())
        at = full[..., i : i + 1, seen] if positions == "original" else torch.arange(count)[None]
        planes = {k: x[i, seen][None] for k, x in inputs.items() if "token_type_ids" in k}
        planes["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        rows.append(net(inputs_embeds=caught[0][i, seen][None], position_ids=at, **planes).logits[0])
    return rows


@torch.no_grad()
def answers(net: Any, inputs: dict[str, Tensor], answer: Tensor, visible: Tensor, positions: str) -> Tensor:
    """Return the logits ``[B, T, V]`` that each token of an answer ``[B, T]`` behind visible columns is drawn from."""
    further = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    whole = {k: torch.cat([x, further.get(k, torch.zeros_like(answer))], dim=1) if x.shape == visible.shape else x
             for k, x in inputs.items()}  # fmt: skip
    seen, t = torch.cat([visible, torch.ones_like(answer, dtype=torch.bool)], dim=1), answer.shape[1]
    if positions == "original" and not recurrent(net):
        with hiding(net, seen):
            return net(**whole).logits[:, -t - 1 : -1]
    return torch.stack([x[-t - 1 : -1] for x in _alone(net, whole, seen, positions)])
