"""Packed rows: several prompts in one row, without padding, told apart by positions that begin anew.

So `DataCollatorWithFlattening`, TRL and others make them. `transformers` finds the borders where a position does not
follow the one before it, and only if there is no attention mask and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.core.probes import Query
from foveate.core.reducer import Positions
from foveate.engines.settings import Settings
from foveate.engines.transformers.compaction import Compaction
from foveate.families import Family

_BOUNDS: Final = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST: Final = ("max_length_q", "max_length_k")


def packed_prompts(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which prompt of its row each column belongs to, ``[B, L]`` from 0, or `None` if no row has several."""
    positions = text_positions(inputs)
    if positions is None or inputs.get("attention_mask") is not None:
        return None
    number = (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(dim=-1)
    return number if bool(number.any()) else None


def text_positions(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the positions ``[B, L]`` that tell packed prompts apart; three rotary axes alone do not."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or (positions.dim() == 3 and len(positions) != 4):
        return None
    return positions[0] if positions.dim() == 3 else positions


def check_packing(family: Family, model: Any, settings: Settings) -> None:
    """Raise `InputError` if packed prompts of a family cannot be reduced that way."""
    advice = "pad the prompts to a batch instead"
    readers = [r for r in (settings.before, *settings.judging) if r is not None and Query() in r.needs]
    if readers:
        raise InputError(f"{readers[0].name} reads the question of a prompt, and a packed row holds several: {advice}")
    if not family.packs:
        raise InputError(f"transformers itself lets packed prompts of {family.name} see each other: {advice}")
    if settings.positions == "compact" or family.keeps_positions:
        return
    # With gaps between positions, nothing but a 4-D mask tells packed prompts apart.
    if family.two_way:
        raise InputError(f"packed prompts of {family.name} cannot keep their positions: use positions='compact'")
    if "flash" in str(model.config.get_text_config()._attn_implementation):
        raise InputError("flash attention takes no mask of packed prompts: use positions='compact'")


def repack(
    out: dict[str, Any],
    inputs: Mapping[str, Any],
    number: Tensor,
    compaction: Compaction,
    positions: Positions,
    dtype: torch.dtype,
) -> None:
    """Tell the prompts of compact rows apart, as those of the full rows were.

    Parameters
    ----------
    out
        The compact inputs, changed in place.
    inputs, number
        The full ones, and the prompt that each of their columns belongs to ``[B, L]``.
    dtype
        Of a mask that is added to attention logits.
    """
    own = compaction.apply(number, -1)
    index = torch.arange(own.shape[1], device=own.device).expand_as(own)
    # Padding, where rows have become of different lengths, is a prompt of its own in each column.
    begins = (own.diff(prepend=own[:, :1] - 1, dim=-1) != 0) | (own < 0)
    first = torch.where(begins, index, 0).cummax(dim=-1).values
    given = text_positions(inputs)
    assert given is not None
    counted = index - first + compaction.apply(given).gather(1, first)
    out.pop("attention_mask", None)
    kept = out.get("position_ids")
    if kept is not None and kept.dim() == 3:
        out["position_ids"] = torch.cat([counted[None], kept])
    elif positions == "compact":
        out["position_ids"] = counted
    else:
        out["attention_mask"] = _mask(own, dtype)
    _renew_bounds(out, begins)


def _mask(own: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a causal mask ``[B, 1, W, W]`` within each prompt, to be added to attention logits."""
    size = own.shape[1]
    seen = (own[:, :, None] == own[:, None, :]) & torch.ones(size, size, dtype=torch.bool, device=own.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=own.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _renew_bounds(out: dict[str, Any], begins: Tensor) -> None:
    """Renew the bounds of packed prompts that attention kernels are given beside the positions, over all rows."""
    starts = begins.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([begins.numel()])])
    for name in _BOUNDS:
        if isinstance(out.get(name), Tensor):
            out[name] = bounds.to(out[name])
    longest = int(bounds.diff().max())
    for name in _LONGEST:
        if out.get(name) is not None:
            out[name] = torch.full_like(out[name], longest) if isinstance(out[name], Tensor) else longest
