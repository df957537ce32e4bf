"""Looking ahead: what a layer would attend with, found out before any of its tokens are dropped."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from foveate.core.rows import Rows
from foveate.families.tower import attention_of

_FEW = 4  # rows worth a pass of their own: at most a quarter of the sequence


class LookedAhead(Exception):  # noqa: N818
    """Ends a layer once what it attends with is known."""

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows


def look_ahead(layer: nn.Module, kwargs: Mapping[str, Any], rows: Tensor | None, width: int) -> Rows:
    """Return what a layer would attend with, without running the rest of it.

    The layer runs up to its attention, where a reader raises `LookedAhead`. So norms, projections, query-key norms and
    rotary embeddings are the layer's own, whatever the model.

    Parameters
    ----------
    kwargs
        The keywords of the layer's call, without a cache.
    rows
        ``[B, r]``: the only rows whose queries count; `None` for all.
    width
        Number of tokens R.
    """
    attention = attention_of(layer)
    with ExitStack() as stack:
        for name in ("v_proj", "q_proj"):
            projection = getattr(attention, name, None)
            if not isinstance(projection, nn.Module):
                continue  # Phi-3 and others project queries, keys and values at once
            if name == "v_proj":
                stack.enter_context(_Only(projection, None, width))
            elif rows is not None and rows.shape[1] * _FEW <= width:
                stack.enter_context(_Only(projection, rows, width))
        try:
            layer(**kwargs)
        except LookedAhead as found:
            return found.rows
    raise AssertionError(f"{type(attention).__name__} did not attend")


class _Only:
    """Lets a projection work on a few rows alone, and fills up what the layer expects behind it."""

    def __init__(self, projection: nn.Module, rows: Tensor | None, width: int):
        self._projection, self._rows, self._width = projection, rows, width
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        self._hooks: Sequence[Any] = (
            self._projection.register_forward_pre_hook(self._narrow),
            self._projection.register_forward_hook(self._widen),
        )

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _narrow(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if threading.get_ident() != self._thread:
            return None  # another thread runs the model, and passes through the same projection
        if self._rows is None:
            return (x[:, :1],)
        return (x.gather(1, self._rows[..., None].expand(-1, -1, x.shape[-1])),)

    def _widen(self, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        if threading.get_ident() != self._thread:
            return out
        if self._rows is None:
            return out.expand(-1, self._width, -1)
        full = out.new_zeros(out.shape[0], self._width, out.shape[-1])
        return full.scatter(1, self._rows[..., None].expand_as(out), out)
