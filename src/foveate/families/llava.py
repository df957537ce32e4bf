"""LLaVA-1.5: CLIP tower, one crop of a fixed grid per image, a projector that maps each token by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.encoder import EncoderReducer
from foveate.families.base import Family, Grid, placeholder_columns, resized_crops, run_tower, token_planes, with_cls
from foveate.families.inside import run_tower_inside
from foveate.probes import Probe
from foveate.tokens import Crop, Span, VisualTokens


class Llava(Family):
    """LLaVA-1.5 and models that share its classes, such as BakLLaVA and the embedded `nano`."""

    name = "llava"
    model_types = ("llava",)
    inputs: ClassVar = {"pixel_values": "image"}
    side_inputs = ("image_sizes",)
    has_cls = True
    resizes = True
    notes = "one grid per image; pruned between the vision tower and the projector"
    reduces_inside = True

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        pixels, ids = inputs["pixel_values"], inputs["input_ids"].cpu()
        grid = patch_grid(model, pixels)
        lead = int(strategy(model, inputs) == "full")
        lengths = [grid[0] * grid[1] + lead] * len(pixels)
        spans: list[Span] = []
        for image, (row, columns) in enumerate(placeholder_columns(ids, model.config.image_token_id, lengths, "image")):
            crop = Crop(torch.arange(lead, lengths[image]), grid, encoder_row=image)
            extents = ((1, lengths[image]),) * lead
            ordinal = sum(s.sample == row for s in spans)
            spans.append(Span("image", row, ordinal, columns, (1, *grid), (crop,), extents))
        return tuple(spans)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        pixels, layers = self.pixels(model, inputs), feature_layers(model, inputs)
        seen = run_tower(model.model.vision_tower, pixels, layers, True, probes)
        return self.tokens(model, inputs, spans, probes, *seen)

    def encode_inside(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: EncoderReducer
    ) -> VisualTokens:
        pixels, layers = self.pixels(model, inputs), feature_layers(model, inputs)
        grid = patch_grid(model, pixels)
        seen = run_tower_inside(model.model.vision_tower, pixels, layers, 1, grid, spans, reducer)
        return self.tokens(model, inputs, spans, (), *seen)

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the vision tower sees, ``[R, 3, height, width]``."""
        return inputs["pixel_values"]  # type: ignore[no-any-return]

    def tokens(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        spans: Sequence[Span],
        probes: Sequence[Probe],
        features: Tensor,
        values: Mapping[Probe, Tensor],
    ) -> VisualTokens:
        """Put features ``[R, 1 + N, C]`` and probe values of the vision tower's rows in the order of the spans."""
        grid = patch_grid(model, inputs["pixel_values"])
        planes = token_planes([c for s in spans for c in s.crops], grid, features[:, 1:], values)
        hidden = features if strategy(model, inputs) == "full" else features[:, 1:]
        tokens = VisualTokens(tuple(spans), planes, features.device, list(hidden))
        return self.with_embeddings(model, with_cls(tokens, features[:, 0], probes), probes)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        patch = model.config.vision_config.patch_size
        layers, pixels = feature_layers(model, inputs), inputs["pixel_values"]
        return [
            resized_crops(model.model.vision_tower, pixels, span.crops, sizes, patch, layers)
            for span, sizes in zip(spans, grids, strict=True)
        ]

    def project(self, model: Any, features: Tensor) -> Tensor:
        return model.model.multi_modal_projector(features)  # type: ignore[no-any-return]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=list(embeds))}


def patch_grid(model: Any, pixels: Tensor) -> Grid:
    """Return rows and columns of patches for pixels ``[..., height, width]``."""
    patch = model.config.vision_config.patch_size
    return pixels.shape[-2] // patch, pixels.shape[-1] // patch


def strategy(model: Any, inputs: Mapping[str, Any]) -> str:
    """Return whether the projector reads the ``[CLS]`` token (``"full"``) or not (``"default"``)."""
    # VipLLaVA has no such option: it never reads [CLS].
    configured = getattr(model.config, "vision_feature_select_strategy", "default")
    return str(inputs.get("vision_feature_select_strategy") or configured)


def feature_layers(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Return the indices of the hidden states that the projector reads."""
    # VipLLaVA's option had an s at its end before transformers 5.23.
    names = ("vision_feature_layer", "vision_feature_layers")
    given = [*map(inputs.get, names), *(getattr(model.config, name, None) for name in names)]
    layers: Any = next(x for x in given if x is not None)
    return [layers] if isinstance(layers, int) else list(layers)
