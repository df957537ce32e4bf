"""LLaVA-1.5: CLIP tower, one crop of a fixed grid per image, a projector that maps each token by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.encoder import EncoderReducer
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Probe
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Family, Process, Size
from foveate.families.batches import placeholder_columns
from foveate.families.compressed import compressed, installed_in
from foveate.families.layout import Grid, Layout, frames_layout
from foveate.families.thinning import run_tower_inside
from foveate.families.tower import feature_indices, resized_crops, run_tower, token_planes, with_cls


class Llava(Family):
    """LLaVA-1.5 and models that share its classes, such as BakLLaVA and the embedded `nano`.

    The tower is CLIP's, or SigLIP's, which has no ``[CLS]`` token.
    """

    name = "llava"
    model_types = ("llava",)
    inputs: ClassVar = {"pixel_values": "image"}
    side_inputs = ("image_sizes",)
    has_cls = True
    resizes = True
    notes = "one grid per image; pruned between the vision tower and the projector"
    reduces_inside = True
    projects_kept = True
    takes_compressor = True

    def matches(self, config: Any) -> bool:
        return super().matches(config) and config.vision_config.model_type != "pixtral"

    def of(self, model: Any) -> Family:
        installed = installed_in(model)
        return self if installed is None else compressed(self, installed)

    def cls(self, model: Any) -> bool:
        """Return whether the tower puts a ``[CLS]`` token before the patches."""
        tower = model.config.vision_config.model_type
        if "clip" not in tower and "siglip" not in tower:
            raise UnsupportedModelError(
                f"{self.name} is supported with vision towers of CLIP, SigLIP and Pixtral, not with {tower!r}"
            )
        return "siglip" not in tower

    def projects_cls(self, model: Any, inputs: Mapping[str, Any]) -> bool:
        """Return whether the projector reads the ``[CLS]`` token too."""
        cls, full = self.cls(model), strategy(model, inputs) == "full"
        if not cls and not full:
            raise UnsupportedModelError(
                "vision_feature_select_strategy='default' drops the first token, and this vision tower has no [CLS] "
                "token there: use 'full'"
            )
        return cls and full

    def feature_layers(self, model: Any, inputs: Mapping[str, Any]) -> list[int]:
        """Return the indices of the hidden states that the projector reads."""
        return feature_layers(model, inputs)

    def final(self, model: Any) -> nn.Module | None:
        """Return the norm behind the tower's last layer, if the projector reads what is behind it."""
        return None

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def lead(self, model: Any) -> int:
        return int(self.cls(model))

    def read_layer(self, model: Any) -> int:
        return max(feature_indices(self.layers(model), self.feature_layers(model, {})))

    def features_read(self, model: Any) -> int:
        return len(self.feature_layers(model, {}))

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = {"pixel_values": self.blank_pictures(model, images)}
        grid, lead = patch_grid(model, inputs["pixel_values"]), int(self.projects_cls(model, {}))
        return [frames_layout(grid, 1, lead)] * images, inputs

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        pixels, ids = inputs["pixel_values"], inputs["input_ids"].cpu()
        grid = patch_grid(model, pixels)
        lead = int(self.projects_cls(model, inputs))
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
        pixels, layers = self.pixels(model, inputs), self.feature_layers(model, inputs)
        seen = run_tower(model.model.vision_tower, pixels, layers, self.cls(model), probes, final=self.final(model))
        return self.tokens(model, inputs, spans, probes, *seen)

    def encode_inside(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: EncoderReducer
    ) -> VisualTokens:
        pixels, layers, lead = self.pixels(model, inputs), self.feature_layers(model, inputs), int(self.cls(model))
        grid = patch_grid(model, pixels)
        features, values = run_tower_inside(model.model.vision_tower, pixels, layers, lead, grid, spans, reducer)
        if (final := self.final(model)) is not None:
            features = final(features)
        return self.tokens(model, inputs, spans, (), features, values)

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
        """Put features ``[R, S, C]`` and probe values of the vision tower's rows in the order of the spans."""
        grid, cls = patch_grid(model, inputs["pixel_values"]), self.cls(model)
        patches = features[:, int(cls) :]
        planes = token_planes([c for s in spans for c in s.crops], grid, patches, values)
        hidden = features if self.projects_cls(model, inputs) else patches
        tokens = VisualTokens(tuple(spans), planes, features.device, list(hidden))
        if cls:
            tokens = with_cls(tokens, features[:, 0], probes)
        return self.with_embeddings(model, tokens, probes)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        patch = model.config.vision_config.patch_size
        layers, cls, final = self.feature_layers(model, inputs), self.cls(model), self.final(model)
        pixels = self.pixels(model, inputs)
        return [
            resized_crops(model.model.vision_tower, pixels, span.crops, sizes, patch, layers, cls, final)
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
