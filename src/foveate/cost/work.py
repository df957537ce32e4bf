"""What the images of a prompt come to: patches in the encoder, rows in the projector, tokens in the LLM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import UnsupportedModelError
from foveate.core.spans import Span
from foveate.cost.anatomy import Anatomy
from foveate.families.layout import Grid


@dataclass(frozen=True)
class Work:
    """The images and videos of a prompt.

    Attributes
    ----------
    pictures
        Rows and columns of patches of all that goes through the encoder by itself: crops, tiles, frames.
    spans
        Their visual tokens.
    padded
        Patches to which the encoder pads every picture; 0 if it does not.
    encoder_flops
        FLOPs of an encoder that is no stack of transformer layers, counted on a run without weights; else `None`. In
        an opaque family, the projector's are among them.
    size
        Height and width of its pictures in pixels, if it is known.
    """

    pictures: tuple[Grid, ...]
    spans: tuple[Span, ...]
    padded: int = 0
    encoder_flops: int | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Visual tokens of the unpruned prompt."""
        return sum(map(len, self.spans))

    def rows(self, anatomy: Anatomy) -> list[int]:
        """Return the patches of each sequence within which the encoder attends, windows aside."""
        counts = [max(math.prod(grid), self.padded) for grid in self.pictures]
        return [sum(counts)] if anatomy.tower is not None and anatomy.tower.packed else counts

    def windows(self, anatomy: Anatomy) -> list[int] | None:
        """Return the patches of each window of all pictures, if the encoder has windows."""
        side = 0 if anatomy.tower is None else anatomy.tower.window
        if not side:
            return None
        return [h * w for height, width in self.pictures for h in _cut(height, side) for w in _cut(width, side)]

    def projected(self, anatomy: Anatomy) -> int:
        """Return the rows that the stock model sends through its projector."""
        if anatomy.family.projects_kept:
            # Crops are projected whole, also where padding is cut off afterwards; pooled frames are not.
            lead = bool(anatomy.tower and anatomy.tower.lead and any(s.extents for s in self.spans if _keeps_cls(s)))
            pooled = sum(len(s) for s in self.spans if s.kind == "video")
            frames = sum(len(s.crops) for s in self.spans if s.kind == "video")
            stills = self.pictures[: len(self.pictures) - frames]
            return pooled + sum(math.prod(grid) + lead for grid in stills)
        if not self.pictures:
            return self.tokens
        return sum(math.prod(grid) for grid in self.pictures) // anatomy.merges


def _keeps_cls(span: Span) -> bool:
    """Return whether the first token of an image is a ``[CLS]`` that the projector reads."""
    return span.kind == "image" and int(span.crops[0].index[0]) == 1


def _cut(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


def work_of(anatomy: Anatomy, inputs: Mapping[str, Any], spans: Sequence[Span]) -> Work:
    """Read off a processor's output what it comes to.

    Parameters
    ----------
    inputs
        Model inputs; only shapes and sizes are read.
    spans
        As `Family.spans` returns them.
    """
    family = anatomy.family
    given = {key: kind for key, kind in family.inputs.items() if inputs.get(key) is not None}
    keys = sorted(given, key=lambda key: given[key] == "video")  # stills first
    if anatomy.tower is None:
        height, width = inputs[keys[-1]].shape[-2:]
        return Work((), tuple(spans), 0, encoder_flops(anatomy, inputs), (height, width))
    pictures = [grid for key in keys for grid in family.patch_grids(anatomy.model, inputs, key)]
    return Work(tuple(pictures), tuple(spans), family.padded_patches(inputs))


def together(works: Sequence[Work]) -> Work:
    """Return the work of several parts of a prompt, of models whose encoder is a stack of layers, or of one part."""
    if len(works) == 1:
        return works[0]
    pictures = [grid for work in works for grid in work.pictures]
    return Work(tuple(pictures), tuple(span for work in works for span in work.spans))


def encoder_flops(anatomy: Anatomy, inputs: Mapping[str, Any]) -> int:
    """Run an encoder on the meta device, which computes nothing, and count its FLOPs.

    Raises
    ------
    UnsupportedModelError
        If it needs more than shapes and sizes to run.
    """
    model, family = anatomy.model, anatomy.family
    side = {key: inputs[key].cpu() for key in family.side_inputs if inputs.get(key) is not None}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            family.run_encoder(model, inputs["pixel_values"].to("meta", model.dtype), **side)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        # On the meta device, whatever asks for a value fails, in a way of its own.
        raise UnsupportedModelError(
            f"the vision FLOPs of {type(model).__name__} are not known: its encoder does not run without data"
        ) from error
    return int(counter.get_total_flops())
