"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT, and videos whose frames are pooled before the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.probes import Probe
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Process
from foveate.families.batches import in_reading_order, interleaved, placeholder_columns
from foveate.families.layout import Grid, Layout, frames_layout
from foveate.families.llava import feature_layers
from foveate.families.llava_next import LlavaNext
from foveate.families.merged import mean_of_blocks
from foveate.families.mosaic import side_of
from foveate.families.tower import resized_crops, run_tower, token_planes, with_cls


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: every frame is a crop of pooled tokens, which are pruned between pooling and projector."""

    name = "llava_next_video"
    reduces_inside = False
    model_types = ("llava_next_video",)
    inputs: ClassVar = {"pixel_values": "image", "pixel_values_videos": "video"}
    notes = "pictures as in llava_next; each frame of a video is a crop of pooled tokens"

    def side_inputs_of(self, kind: str) -> tuple[str, ...]:
        return self.side_inputs if kind == "image" else ()

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        spans = [] if inputs.get("pixel_values") is None else list(super().spans(model, inputs))
        if inputs.get("pixel_values_videos") is not None:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            side = side_of(model) // model.config.spatial_pool_stride
            size, ids = side * side, inputs["input_ids"].cpu()
            lengths = [frames * size] * videos
            placed = placeholder_columns(ids, model.config.video_token_id, lengths, "video")
            for i, (sample, columns) in enumerate(placed):
                crops = tuple(
                    Crop(torch.arange(f * size, (f + 1) * size), (side, side), encoder_row=i * frames + f)
                    for f in range(frames)
                )
                spans.append(Span("video", sample, 0, columns, (frames, side, side), crops))
        return in_reading_order(spans)

    def pooled_side(self, model: Any, kind: str) -> int:
        return int(model.config.spatial_pool_stride) if kind == "video" else 1

    def imagined_video(self, model: Any, frames: int, process: Process) -> tuple[list[Layout], dict[str, Any]]:
        side = side_of(model) // self.pooled_side(model, "video")
        return [frames_layout((side, side), frames)], {"pixel_values_videos": self.blank_pictures(model, 1, frames)}

    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        tokens = {}
        if images := [span for span in spans if span.kind == "image"]:
            tokens["image"] = super().encode(model, inputs, images, probes)
        if videos := [span for span in spans if span.kind == "video"]:
            tokens["video"] = self._encode_frames(model, inputs, videos, probes)
        return interleaved(spans, tokens)

    def _encode_frames(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        frames = inputs["pixel_values_videos"].flatten(0, 1)
        features, values = run_tower(model.model.vision_tower, frames, feature_layers(model, inputs), True, probes)
        side, stride = side_of(model), model.config.spatial_pool_stride
        pooled = _pool(model, features[:, 1:], (side, side))
        values = {probe: _mean(x, side, stride) for probe, x in values.items()}
        planes = token_planes([c for s in spans for c in s.crops], spans[0].grid[1:], pooled, values)
        hidden = [pooled[[crop.encoder_row for crop in span.crops]].flatten(0, 1) for span in spans]
        tokens = VisualTokens(tuple(spans), planes, features.device, hidden)
        return self.with_embeddings(model, with_cls(tokens, features[:, 0], probes), probes)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        pictures = [(s, sizes) for s, sizes in zip(spans, grids, strict=True) if s.kind == "image"]
        parts = iter(super().encode_at(model, inputs, *zip(*pictures, strict=True)) if pictures else ())
        stride = model.config.spatial_pool_stride
        patch, layers = model.config.vision_config.patch_size * stride, feature_layers(model, inputs)
        results: list[list[Tensor]] = []
        for span, sizes in zip(spans, grids, strict=True):
            if span.kind == "image":
                results.append(next(parts))
                continue
            frames = inputs["pixel_values_videos"].flatten(0, 1)
            features = resized_crops(model.model.vision_tower, frames, span.crops, sizes, patch, layers)
            results.append([
                _pool(model, x[None], (h * stride, w * stride))[0] for x, (h, w) in zip(features, sizes, strict=True)
            ])  # fmt: skip
        return results

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        outputs = {}
        for kind in dict.fromkeys(span.kind for span in spans):
            rows = [x for x, span in zip(embeds, spans, strict=True) if span.kind == kind]
            outputs[kind] = BaseModelOutputWithPooling(pooler_output=rows)
        return outputs


def _pool(model: Any, features: Tensor, grid: Grid) -> Tensor:
    """Pool features ``[R, h * w, C]`` of a grid ``(h, w)`` as the model does, which knows square grids alone."""
    pooled = model.model.vision_resampler.pool(features.transpose(1, 2).reshape(*features.shape[::2], *grid))
    return pooled.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def _mean(values: Tensor, side: int, stride: int) -> Tensor:
    """Average values ``[R, side * side, ...]`` over the windows of the pooling, which leaves an odd border out."""
    inside = side // stride * stride
    whole = values.reshape(len(values), side, side, *values.shape[2:])[:, :inside, :inside].flatten(1, 2)
    return mean_of_blocks(whole, (inside, inside), stride)
