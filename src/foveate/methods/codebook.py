"""Codebook: drops the tokens that are close to prototypes of redundancy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.author import (
    CropBatch,
    FoveateError,
    InputError,
    ModelFamily,
    Reducer,
    Selection,
    VisualTokens,
    probes,
    ranking,
    register,
)
from foveate.core.codebook import Codebook, projector_hash


@register("codebook")
@dataclass(frozen=True)
class CodebookPruner(Reducer):
    """Redundancy explained through language (arXiv 2503.20540): drops tokens close to redundant prototypes.

    Prototypes are visual tokens that, alone, make the model say nothing with confidence, and whose removal changes
    nothing. ``foveate codebook`` finds them once per model and writes them to a file.

    Parameters
    ----------
    keep
        The budget: the tokens of each crop that are least like any prototype stay.
    codebook
        File of prototypes ``[K, D]``, made for this model.
    score
        How a token is like the prototypes. ``"cosine"``: its highest cosine similarity. ``"softmax"``: the highest
        product of two softmaxes of these similarities, over the tokens and over the prototypes, as the authors have it
        for LLaVA-OneVision.

    Raises
    ------
    FoveateError
        If the file is no codebook, is for tokens of another width, or was made for another projector.

    Notes
    -----
    One product ``[N, D] x [D, K]`` and one sort. The order of the prototypes has no influence.
    `select` looks whether its file has changed, which no graph can hold; what follows does compile (`pick`).

    Deviations from the paper: only its mode of a fixed number of tokens; the other keeps whatever falls below a
    threshold. Ties go to the lower index, and tokens that are not finite are dropped first.
    """

    codebook: str
    score: Literal["cosine", "softmax"] = "cosine"

    needs = (probes.Embeddings(),)
    paper = "arXiv:2503.20540"
    complexity = "O(N K D)"

    def __post_init__(self) -> None:
        if isinstance(self.codebook, os.PathLike):
            object.__setattr__(self, "codebook", os.fspath(self.codebook))
        super().__post_init__()
        Codebook.load(self.codebook)

    def check(self, model: Any, family: ModelFamily) -> None:
        book = Codebook.load(self.codebook)
        if book.projector != projector_hash(family.projector(model)):
            raise FoveateError(
                f"the codebook {self.codebook!r} was made for the projector of {book.model!r}, and this model has "
                "another one: make a codebook for it with `foveate codebook`"
            )

    def select(self, tokens: VisualTokens) -> Selection:
        prototypes = Codebook.load(self.codebook).unit(tokens.device)
        return tokens.per_crop(self.keep, lambda crops, count: self.pick(crops, count, prototypes))

    def pick(self, crops: CropBatch, count: int, prototypes: Tensor) -> Tensor:
        embeddings = crops.probe(probes.Embeddings())
        if embeddings.shape[-1] != prototypes.shape[-1]:
            raise InputError(
                f"the codebook {self.codebook!r} holds prototypes of width {prototypes.shape[-1]}, but the tokens of "
                f"this model have {embeddings.shape[-1]}: make a codebook for it with `foveate codebook`"
            )
        unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
        likeness = torch.bmm(unit, prototypes.T.expand(len(unit), -1, -1)).nan_to_num(nan=2.0)  # above any cosine
        if self.score == "softmax":
            likeness = likeness.softmax(dim=1) * likeness.softmax(dim=2)
        return ranking.top(-likeness.amax(dim=-1), count)
