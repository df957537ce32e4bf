"""Costs: FLOPs of a prefill and bytes of the KV cache from a model's configuration, and the papers' formulas by name.

What is counted: matrix products and convolutions, a multiply-accumulate as two FLOPs. Left out: biases, norms,
activations, softmax, rotary embeddings, and what a method inside the encoder reads and compares. The LLM's attention
counts as the full square by default, as `torch.utils.flop_counter` has it and as kernels without a causal short cut
compute it; ``causal=True`` counts the ``n * (n + 1) / 2`` pairs that a causal mask lets through. The LM head counts for
the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from foveate.errors import InputError, UnsupportedModelError
from foveate.probes import LayerProbe, Probe

Patches: TypeAlias = int | Sequence[tuple[int, int]]
"""Patches of a picture, in all layers of the encoder alike or layer by layer."""

_GATED = (
    "cohere", "gemma", "gemma2", "gemma3_text", "glm4", "internlm2", "llama", "mistral", "ministral", "phi3", "qwen2",
    "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text",
)  # fmt: skip
"""Text models whose feed-forward network is three matrices (SwiGLU and its kin), and whose layers are all alike."""


_PROJECTED = ("llava", "llava_next", "video_llava", "vipllava")
"""Models with a tower like CLIP's and a two-layer projector that maps each token by itself."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one prefill, by part.

    Attributes
    ----------
    vision
        The vision tower, patch embedding included.
    projector
        From encoder features to LLM embeddings.
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
    kept: int,
    *,
    rows: Sequence[Patches] | None = None,
    projected: int | None = None,
    early_exit: bool = True,
    selection: int = 0,
    causal: bool = False,
) -> Cost:
    """Count the FLOPs of a prefill that keeps `kept` of `visual_tokens` visual tokens beside `text_tokens` others.

    Parameters
    ----------
    config
        Configuration of a LLaVA-like model: a vision tower, a two-layer projector and an LLM.
    rows
        Patches of each picture that goes through the vision tower, or for each of the layers that run those that attend
        and those that pass its second half. By default as many whole pictures of ``image_size`` as the visual tokens
        fill.
    projected
        Tokens that go through the projector; by default the kept ones. Methods that merge project them all.
    early_exit
        Whether the tower stops after the last layer that the projector reads, as foveate's engine does. The stock
        model runs all of its layers.
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
    if not 0 < kept <= visual_tokens:
        raise InputError(f"between 1 and all of the {visual_tokens} visual tokens can be kept, not {kept}")
    check_known(config)
    vision = config.vision_config
    if rows is None:
        side = (vision.image_size // vision.patch_size) ** 2
        rows = [int(side)] * -(-visual_tokens // side)
    layers = vision_layers(config, early_exit)
    text = config.get_text_config()
    return Cost(
        vision=sum(_tower(vision, patches, layers) for patches in rows),
        projector=_projector(config, kept if projected is None else projected),
        selection=selection,
        prefill=_llm(text, text_tokens + kept, causal),
        lm_head=2 * text.hidden_size * text.vocab_size,
    )


def check_known(config: Any) -> None:
    """Raise `UnsupportedModelError` unless the tower and the projector are such as are counted here."""
    if config.model_type not in _PROJECTED or "clip" not in config.vision_config.model_type:
        raise UnsupportedModelError(
            f"the FLOPs of a model of type {config.model_type!r} with a vision tower of type "
            f"{config.vision_config.model_type!r} are not known; known are those of {', '.join(_PROJECTED)} with CLIP"
        )


def vision_layers(config: Any, early_exit: bool = True) -> int:
    """Return how many layers of the vision tower run: all, or up to the last one that the projector reads."""
    total: int = config.vision_config.num_hidden_layers
    return max(i if i >= 0 else total + 1 + i for i in _feature_layers(config)) if early_exit else total


def probe_flops(config: Any, probes: Sequence[Probe], rows: Sequence[int]) -> int:
    """Count what reading a method's probes adds to the vision tower.

    Parameters
    ----------
    probes
        Attention of one query costs one row of products per layer, attention received all of them; features and keys
        are there anyway. A probe behind the layer that the projector reads makes further layers run.
    rows
        Patches of each picture.
    """
    vision, flops = config.vision_config, 0
    depth, read, lead = vision.num_hidden_layers, vision_layers(config) - 1, _lead(vision)
    read_layers = [(p, p.numbers(depth, read)) for p in probes if isinstance(p, LayerProbe)]
    behind = max([max(layers) - read for _, layers in read_layers], default=0)
    for patches in rows:
        length = patches + lead
        for probe, layers in read_layers:
            flops += 2 * probe.rows(length, lead) * length * vision.hidden_size * len(layers)
        flops += max(0, behind) * _layer(vision, length, length)
    return flops


def kv_bytes(text_config: Any, tokens: int, bytes_per_value: int = 2) -> int:
    """Return the size of the KV cache of `tokens` tokens, in bytes.

    Layers with a sliding window hold no more tokens than it has places; convolutions and other recurrent layers none.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> kv_bytes(LlamaConfig(), 576) // 2**20
    288
    """
    _, key_width = _attention_widths(text_config)
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * text_config.num_hidden_layers
    window = getattr(text_config, "sliding_window", None) or tokens
    held = {"full_attention": tokens, "sliding_attention": min(tokens, window)}
    return int(2 * sum(held.get(kind, 0) for kind in kinds) * key_width * bytes_per_value)


def fastv(text_config: Any, tokens: int | Sequence[int]) -> int:
    """Multiply-accumulates of visual tokens as FastV counts them (Eq. 5): ``4 n d^2 + 2 n^2 d + 2 n d m`` per layer.

    Parameters
    ----------
    tokens
        Visual tokens n: one number, or one per layer.
    """
    return _paper_macs(text_config, tokens, 2)


def pyramiddrop(text_config: Any, tokens: int | Sequence[int]) -> int:
    """Multiply-accumulates of visual tokens as PyramidDrop counts them: ``4 n d^2 + 2 n^2 d + 3 n d m`` per layer.

    Parameters
    ----------
    tokens
        Visual tokens n: one number, or one per layer.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> round(pyramiddrop(LlamaConfig(), 576) / 1e12, 3)
    3.817
    """
    return _paper_macs(text_config, tokens, 3)


def _paper_macs(text: Any, tokens: int | Sequence[int], matrices: int) -> int:
    depth, d, m = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    per_layer = [tokens] * depth if isinstance(tokens, int) else list(tokens)
    if len(per_layer) != depth:
        raise InputError(f"this model has {depth} layers; {len(per_layer)} token counts were given")
    return sum(4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m for n in per_layer)


def _lead(vision: Any) -> int:
    """Return how many tokens, such as ``[CLS]``, the tower puts before the patches."""
    return int("clip" in vision.model_type and "siglip" not in vision.model_type)


def _tower(vision: Any, patches: Patches, layers: int) -> int:
    lengths = [(patches, patches)] * layers if isinstance(patches, int) else patches
    embedding = 2 * lengths[0][0] * vision.hidden_size * vision.num_channels * vision.patch_size**2
    lead = _lead(vision)
    return int(embedding + sum(_layer(vision, lead + attending, lead + passing) for attending, passing in lengths))


def _layer(vision: Any, attending: int, passing: int) -> int:
    d, m = vision.hidden_size, vision.intermediate_size
    return int(8 * attending * d**2 + 4 * attending**2 * d + 4 * passing * d * m)


def _projector(config: Any, tokens: int) -> int:
    width = config.get_text_config().hidden_size
    features = config.vision_config.hidden_size * len(_feature_layers(config))
    return int(2 * tokens * (features * width + width * width))


def _feature_layers(config: Any) -> list[int]:
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def _llm(text: Any, tokens: int, causal: bool) -> int:
    if text.model_type not in _GATED:
        raise UnsupportedModelError(
            f"the FLOPs of a text model of type {text.model_type!r} are not known; known are: {', '.join(_GATED)}"
        )
    d, m, (query, key) = text.hidden_size, text.intermediate_size, _attention_widths(text)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    linear = 2 * tokens * (2 * d * query + 2 * d * key + 3 * d * m)
    return int(text.num_hidden_layers * (linear + 4 * pairs * query))


def _attention_widths(text: Any) -> tuple[int, int]:
    """Return the widths of all query heads and of all key heads."""
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
