"""What `transformers` can do and methods inside the LLM cannot go along with: each refused with a way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from foveate.core.errors import UnsupportedModelError
from foveate.core.reducer import Positions

_STATIC = (
    "a static cache has one length for all layers, but methods inside the LLM shorten some: use the default "
    "DynamicCache"
)
_RECOMPUTES_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


def check_decoder(decoder: Any, positions: Positions) -> None:
    """Raise `UnsupportedModelError` unless all layers of an LLM attend, and tokens can be numbered as is wanted."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    # Layers of linear attention or convolution carry a state from token to token, which no dropped token leaves.
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has layers of the kinds {', '.join(sorted(strange))}, but methods inside the "
            "LLM need attention in every layer: use a method that acts before the LLM, such as vispruner"
        )
    # Learned position embeddings are added in front of the first layer, and stay.
    if positions == "compact" and not hasattr(decoder, "rotary_emb"):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has no rotary embedding to number tokens anew with: use positions='original'"
        )


def check_boundaries(decoder: Any, boundaries: Iterable[int]) -> None:
    """Raise `UnsupportedModelError` if deep layers attend to what a layer in front of a boundary keeps.

    In Gemma 3n and 4 the last layers have no keys of their own, and take those of the last layer of their kind that
    has some.
    """
    shared = getattr(decoder.config, "num_kv_shared_layers", 0) or 0
    depth = decoder.config.num_hidden_layers
    kinds = getattr(decoder.config, "layer_types", None) or [""] * depth
    sources = [max(i for i in range(depth - shared) if kinds[i] == kind) for kind in {*kinds[depth - shared :]}]
    late = [boundary for boundary in boundaries if boundary > min(sources, default=depth)]
    if shared and late:
        raise UnsupportedModelError(
            f"the last {shared} of {depth} layers of {type(decoder).__name__} attend to what layer {min(sources)} "
            f"keeps, so tokens cannot be dropped in front of layer {late[0]}: use a layer up to {min(sources)}"
        )


def check_pass(decoder: Any, cache: Any) -> None:
    """Raise `UnsupportedModelError` if an LLM, as it is set now, cannot run a pass in which tokens are dropped."""
    # Later versions recompute the layer alone; hooks, and with them what was chosen, stay outside.
    if decoder.training and getattr(decoder, "gradient_checkpointing", False) and _RECOMPUTES_HOOKS:
        raise UnsupportedModelError(
            "gradient checkpointing of this version of transformers runs the hooks of a layer twice, so a method "
            "inside the LLM would choose twice: update transformers, or switch it off"
        )
    if "flex" in str(decoder.config._attn_implementation):
        raise UnsupportedModelError(
            "masks of flex_attention cannot be cut layer by layer: load the model with attn_implementation='sdpa'"
        )
    # Mistral and others have a window in every layer, and no list of kinds.
    kinds = getattr(decoder.config, "layer_types", None) or ["sliding_attention"]
    windows = "sliding_attention" in kinds and getattr(decoder.config, "sliding_window", None) is not None
    if windows and "flash" in str(decoder.config._attn_implementation):
        raise UnsupportedModelError(
            "flash attention counts the columns of a sliding window without the dropped ones: load the model with "
            "attn_implementation='sdpa'"
        )
    for layer in getattr(cache, "layers", ()):
        if "Static" in type(layer).__name__:
            raise UnsupportedModelError(_STATIC)


def check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` if ``generate`` is asked for what methods inside the LLM cannot go along with."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        value = options.get(name)
        return getattr(config, name, None) if value is None else value

    back = "takes tokens back, but methods inside the LLM give layers caches of different lengths: leave it out"
    advice = {
        "assistant_model": f"assisted decoding {back}",
        "prompt_lookup_num_tokens": f"prompt lookup {back}",
        "prefill_chunk_size": "methods inside the LLM rank the visual tokens by the end of the prompt, which a chunk "
        "does not show: leave prefill_chunk_size out",
    }
    for name, reason in advice.items():
        if asked(name):
            raise UnsupportedModelError(reason)
    if asked("use_cache") is False:
        raise UnsupportedModelError(
            "without a cache, methods inside the LLM would choose other tokens for each one that is generated: leave "
            "use_cache on"
        )
    if "static" in str(asked("cache_implementation")):
        raise UnsupportedModelError(_STATIC)
