"""Pictures that are no numbers: refused by name, before any method decides on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import InputError
from foveate.core.spans import Span
from foveate.families import Family


@torch.no_grad()
def check_pixels(model: Any, family: Family, inputs: Mapping[str, Any], spans: Sequence[Span]) -> None:
    """Raise `InputError` if pixels are NaN or infinite.

    Reads one flag, right behind the search for placeholders in the ids, for which the device has been waited for
    already. Whose pixels they are, only the features tell for every layout: they are made where there is a fault.
    """
    if not all(map(_finite, _tensors(inputs.get(key) for key in family.inputs))):
        check_features(spans, family.encode(model, inputs, spans, ()).hidden)
        raise InputError(
            "pixels hold NaN or infinite values: look at what made them, as no method can rank such tokens"
        )


def check_features(spans: Sequence[Span], hidden: Sequence[Tensor]) -> None:
    """Raise `InputError` that names the images whose features ``[N, C]`` are NaN or infinite."""
    broken = [span for span, x in zip(spans, hidden, strict=True) if not _finite(x)]
    if broken:
        names = ", ".join(f"{s.kind} {s.ordinal} of prompt {s.sample}" for s in broken)
        raise InputError(
            f"the features of {names} (counted from 0) hold NaN or infinite values: look at its pixels, and at the "
            "precision of the vision encoder, as no method can rank such tokens"
        )


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Iterable):
            yield from _tensors(value)
