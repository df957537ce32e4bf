"""KV caches: where they are among keywords and in outputs, and notes on what they hold.

`transformers` 5.24 renamed ``past_key_values`` to ``cache``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES: Final = ("cache", "past_key_values")
NAME: Final = next(name for name in NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
"""What the installed version calls it; the newer ones take the old name too, and warn."""
_NOTES: Final = "_foveate"
COMPACTION: Final = "compaction"
KEPT_COLUMNS: Final = "kept columns"
BIAS: Final = "bias"


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the cache among keywords of a model or of a layer, if there is one."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """Return the cache in an output of ``forward`` or ``generate``, if there is one."""
    if isinstance(output, tuple):  # of ``return_dict=False``
        return next((x for x in output if isinstance(x, Cache)), None)
    return getattr(output, NAME, None)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a layer so that it fills no cache."""
    return {**kwargs, **{name: None for name in NAMES if name in kwargs}, "use_cache": False}


def note(cache: Any, what: str, value: Any) -> None:
    """Note on a cache what it holds; copies of it, and whatever is attached later, find the note there.

    Parameters
    ----------
    what
        `COMPACTION`: how its first layer's columns map to those of the prompts, a `Compaction`. `KEPT_COLUMNS`: what
        each layer keeps that keeps less than the first one, a `KeptColumns` each. `BIAS`: by what the logits of its
        columns are raised, a `Bias`.
    """
    setattr(cache, _NOTES, {**getattr(cache, _NOTES, {}), what: value})


def forget(cache: Any) -> None:
    """Take the notes off a cache that is empty: `Cache.reset` and `Cache.crop` leave them on it."""
    if hasattr(cache, _NOTES):
        delattr(cache, _NOTES)


def noted(cache: Any, what: str) -> Any:
    """Return what `note` left on a cache, if anything."""
    return getattr(cache, _NOTES, {}).get(what)
