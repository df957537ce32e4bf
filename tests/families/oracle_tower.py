"""Plain attention maps of a vision tower, whole and in float64, with nothing of foveate on the way."""

from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor


@dataclass
class Plain:
    received: Tensor
    cls: Tensor
    keys: Tensor


def reference(net, inputs, lead):
    """Run a tower with an attention function that keeps the maps of its last layer; ``[P, ...]`` of all patches."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        logits = (query.double() @ key.double().mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = logits if attention_mask is None else logits + attention_mask.double()
        calls.append((module, logits.softmax(dim=-1), key.double()))
        return (calls[-1][1] @ value.double()).transpose(1, 2).to(query.dtype), None

    hf.AttentionInterface.register("plain", attention)
    hf.AttentionMaskInterface.register("plain", hf.AttentionMaskInterface()["eager"])
    before = vision_of(net).config._attn_implementation
    vision_of(net).set_attn_implementation("plain")
    side = {k: x for k, x in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    try:
        with torch.no_grad():
            net.get_image_features(**side, return_dict=True)
    finally:
        vision_of(net).set_attn_implementation(before)
    last = [m for m, _, _ in calls if "pooling" not in name_of(net, m)][-1]
    maps = [(a.mean(dim=1), k.mean(dim=1)) for m, a, k in calls if m is last]
    received, cls, keys = [], [], []
    for a, k in maps:
        a = a * (a > 0).any(dim=1)[:, :, None]  # what no query sees is padding, and no query either
        seen = (a > 0).sum(dim=1)  # the queries that see a key
        received.append((a.sum(dim=1) / seen.clamp(min=1))[:, lead:].flatten())
        cls.append(a[:, 0, lead:].flatten())
        keys.append(k[:, lead:].flatten(0, 1))
    return Plain(torch.cat(received), torch.cat(cls), torch.cat(keys))


def vision_of(net):
    return getattr(net.model, "vision_tower", None) or net.model.get_submodule(
        "visual" if hasattr(net.model, "visual") else "vision_model"
    )


def name_of(net, module):
    return next(name for name, m in net.named_modules() if m is module)
