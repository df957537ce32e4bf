"""True FLOPs and bytes of the KV cache, from a model's configuration.

What is counted: matrix products and convolutions, a multiply-accumulate as two FLOPs. Left out: biases, norms,
activations, softmax, rotary embeddings, interpolation, pooling heads of vision towers that no projector reads, and what
a method inside the encoder reads and compares. Attention counts as the full square by default, as
`torch.utils.flop_counter` has it and as kernels without a causal short cut compute it; ``causal=True`` counts the pairs
that a causal mask (and a sliding window) lets through. A mixture of experts counts those that a token goes through,
recurrent layers the steps of their recurrence. The LM head counts for the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import LayerProbe, Probe
from foveate.cost.anatomy import Anatomy, Layer, Tower, anatomy_of, attention_widths, layer_types
from foveate.cost.formulas import PerLayer, per_layer

Patches: TypeAlias = int | Sequence[tuple[int, int]]
"""Patches of a picture, in all layers of the encoder alike or layer by layer."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one prefill, by part.

    Attributes
    ----------
    vision
        The vision tower, patch embedding included.
    projector
        From encoder features to LLM embeddings; mergers inside the vision tower count here.
    selection
        What the method adds: probes and decision.
    prefill
        The layers of the LLM over the whole prompt.
    lm_head
        Logits of the last token.
    """

    vision: int
    projector: int
    selection: int
    prefill: int
    lm_head: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.vision + self.projector + self.selection + self.prefill + self.lm_head

    def to_dict(self) -> dict[str, int]:
        """Return the parts and their sum as JSON-compatible data."""
        return {**asdict(self), "total": self.total}


def prefill_flops(
    config: Any,
    visual_tokens: int,
    text_tokens: int,
    kept: PerLayer,
    *,
    rows: Sequence[Patches] | None = None,
    windows: Sequence[int] | None = None,
    vision: int | None = None,
    projected: int | None = None,
    early_exit: bool = True,
    selection: int = 0,
    causal: bool = False,
) -> Cost:
    """Count the FLOPs of a prefill that keeps `kept` of `visual_tokens` visual tokens beside `text_tokens` others.

    Parameters
    ----------
    config
        Configuration of a model of any family, or its `Anatomy`.
    kept
        One number, or one per layer of the LLM for methods that act inside it.
    rows
        Patches of each picture that goes through the vision tower, or for each of the layers that run those that attend
        and those that pass its second half. By default as many whole pictures of ``image_size`` as the visual tokens
        fill, or one picture of any size.
    windows
        Patches of each window, for encoders most of whose layers attend within windows; by default those of squares.
    vision
        FLOPs of an encoder that is no stack of transformer layers, see `Work.encoder_flops`.
    projected
        Rows that go through the projector; by default the kept tokens where foveate prunes before it. Methods that
        merge project them all.
    early_exit
        Whether the tower stops after the last layer that the projector reads, as foveate's engine does in families of
        LLaVA. The stock model runs all of its layers.
    selection
        FLOPs that the method itself adds, see `probe_flops`.
    causal
        Count only the pairs of tokens that the causal mask lets through.

    Returns
    -------
    Cost

    Raises
    ------
    UnsupportedModelError
        If the FLOPs of such a model are not known.

    Examples
    --------
    >>> from transformers import LlavaConfig
    >>> cost = prefill_flops(LlavaConfig(), visual_tokens=576, text_tokens=40, kept=64)
    >>> round(cost.prefill / 1e12, 2)
    1.35
    """
    anatomy = _anatomy(config)
    counts = per_layer(kept, len(anatomy.decoder))
    if not 0 < counts[0] <= visual_tokens or any(a < b for a, b in pairwise(counts)):
        shown = kept if isinstance(kept, int) else list(kept)
        raise InputError(
            f"between 1 and all of the {visual_tokens} visual tokens can be kept, and no layer gets more than the one "
            f"before it: not {shown}"
        )
    if vision is None:
        tower = _tower(anatomy)
        rows = default_rows(anatomy, visual_tokens) if rows is None else rows
        vision = _vision(tower, rows, windows, tower.read if early_exit else None)
    if projected is None:
        whole = sum(r for r in rows or () if isinstance(r, int)) // anatomy.merges
        projected = counts[0] if anatomy.family.projects_kept or not whole else whole
    return Cost(
        vision=vision,
        projector=projected * anatomy.projector,
        selection=selection,
        prefill=_prefill(anatomy.decoder, [text_tokens + n for n in counts], causal),
        lm_head=anatomy.lm_head,
    )


def decode_flops(config: Any, cached: PerLayer) -> int:
    """Count the FLOPs of one decoded token, logits included.

    Parameters
    ----------
    config
        As in `prefill_flops`.
    cached
        Tokens in the KV cache: one number, or one per layer of the LLM.
    """
    anatomy = _anatomy(config)
    lengths = per_layer(cached, len(anatomy.decoder))
    flops = anatomy.lm_head
    for layer, length in zip(anatomy.decoder, lengths, strict=True):
        seen = min(length + 1, layer.window) if layer.window else length + 1
        flops += layer.matrices + 4 * seen * layer.width
    return flops


def vision_layers(config: Any, early_exit: bool = True) -> int:
    """Return how many layers of the vision tower run: all, or up to the last one that the projector reads."""
    tower = _tower(_anatomy(config))
    return tower.read if early_exit else len(tower.layers)


def probe_flops(config: Any, probes: Sequence[Probe], rows: Sequence[int], windows: Sequence[int] | None = None) -> int:
    """Count what reading a method's probes adds to the vision tower.

    Parameters
    ----------
    probes
        Attention of one query costs one row of products per layer, attention received all of them; features and keys
        are there anyway. A probe behind the layer that the projector reads makes further layers run, in families where
        the tower stops there.
    rows, windows
        As in `prefill_flops`.
    """
    layer_probes = [p for p in probes if isinstance(p, LayerProbe)]
    if not layer_probes:
        return 0
    anatomy = _anatomy(config)
    tower, flops = _tower(anatomy), 0
    depth, read = len(tower.layers), tower.read - 1
    behind = 0
    for probe in layer_probes:
        numbers = probe.numbers(depth, read, tower.whole_layers)
        behind = max(behind, max(numbers) - read)
        for number in numbers:
            for length in _sequences(tower, number, rows, windows):
                count = length + tower.lead
                flops += 2 * probe.rows(count, tower.lead) * count * tower.layers[number].width
    if behind and anatomy.family.projects_kept:
        for number in range(tower.read, tower.read + behind):
            flops += sum(_layer(tower.layers[number], n + tower.lead, n + tower.lead) for n in rows)
    return flops


def kv_bytes(text_config: Any, tokens: PerLayer, bytes_per_value: int = 2) -> int:
    """Return the size of the KV cache of `tokens` tokens, in bytes.

    Layers with a sliding window hold one token less than it has places, the last of which is for the next token;
    convolutions and other recurrent layers hold none.

    Parameters
    ----------
    tokens
        All tokens of the prompt: one number, or one per layer.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> kv_bytes(LlamaConfig(), 576) // 2**20
    288
    """
    _, key_width = attention_widths(text_config)
    kinds = layer_types(text_config)
    window = getattr(text_config, "sliding_window", None)
    held = 0
    for kind, count in zip(kinds, per_layer(tokens, len(kinds)), strict=True):
        if kind == "sliding_attention":
            held += min(count, window - 1) if window else count
        elif kind == "full_attention":
            held += count
    return int(2 * held * key_width * bytes_per_value)


def default_rows(anatomy: Anatomy, visual_tokens: int) -> list[int]:
    """Return the patches of the pictures that so many visual tokens fill."""
    grid = None if anatomy.tower is None else anatomy.tower.grid
    if grid is None:
        return [visual_tokens * anatomy.merges]
    patches = grid[0] * grid[1]
    return [patches] * -(-visual_tokens // (patches // anatomy.merges))


def _anatomy(config: Any) -> Anatomy:
    return config if isinstance(config, Anatomy) else anatomy_of(config)


def _tower(anatomy: Anatomy) -> Tower:
    if anatomy.tower is None:
        raise UnsupportedModelError(
            f"the encoder of the family {anatomy.family.name!r} is no stack of transformer layers: its FLOPs are not "
            "known from token counts"
        )
    return anatomy.tower


def _vision(tower: Tower, rows: Sequence[Patches], windows: Sequence[int] | None, read: int | None) -> int:
    flops = sum(r if isinstance(r, int) else r[0][0] for r in rows) * tower.embedding
    plain = [r for r in rows if isinstance(r, int)]
    for number, layer in enumerate(tower.layers[:read]):
        flops += sum(_layer(layer, n + tower.lead, n + tower.lead) for n in _sequences(tower, number, plain, windows))
    for changing in (r for r in rows if not isinstance(r, int)):
        for layer, (attending, passing) in zip(tower.layers, changing, strict=False):
            flops += _layer(layer, tower.lead + attending, tower.lead + passing)
    return flops


def _sequences(tower: Tower, number: int, rows: Sequence[int], windows: Sequence[int] | None) -> Sequence[int]:
    """Return the patches of each sequence within which a layer attends."""
    if not tower.window or number in tower.whole:
        return rows
    if windows is not None:
        return windows
    size = tower.window**2
    return [n for row in rows for n in [size] * (row // size) + [row % size]]


def _layer(layer: Layer, attending: int, passing: int) -> int:
    return attending * layer.attention + 4 * attending**2 * layer.width + passing * layer.rest


def _prefill(layers: Sequence[Layer], lengths: Sequence[int], causal: bool) -> int:
    return sum(
        n * layer.matrices + 4 * (_pairs(n, layer.window) if causal else n * n) * layer.width
        for layer, n in zip(layers, lengths, strict=True)
    )


def _pairs(tokens: int, window: int) -> int:
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
