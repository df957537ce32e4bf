"""What `foveate check` is tested with: small sizes, and a broken method."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from foveate import registry
from foveate.check.run import Sizes
from foveate.core.reducer import Reducer
from foveate.methods import Uniform

SIZES = Sizes(grid=(8, 8), seeds=1, grids=((4, 6),), batches=(1, 2))


@dataclass(frozen=True)
class KeepsOthersInBatches(Reducer):
    """A broken method, whose choice depends on what else travels in the batch."""

    stage = "before_llm"
    complexity = "O(T)"

    def select(self, tokens):
        shift = len(tokens.spans) - 1
        return tokens.per_crop(
            self.keep, lambda crops, count: Uniform(keep=count).pick(crops, count) // 2 * 2 + shift % 2
        )


@pytest.fixture
def broken(monkeypatch):
    """Register the broken method beside the others."""
    registry.list_methods()
    monkeypatch.setattr(KeepsOthersInBatches, "name", "keeps_others_in_batches")
    monkeypatch.setitem(registry._registry, "keeps_others_in_batches", KeepsOthersInBatches)
    return KeepsOthersInBatches(keep=9)
