"""What the class and the configuration of a model tell: whether the generic family can take it, and if not, why."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Final

REFUSED: Final[Mapping[str, str]] = {
    "granite4_vision": "adds planes of several encoder layers to its LLM (DeepStack)",
    "granite_docling": "adds planes of several encoder layers to its LLM (DeepStack)",
    "llama4": "projects encoded images itself, and fails without foveate in transformers 5.24",
}
"""What models of some types do that the generic family cannot follow, though they have all that it asks for."""


def refusal(model_class: type, config: Any) -> str | None:
    """Say why the generic family cannot take models of a class with a configuration, or return `None` if it can."""
    if lacking := missing(model_class):
        return f"lacks {lacking}"
    if reason := REFUSED.get(getattr(config, "model_type", "")):
        return reason
    # Qwen4: whatever is dropped, text behind it would belong to other n-grams.
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "ple_layer_ids", None):
        return "embeds n-grams of its prompts, which reach across dropped tokens"
    return None if getattr(config, "image_token_id", None) is not None else "lacks image_token_id in its configuration"


def missing(model_class: type) -> str | None:
    """Say what a class of models lacks for the generic family, or return `None` if it lacks nothing."""
    if not hasattr(model_class, "generate"):
        return "a language-model head"
    if not any(hasattr(owner, "get_image_features") for owner in (model_class, inner_class(model_class))):
        return "a method get_image_features"
    if "mm_encoder_outputs" not in inspect.signature(model_class.forward).parameters:  # type: ignore[attr-defined]
        return "mm_encoder_outputs among the arguments of forward"
    pixels = inspect.signature(model_class.generate).parameters.get("pixel_values")
    if pixels is not None and pixels.default is pixels.empty:
        return "a generate that takes images that are encoded"
    return None


def inner_class(model_class: type) -> type | None:
    """Return the class of the model inside one with a head, which transformers names alike."""
    module = sys.modules.get(model_class.__module__)
    name = model_class.__name__.replace("ForConditionalGeneration", "Model")
    found = getattr(module, name, None)
    return found if isinstance(found, type) else None


def owner_of(model: Any, method: str) -> Any:
    """Return the model, or the one inside it, which has a method; not every class hands those inside it up."""
    return model if hasattr(model, method) else model.model
