"""What the last call of an attached model came to, thread by thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from foveate.core.selection import Selection, SpanSelection
from foveate.engines.transformers.in_llm.pass_state import PassState


@dataclass(eq=False)
class Result:
    """What a call with images came to, prompt by prompt.

    Attributes
    ----------
    selection
        What methods before the LLM kept, if they acted.
    batch
        Number of prompts.
    inside
        The tokens of the pass over the prompts, if methods inside the LLM had a say in it.
    """

    selection: Selection | None = None
    batch: int = 0
    inside: PassState | None = None

    def selections(self) -> list[list[SpanSelection]]:
        """Return what was kept, per prompt and span; of methods inside the LLM in its last layer."""
        if self.inside is not None:
            return self._once_each(self.inside.selections())
        return self._before()

    def layers(self) -> dict[int, list[list[SpanSelection]]]:
        """Return what methods inside the LLM left from each of these layers on."""
        if self.inside is None:
            return {}
        return {boundary: self._once_each(self.inside.selections(left)) for boundary, left in self.inside.cuts}

    def received(self, depth: int) -> list[list[int]]:
        """Return the visual tokens that each of `depth` layers received of each prompt."""
        chosen, layers = self.selections(), self.layers()
        before = None if self.selection is None else self._before()
        left = [sum(s.length for s in row) for row in chosen] if before is None else _counts(before)
        rows: list[list[int]] = [[] for _ in chosen]
        for layer in range(depth):
            left = _counts(layers[layer]) if layer in layers else left
            for row, count in zip(rows, left, strict=True):
                row.append(count)
        return rows

    def _before(self) -> list[list[SpanSelection]]:
        return [] if self.selection is None else self.selection.by_prompt(self.batch)

    def _once_each(self, rows: list[list[SpanSelection]]) -> list[list[SpanSelection]]:
        """Leave out the copies that ``generate`` makes of each prompt for beams and several answers."""
        return rows[:: len(rows) // self.batch]


def _counts(rows: list[list[SpanSelection]]) -> list[int]:
    return [sum(map(len, row)) for row in rows]


class Results(threading.local):
    """The last result of each thread.

    Attributes
    ----------
    own
        That of the running thread; of no prompts if it has made no call with images.
    """

    def __init__(self, latest: list[Result]):
        self.own = Result()
        self._latest = latest  # the one list of all threads: what any of them came to last

    def begin(self, selection: Selection | None, batch: int) -> None:
        """Take note of a call with so many prompts, and of what methods before the LLM kept, if they acted."""
        self.own = self._latest[0] = Result(selection, batch)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what the call came to, whatever calls the body of the ``with`` statement makes."""
        own, latest = self.own, self._latest[0]
        try:
            yield
        finally:
            self.own, self._latest[0] = own, latest

    @property
    def last(self) -> Result:
        """That of the last call of the running thread, or of any if it has made none."""
        return self.own if self.own.batch else self._latest[0]
