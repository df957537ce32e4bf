"""What each keyword of a model's `forward` means along the prompt, and how it follows when columns are dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.engines.transformers.compaction import Compaction, check_mask, sources

Role: TypeAlias = Literal["plane", "next plane", "columns", "bounds", "longest", "free"]

ROLES: Final[Mapping[str, Role]] = {
    "input_ids": "plane",
    "attention_mask": "plane",
    "position_ids": "plane",
    "token_type_ids": "plane",
    "mm_token_type_ids": "plane",
    "labels": "plane",
    "shift_labels": "next plane",
    "logits_to_keep": "columns",
    "cu_seq_lens_q": "bounds",
    "cu_seq_lens_k": "bounds",
    "max_length_q": "longest",
    "max_length_k": "longest",
    "feature_attention_mask": "free",
    "input_features_mask": "free",
}
"""The keywords that say something about columns of the prompt, or look as if they did.

A plane ``[B, L, ...]``, or ``[..., B, L]``, is compacted; the next plane holds at each column what a plane holds at the
one behind it; columns are named by their numbers, or by how many of the last ones are meant; bounds of packed prompts,
and the longest of them, are worked out anew (`packing`). Any other tensor of the shape of a plane is compacted, too,
and all else is free: images and their sizes, masks of sounds, caches, flags.
"""
_FILL: Final = {"labels": -100, "shift_labels": -100}


def compact_planes(inputs: Mapping[str, Any], compaction: Compaction, pad_id: int) -> dict[str, Any]:
    """Let everything among some inputs that runs along the prompt, or names its columns, follow a compaction.

    Raises
    ------
    InputError
        If a keyword names columns that are not left, or that prompts of the batch would not agree about.
    """
    out = dict(inputs)
    shape = (len(compaction.columns), compaction.length)
    for key, value in inputs.items():
        role, fill = ROLES.get(key), pad_id if key == "input_ids" else _FILL.get(key, 0)
        if role == "columns" and value is not None:
            out[key] = compact_columns(key, value, compaction)
        elif not isinstance(value, Tensor) or role in ("bounds", "longest", "free"):
            continue
        elif role == "next plane":
            out[key] = _next_plane(key, value, compaction, fill)
        elif key == "attention_mask":
            check_mask(value, compaction.length)
            out[key] = compaction.apply(value, fill) if value.shape[:2] == shape else value
        elif value.shape[:2] == shape:
            out[key] = compaction.apply(value, fill)
        elif value.dim() > 2 and value.shape[-2:] == shape:
            out[key] = compaction.apply(value, fill, dim=value.dim() - 1)
        elif value.shape == (1, compaction.length):
            # One row for all prompts, which may keep different columns of it.
            out[key] = compaction.apply(value.expand(shape), fill)
    if compaction.padded and out.get("attention_mask") is None:
        out["attention_mask"] = (compaction.columns >= 0).long()
    return out


def _next_plane(key: str, value: Tensor, compaction: Compaction, fill: int) -> Tensor:
    """Compact a plane ``[B, L]`` that holds at each column what belongs to the one behind it.

    What stands at a dropped column belongs to the one behind it, which may stay: the first word behind an image is
    predicted from the last token of it that is left.
    """
    due = [len(compaction.columns), compaction.length]
    if [*value.shape] != due:
        raise InputError(f"{key} has the shape of input_ids, {due}, not {[*value.shape]}")
    own = torch.nn.functional.pad(value[:, :-1], (1, 0), value=fill)
    kept = compaction.apply(own, fill)
    return torch.cat([kept[:, 1:], value[:, -1:]], dim=1)


def compact_columns(key: str, value: Any, compaction: Compaction) -> Any:
    """Return which columns of compact prompts are meant: a number of the last ones, or a vector of column numbers."""
    check_columns(key, value)
    if isinstance(value, int):  # so many of the columns that are left: text, as a rule, of which none is dropped
        return value
    ranks = sources(compaction.columns, compaction.length).to(value.device)[:, value.long()]
    if bool((ranks < 0).any()):
        raise InputError(f"{key} asks for columns in front of the first one that is left of a prompt")
    if bool((ranks != ranks[:1]).any()):
        raise InputError(f"{key} names columns that lie elsewhere in each compact prompt: pass one prompt at a time")
    return ranks[0].to(value)


def check_columns(key: str, value: Any) -> None:
    """Raise `InputError` unless a value is a number of columns, or a vector of their numbers."""
    if isinstance(value, int):
        return
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point() or value.dtype == torch.bool:
        raise InputError(f"{key} is a number of columns or a vector of their numbers, not {value!r}")


def named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method's call by their names.

    Raises
    ------
    TypeError
        As Python does, if there are too many, or one is there twice.
    """
    if not args:
        return dict(kwargs)
    bound = inspect.signature(function).bind_partial(None, *args)
    by_place = dict(list(bound.arguments.items())[1:])
    if "args" in by_place:
        raise InputError(f"{function.__qualname__} does not say what its arguments are called: pass them by name")
    if twice := by_place.keys() & kwargs.keys():
        raise TypeError(f"{function.__qualname__}() got multiple values for argument {min(twice)!r}")
    return {**by_place, **kwargs}


def embedded(inputs: Mapping[str, Any]) -> Tensor:
    """Return the tensor ``[B, q, ...]`` that tells the shape of a pass."""
    ids = inputs.get("input_ids")
    x = inputs.get("inputs_embeds") if ids is None else ids
    if x is None:
        raise InputError("a model with a method attached needs input_ids")
    return x  # type: ignore[no-any-return]
