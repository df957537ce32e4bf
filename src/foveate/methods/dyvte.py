"""Exits: all visual tokens leave the LLM at a layer, which gates (DyVTE) or a rule decide, prompt by prompt."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from foveate.author import (
    BudgetError,
    FoveateError,
    Images,
    InLlmReducer,
    LayerTokens,
    ModelFamily,
    Selection,
    SpanSelection,
    budget,
    probes,
    register,
)
from foveate.core.exit_gates import Gates, feature


@dataclass(frozen=True)
class ExitReducer(InLlmReducer):
    """A method that lets all visual tokens of a prompt leave together; its author writes `leaves`."""

    keep: float | None = None

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.TextStates(),)

    @property
    def adaptive(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.keep is not None and (not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0):
            raise BudgetError(
                f"keep of {self.name} is the least share of the layers that see the image, such as 0.5, not "
                f"{self.keep!r}: where the tokens leave depends on the prompt"
            )
        super().__post_init__()

    def boundaries(self, depth: int) -> Sequence[int]:
        return range(max(1, math.ceil((self.keep or 0.0) * depth - 1e-9)), depth)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        return (0,) * len(self.boundaries(depth))

    @abstractmethod
    def leaves(self, tokens: LayerTokens) -> Sequence[bool]:
        """Say for each prompt whether its visual tokens leave at this boundary."""

    def select(self, tokens: LayerTokens) -> Selection:
        parts = []
        for span, leave in zip(tokens.spans, self.leaves(tokens), strict=True):
            kept = torch.arange(0 if leave else len(span), device=tokens.device)
            parts.append(SpanSelection(len(span), kept, sample=span.sample, kind=span.kind))
        return Selection(tuple(parts))


@register("dyvte")
@dataclass(frozen=True)
class DyVTE(ExitReducer):
    """DyVTE (arXiv 2411.19628): trained gates read the text behind the image and say when its tokens may leave.

    Behind each layer its gate sees the mean of the states of this text but the last, and the last. If the logit of
    leaving is the larger one, all visual tokens of the prompt leave, for good.

    Parameters
    ----------
    gates
        The weights: a safetensors file, or a folder with some. `foveate.train_gates` makes them for a model.
    keep
        The least share of the layers that see the image; by default the gate behind the first layer is asked already.
    bias
        By how much the logit of leaving must be larger than that of keeping.

    Raises
    ------
    FoveateError
        If there are no gates, or they are for an LLM of another width or depth.

    Notes
    -----
    Waits for the device once per layer. A prompt without text behind its image keeps it. A gate of a model as wide as
    LLaVA-1.5-7B has 16.8 million weights; those of layers that `keep` leaves out are not loaded.

    Deviations from the paper: its code handles one prompt at a time, with the place of the image written into it.
    Text counts from the last image on.
    """

    gates: str = field(kw_only=True)
    bias: float = 0.0

    needs = (probes.TextStates(),)
    trained = True
    paper = "arXiv:2411.19628"
    complexity = "O(2048 D) per layer"

    def __post_init__(self) -> None:
        if not isinstance(self.gates, str | os.PathLike):
            raise FoveateError(f"gates are a safetensors file, or a folder with some, not {self.gates!r}")
        object.__setattr__(self, "gates", os.fspath(self.gates))
        super().__post_init__()
        Gates.load(self.gates)

    def check(self, model: Any, family: ModelFamily) -> None:
        decoder, gates = model.get_decoder(), Gates.load(self.gates)
        depth, width = decoder.config.num_hidden_layers, decoder.config.hidden_size
        if gates.width != width or max(gates.layers) >= depth:
            raise FoveateError(
                f"the gates {self.gates!r} are for an LLM of width {gates.width} with at least "
                f"{max(gates.layers) + 1} layers, but this one has width {width} and {depth} layers: train gates for "
                "it with foveate.train_gates"
            )

    def leaves(self, tokens: LayerTokens) -> Sequence[bool]:
        first = self.boundaries(tokens.depth)[0] - 1
        gate = Gates.load(self.gates, first, tokens.device).of(tokens.boundary - 1)
        margins = torch.full((len(tokens.text),), -torch.inf, device=tokens.device)
        if gate is None:
            return (False,) * len(tokens.text)
        for i, text in enumerate(tokens.text):
            if len(text):
                keep, leave = gate(feature(text)).float()
                margins[i] = leave - keep
        return (margins > self.bias).tolist()


_THRESHOLDS = {"fixed": None, "mass": 0.1, "converged": 0.99}


@register("visual_exit")
@dataclass(frozen=True)
class VisualExit(ExitReducer):
    """All visual tokens leave the LLM by a rule that needs no training.

    Parameters
    ----------
    keep
        The least share of the layers that see the image.
    rule
        ``"fixed"``: the tokens leave right behind these layers. ``"mass"``: where the text behind the image pays less
        than `threshold` of its attention to the tokens, as in the second stage of ToDRE (arXiv 2505.18757), but at
        every layer. ``"converged"``: where the cosine between the states of the last token of the prompt before and
        behind a layer is above it.
    threshold
        By default 0.1 for ``"mass"`` and 0.99 for ``"converged"``.

    Notes
    -----
    Not a published method, except for ``"mass"`` at one layer; nobody has shown that ``"converged"`` is useful. All
    rules but ``"fixed"`` wait for the device once per layer, and keep the image of a prompt without text behind it.
    """

    keep: float = 0.5
    rule: Literal["fixed", "mass", "converged"] = "fixed"
    threshold: float | None = None

    complexity = "O(S D) per layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            object.__setattr__(self, "threshold", _THRESHOLDS[self.rule])
        elif self.rule == "fixed":
            raise FoveateError("the rule 'fixed' has no threshold: leave it out, or take 'mass' or 'converged'")
        elif not budget.is_number(self.threshold):
            raise FoveateError(f"threshold is a number such as {_THRESHOLDS[self.rule]}, not {self.threshold!r}")

    @property
    def adaptive(self) -> bool:
        return self.rule != "fixed"

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.TextStates(), *(probes.LayerAttention("text"),) * (self.rule == "mass"))

    def boundaries(self, depth: int) -> Sequence[int]:
        return super().boundaries(depth)[: 1 if self.rule == "fixed" else None]

    def leaves(self, tokens: LayerTokens) -> Sequence[bool]:
        if self.threshold is None:
            return (True,) * len(tokens.text)
        found = []
        for i, text in enumerate(tokens.text):
            if not len(text):
                found.append(torch.tensor(False, device=tokens.device))
            elif self.rule == "mass":
                found.append(tokens.planes[probes.LayerAttention("text")][i].sum() < self.threshold)
            else:
                before, behind = tokens.text_before[i][-1].float(), text[-1].float()
                found.append(torch.cosine_similarity(before, behind, dim=0) > self.threshold)
        return torch.stack(found).tolist()  # type: ignore[no-any-return]
