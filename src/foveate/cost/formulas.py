"""The papers' formulas by name, and equivalent tokens: what tables of the field count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from foveate.core.errors import InputError

PerLayer: TypeAlias = int | Sequence[int]
"""A number of visual tokens in all layers of the LLM alike, or one per layer."""


def per_layer(tokens: PerLayer, depth: int) -> list[int]:
    """Return the tokens that each of `depth` layers receives.

    Raises
    ------
    InputError
        If there are not as many numbers as layers, or one of them is negative.
    """
    counts = [tokens] * depth if isinstance(tokens, int) else list(tokens)
    if len(counts) != depth:
        raise InputError(f"this model has {depth} layers; {len(counts)} token counts were given")
    if min(counts, default=0) < 0:
        raise InputError(f"a layer cannot receive {min(counts)} tokens")
    return counts


def fastv(text_config: Any, tokens: PerLayer, text_tokens: int = 0) -> int:
    """Multiply-accumulates as FastV counts them (arXiv 2403.06764, Eq. 5): ``4 n d^2 + 2 n^2 d + 2 n d m`` per layer.

    Parameters
    ----------
    tokens
        Visual tokens: one number, or one per layer.
    text_tokens
        The other tokens of the prompt. The paper's n is the whole prompt, so these count along.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> round(fastv(LlamaConfig(), 576, text_tokens=35) / 32 / 1e9, 1)
    99.2
    """
    return _macs(text_config, tokens, text_tokens, 2)


def pyramiddrop(text_config: Any, tokens: PerLayer, text_tokens: int = 0) -> int:
    """Multiply-accumulates as PyramidDrop counts them (arXiv 2410.17247): ``4 n d^2 + 2 n^2 d + 3 n d m`` per layer.

    Parameters
    ----------
    tokens
        Visual tokens: one number, or one per layer.
    text_tokens
        Other tokens that count along; none in that paper.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> round(pyramiddrop(LlamaConfig(), 576) / 1e12, 3)
    3.817
    """
    return _macs(text_config, tokens, text_tokens, 3)


FORMULAS = {"fastv": fastv, "pyramiddrop": pyramiddrop}


def equivalent_tokens(counts: Sequence[int], counted: str = "input") -> float:
    """Return the mean number of visual tokens over the layers: "192 tokens" of a method that acts inside the LLM.

    Parameters
    ----------
    counts
        Visual tokens that each layer receives.
    counted
        ``"input"``: each layer counts what it receives. ``"output"``: what it hands on, so that the layer whose
        attention ranks the tokens counts as pruned already, as SparseVLM counts (arXiv 2410.04417).

    Examples
    --------
    >>> equivalent_tokens([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8)
    270.0
    """
    if counted not in ("input", "output"):
        raise InputError(f"tokens are counted at the 'input' or the 'output' of a layer, not {counted!r}")
    seen = list(counts) if counted == "input" else [*counts[1:], counts[-1]]
    return sum(seen) / len(seen)


def _macs(text: Any, tokens: PerLayer, text_tokens: int, matrices: int) -> int:
    d, m = text.hidden_size, text.intermediate_size
    lengths = [text_tokens + n for n in per_layer(tokens, text.num_hidden_layers)]
    return sum(4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m for n in lengths)
