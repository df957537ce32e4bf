"""Attachments: a model that reduces its visual tokens until it is detached."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

from torch import Tensor

from foveate.core.errors import AttachError, InputError
from foveate.core.reducer import Method, Positions
from foveate.core.selection import SpanSelection
from foveate.engines.pipeline import UNMETERED, Meter
from foveate.engines.settings import Separators, Settings
from foveate.engines.transformers.bias.hooks import Biasing
from foveate.engines.transformers.continuation import Call, Continuation
from foveate.engines.transformers.in_llm.hooks import LayerHooks
from foveate.engines.transformers.priors import check_scores
from foveate.engines.transformers.reduce import base_model, refuse_vllm
from foveate.engines.transformers.results import Result, Results
from foveate.engines.transformers.wrapping import Wrapping
from foveate.families import Family, family_of
from foveate.registry import load_reducer

Logits: TypeAlias = Literal["compact", "full"]

_HANDLE: Final = "_foveate"
_LOCK: Final = threading.Lock()


def attach(
    model: Any,
    method: str | Path | Method,
    *,
    positions: Positions | None = None,
    separators: Separators = "drop",
    rectify: float = 0.0,
    absorb: bool = False,
    logits: Logits = "compact",
    **config: Any,
) -> Handle:
    """Make a model reduce its visual tokens in ``generate`` and ``forward`` until detached.

    The handle is a context manager.

    Parameters
    ----------
    model, method, positions, separators, rectify, absorb, config
        Those of `reduce`, and `rectify` of `Settings`.
    logits
        The columns of the logits and hidden states that ``forward`` returns. ``"compact"``: those that the LLM was
        given, which are all of the prompt's if the method acts inside it. ``"full"``: all of the prompt's, for callers
        that look up labels or ``logits_to_keep`` there. A dropped column has what the last one before it that is left
        has, so that the text behind an image is predicted as in the compact prompt; one in front of the first that is
        left has zeros. The loss is the same. Attentions stay as they are.

    Raises
    ------
    AttachError
        If something is attached to the model already.
    InputError
        If positions, separators or logits are none of these, or do not go with the method or the family.

    Examples
    --------
    >>> with foveate.attach(model, "vispruner", keep=64) as handle:  # doctest: +SKIP
    ...     out = model.generate(**inputs)
    >>> handle.selections[0][0].kept  # doctest: +SKIP
    """
    model = base_model(model)
    reducer = load_reducer(method, **config)
    refuse_vllm(model, reducer)
    family = family_of(model)
    settings = Settings.make(reducer, positions, separators, family, rectify, absorb)
    return attach_with(model, family, settings, logits=logits)


def attach_with(
    model: Any, family: Family, settings: Settings, meter: Meter = UNMETERED, logits: Logits = "compact"
) -> Handle:
    """Attach as `attach` does, with the family and the settings at hand; see `foveate.engines.pipeline.run`."""
    if logits not in ("compact", "full"):
        raise InputError(f"logits are 'compact' or 'full', not {logits!r}")
    settings.reducer.check(model, family)
    return Handle(model, family, settings, meter, logits)


def attached(model: Any) -> Handle | None:
    """Return the handle that is attached to a model, if any."""
    handle: Handle | None = vars(model).get(_HANDLE)
    return handle


class Handle:
    """A live attachment.

    ``generate`` is wrapped on the instance, so that prompt ids come back whole and later turns on the same cache fit;
    ``forward`` is served by hooks.

    `selections`, `layers` and `received` tell of the last call on the thread that asks, or, if it has made none, of
    the last one on any: behind a ``generate`` that ran on a thread of its own for a streamer.
    """

    def __init__(self, model: Any, family: Family, settings: Settings, meter: Meter, logits: Logits):
        self._model, self.settings = model, settings
        with _LOCK:  # of several threads one gets the model
            if (other := attached(model)) is not None:
                raise AttachError(
                    f"{other.reducer!r} is attached to this model already: detach it first, or attach a Chain of both"
                )
            setattr(model, _HANDLE, self)
        try:
            self._put_on(model, family, meter, full=logits == "full")
        except BaseException:
            delattr(model, _HANDLE)
            raise

    def _put_on(self, model: Any, family: Family, meter: Meter, full: bool) -> None:
        settings = self.settings
        self._call, self._results = Call(), Results([Result()])
        inside = settings.inside
        self._layers = LayerHooks(model, family, inside, settings.inside_positions, full) if inside else None
        self._biasing = Biasing(model, settings.rectify) if settings.rectify else None
        continuation = Continuation(model, family, settings, self._results, self._call, meter)
        self._wrapping = Wrapping(model, continuation, self._layers, self._biasing, self._results, self._call, full)

    @property
    def reducer(self) -> Method:
        """The attached method."""
        return self.settings.reducer

    @property
    def selections(self) -> list[list[SpanSelection]]:
        """What the last call with images kept, per prompt and span; of methods inside the LLM in its last layer."""
        return self._results.last.selections()

    @property
    def layers(self) -> dict[int, list[list[SpanSelection]]]:
        """What methods inside the LLM left of the last call's images: the `selections` from each of these layers on."""
        return self._results.last.layers()

    @property
    def received(self) -> list[list[int]]:
        """The visual tokens that each layer of the LLM received of each prompt of the last call."""
        return self._results.last.received(self._model.config.get_text_config().num_hidden_layers)

    @contextmanager
    def scored(self, scores: Sequence[Tensor]) -> Iterator[None]:
        """Hand scores to a method inside the LLM that ranks tokens by those of somebody else, such as `SGL`.

        Parameters
        ----------
        scores
            Per prompt with images ``[n]``: the score of each of its visual tokens, for calls in the body of the
            ``with`` statement on this thread.

        Raises
        ------
        InputError
            If they are no such tensors, or some score is NaN, which has no rank.
        """
        rows = list(scores)
        check_scores(rows)
        self._call.scores = rows
        try:
            yield
        finally:
            self._call.scores = None

    def detach(self) -> None:
        """Restore the model exactly. Detaching twice does no harm."""
        with _LOCK:
            if attached(self._model) is not self:
                return
            self._wrapping.remove()
            if self._biasing is not None:
                self._biasing.remove()
            if self._layers is not None:
                self._layers.remove()
            delattr(self._model, _HANDLE)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
