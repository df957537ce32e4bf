"""Video-LLaVA: one tower for images, one for the frames of videos, which keep their ``[CLS]`` token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.encoder import EncoderReducer
from foveate.core.probes import ClsToken, Probe
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Family, Process, Size
from foveate.families.batches import joined_outputs, placeholder_columns
from foveate.families.layout import Grid, Layout, frames_layout
from foveate.families.llava import feature_layers, patch_grid, strategy
from foveate.families.thinning import run_tower_inside
from foveate.families.tower import feature_indices, resized_crops, run_tower, token_planes


class VideoLlava(Family):
    """Video-LLaVA: every frame is a crop; the ``[CLS]`` token of each frame is a separator."""

    name = "video_llava"
    model_types = ("video_llava",)
    # Older versions of transformers call the images of this model pixel_values_images.
    inputs: ClassVar = {"pixel_values": "image", "pixel_values_images": "image", "pixel_values_videos": "video"}
    has_cls = True
    resizes = True
    reduces_inside = True
    projects_kept = True
    notes = "frames are crops; each frame's [CLS] token follows `separators`"

    def encoder(self, model: Any) -> nn.Module:
        return model.model.image_tower  # type: ignore[no-any-return]  # the tower of videos is its twin

    def lead(self, model: Any) -> int:
        return 1

    def read_layer(self, model: Any) -> int:
        return max(feature_indices(self.layers(model), feature_layers(model, {})))

    def features_read(self, model: Any) -> int:
        return len(feature_layers(model, {}))

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = {"pixel_values": self.blank_pictures(model, images)}
        grid, lead = patch_grid(model, inputs["pixel_values"]), int(strategy(model, {}) == "full")
        return [frames_layout(grid, 1, lead)] * images, inputs

    def imagined_video(self, model: Any, frames: int, process: Process) -> tuple[list[Layout], dict[str, Any]]:
        inputs = {"pixel_values_videos": self.blank_pictures(model, 1, frames)}
        return [frames_layout(patch_grid(model, inputs["pixel_values_videos"]), frames, 1)], inputs

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        found: list[tuple[int, int, str, Tensor, int, Grid, int]] = []
        ids = inputs["input_ids"].cpu()
        for key, kind in self.inputs.items():
            pixels = inputs.get(key)
            if pixels is None:
                continue
            grid, frames = patch_grid(model, pixels), pixels.shape[1] if kind == "video" else 1
            # The model keeps the [CLS] token of every frame, whatever the strategy.
            lead = int(kind == "video" or strategy(model, inputs) == "full")
            lengths = [frames * (grid[0] * grid[1] + lead)] * len(pixels)
            token = getattr(model.config, f"{kind}_token_id")
            for i, (row, columns) in enumerate(placeholder_columns(ids, token, lengths, kind)):
                found.append((row, int(columns[0]), kind, columns, i * frames, grid, frames))
        spans: list[Span] = []
        for row, _, kind, columns, first, grid, frames in sorted(found, key=lambda f: f[:2]):
            size = len(columns) // frames
            lead = size - grid[0] * grid[1]
            crops = tuple(
                Crop(torch.arange(f * size + lead, (f + 1) * size), grid, encoder_row=first + f) for f in range(frames)
            )
            extents = tuple((f * size + lead, (f + 1) * size) for f in range(frames) if lead)
            ordinal = sum(s.sample == row for s in spans)
            spans.append(Span(kind, row, ordinal, columns, (frames, *grid), crops, extents))
        return tuple(spans)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        layers = feature_layers(model, inputs)
        seen = {
            kind: run_tower(tower, pixels, layers, True, probes)
            for kind, (tower, pixels) in self._towers(model, inputs).items()
        }
        return self._tokens(model, spans, probes, seen)

    def encode_inside(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: EncoderReducer
    ) -> VisualTokens:
        layers, seen = feature_layers(model, inputs), {}
        for kind, (tower, pixels) in self._towers(model, inputs).items():
            own = [span for span in spans if span.kind == kind]
            seen[kind] = run_tower_inside(tower, pixels, layers, 1, patch_grid(model, pixels), own, reducer)
        return self._tokens(model, spans, (), seen)

    def _tokens(
        self,
        model: Any,
        spans: Sequence[Span],
        probes: Sequence[Probe],
        seen: Mapping[str, tuple[Tensor, Mapping[Probe, Tensor]]],
    ) -> VisualTokens:
        planes: dict[Probe, list[Tensor]] = {}
        hidden = []
        for span in spans:
            x, values = seen[span.kind]
            for probe, parts in token_planes(span.crops, span.grid[1:], x[:, 1:], values).items():
                planes.setdefault(probe, []).extend(parts)
            rows = x[[crop.encoder_row for crop in span.crops]]
            hidden.append((rows if len(span.separators()) else rows[:, 1:]).flatten(0, 1))
            if ClsToken() in probes:
                hidden[-1] = torch.cat([hidden[-1], rows[:, 0]])
        tokens = VisualTokens(tuple(spans), planes, hidden[0].device, hidden, cls=ClsToken() in probes)
        return self.with_embeddings(model, tokens, probes)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        towers, layers = self._towers(model, inputs), feature_layers(model, inputs)
        patch = model.config.vision_config.patch_size
        return [
            resized_crops(*towers[span.kind], span.crops, sizes, patch, layers)
            for span, sizes in zip(spans, grids, strict=True)
        ]

    def project(self, model: Any, features: Tensor) -> Tensor:
        return model.model.multi_modal_projector(features)  # type: ignore[no-any-return]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)

    def _towers(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Tensor]]:
        towers = {}
        for key, kind in self.inputs.items():
            if inputs.get(key) is not None:
                pixels = inputs[key].flatten(0, 1) if kind == "video" else inputs[key]
                towers[kind] = (getattr(model.model, f"{kind}_tower"), pixels)
        return towers
