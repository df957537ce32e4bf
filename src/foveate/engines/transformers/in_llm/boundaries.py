"""Which method inside an LLM acts at which boundary between two of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.core.errors import InputError
from foveate.core.in_llm import InLlmReducer, cuts
from foveate.core.reducer import Positions


@dataclass(frozen=True, eq=False)
class Boundaries:
    """The boundaries of an LLM at which methods act.

    Attributes
    ----------
    decoder
        The LLM, with its layers.
    reducers
        The methods, whose boundaries ascend from one to the next.
    positions
        Whether tokens keep the positions with which they entered the LLM, or are numbered anew behind each boundary.
    at
        The method of each boundary.
    """

    decoder: Any
    reducers: tuple[InLlmReducer, ...]
    positions: Positions
    at: Mapping[int, InLlmReducer]

    @classmethod
    def of(cls, decoder: Any, reducers: Sequence[InLlmReducer], positions: Positions) -> Boundaries:
        """Ask the methods where they act.

        Raises
        ------
        InputError
            If a method acts in front of, or at, a boundary of the one before it.
        """
        found: dict[int, InLlmReducer] = {}
        for reducer in reducers:
            for boundary in cuts(reducer, len(layers_of(decoder))):
                if boundary <= max(found, default=0):
                    raise InputError(
                        f"{reducer.name} drops tokens in front of layer {boundary}, but a method before it does so in "
                        f"front of {max(found, default=0)}: give methods inside the LLM ascending layers"
                    )
                found[boundary] = reducer
        return cls(decoder, tuple(reducers), positions, found)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers of the LLM."""
        return layers_of(self.decoder)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)


def layers_of(decoder: Any) -> Sequence[nn.Module]:
    """Return the layers that a pass runs; a decoder may hold further ones, which `transformers` leaves out."""
    return decoder.layers[: decoder.config.num_hidden_layers]  # type: ignore[no-any-return]
