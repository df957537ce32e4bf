"""What Qwen-VL and its relatives share: flat sequences of patches, and positions along three axes (M-RoPE)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.spans import Crop, Span
from foveate.families.base import Process, Size
from foveate.families.layout import Grid, Layout
from foveate.families.merged import MergedFamily, mean_of_blocks

TYPES = {"image": 1, "video": 2}
"""What ``mm_token_type_ids`` says of the placeholders of each kind; text is 0."""


class MRopeFamily(MergedFamily):
    """Images and videos of any size as one flat sequence of patches, a square of them per token.

    Every temporal step of a video is a crop: the encoders attend within one, and budgets can be given per frame or per
    clip. Kept tokens keep the temporal, vertical and horizontal position that they have in the full prompt.
    """

    inputs: ClassVar = {"pixel_values": "image", "pixel_values_videos": "video"}
    side_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw")
    keeps_positions = True
    resizes = True
    patches_by_token: ClassVar[bool] = True
    """Whether the patches of one token follow each other in the encoder, rather than lie row by row."""

    def encoder(self, model: Any) -> nn.Module:
        return model.model.visual  # type: ignore[no-any-return]

    def patches_per_row(self, model: Any) -> int:
        return _merge(model) ** 2

    def picture_grid(self, model: Any) -> None:
        return None

    def patch_grids(self, model: Any, inputs: Mapping[str, Any], key: str) -> list[Grid]:
        return [(h, w) for t, h, w in inputs[f"{self.inputs[key]}_grid_thw"].tolist() for _ in range(t)]

    def steps(self, model: Any, frames: int) -> int:
        return -(-frames // int(getattr(model.config.vision_config, "temporal_patch_size", 1)))

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        inputs = process(images)
        return self.layouts(model, inputs, "image"), inputs

    def imagined_video(self, model: Any, frames: int, process: Process) -> tuple[list[Layout], dict[str, Any]]:
        _, height, width = process(1)["image_grid_thw"][0].tolist()  # a frame is scaled as an image would be
        grids = torch.tensor([[self.steps(model, frames), height, width]])
        inputs = {"pixel_values_videos": torch.empty(0), "video_grid_thw": grids}
        return self.layouts(model, inputs, "video"), inputs

    def side_inputs_of(self, kind: str) -> tuple[str, ...]:
        return (f"{kind}_grid_thw",)

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        layouts: list[Layout] = []
        row, merge = 0, _merge(model)
        for t, height, width in inputs[f"{kind}_grid_thw"].tolist():
            grid = (height // merge, width // merge)
            size = math.prod(grid)
            crops = tuple(Crop(torch.arange(i * size, (i + 1) * size), grid, encoder_row=row + i) for i in range(t))
            layouts.append(Layout(t * size, (t, *grid), crops))
            row += t
        return layouts

    def types(self, model: Any, ids: Tensor) -> Tensor:
        """Tell text (0), image (1) and video (2) tokens apart, ``[B, L]``."""
        return torch.stack([(ids == self.token_id(model, kind)) * TYPES[kind] for kind in self.inputs.values()]).sum(0)

    def placeholders(self, model: Any, ids: Tensor, kind: str) -> Tensor:
        return self.types(model, ids) == TYPES[kind]

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        patches, merge = values.flatten(0, 1), _merge(model)
        if self.patches_by_token:
            return patches.reshape(-1, merge**2, *patches.shape[1:]).mean(dim=1)
        grids = [(t * h, w) for t, h, w in inputs[f"{kind}_grid_thw"].tolist()]
        pictures = torch.split(patches, [math.prod(grid) for grid in grids])
        return torch.cat([mean_of_blocks(x[None], g, merge)[0] for x, g in zip(pictures, grids, strict=True)])

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        ids, keys = inputs["input_ids"], (*self.side_inputs, "attention_mask")
        side = {key: inputs[key] for key in keys if inputs.get(key) is not None}
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=self.types(model, ids), **side)
        return positions  # type: ignore[no-any-return]

    def position_deltas(self, model: Any) -> Tensor | None:
        return model.model.rope_deltas  # type: ignore[no-any-return]

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return {
            kind: self.output([x for x, span in zip(embeds, spans, strict=True) if span.kind == kind])
            for kind in dict.fromkeys(span.kind for span in spans)
        }

    def output(self, embeds: Sequence[Tensor]) -> Any:
        """Wrap the embeddings of all images (or videos) as the encoder's output."""
        return BaseModelOutputWithPooling(pooler_output=list(embeds))

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        results: list[list[Tensor]] = [[] for _ in spans]
        for key, kind in self.inputs.items():
            chosen = [i for i, span in enumerate(spans) if span.kind == kind]
            if chosen:
                wanted = [(crop, grid) for i in chosen for crop, grid in zip(spans[i].crops, grids[i], strict=True)]
                smaller = self._resized(model, inputs, key, wanted)
                layouts = [Layout(math.prod(grid), (1, *grid), ()) for _, grid in wanted]
                embeds = iter(self.rows(model, self.image_features(model, smaller, kind), layouts))
                for i in chosen:
                    results[i] = [next(embeds) for _ in spans[i].crops]
        return results

    def _resized(
        self, model: Any, inputs: Mapping[str, Any], key: str, wanted: Sequence[tuple[Crop, Grid]]
    ) -> dict[str, Tensor]:
        """Return the inputs for some crops as pictures of their own, each resized to a grid of tokens."""
        side, merge, pixels = f"{self.inputs[key]}_grid_thw", _merge(model), inputs[key]
        square, patch = merge if self.patches_by_token else 1, int(model.config.vision_config.patch_size)
        sizes = [(h, w) for t, h, w in inputs[side].tolist() for _ in range(t)]
        frames = torch.split(pixels, [h * w for h, w in sizes])
        patches = []
        for crop, (h, w) in wanted:
            shown = _picture(frames[crop.encoder_row], sizes[crop.encoder_row], square, patch)
            target = (h * merge * patch, w * merge * patch)
            small = nn.functional.interpolate(shown[None].float(), target, mode="bicubic", antialias=True)[0]
            patches.append(_patches(small, square, patch).reshape(-1, *pixels.shape[1:]))
        grids = [[1, h * merge, w * merge] for _, (h, w) in wanted]
        return {key: torch.cat(patches).to(pixels.dtype), side: inputs[side].new_tensor(grids)}


def _merge(model: Any) -> int:
    return int(model.config.vision_config.spatial_merge_size)


def _picture(patches: Tensor, grid: Grid, square: int, side: int) -> Tensor:
    """Put a picture ``[C, H, W]`` together from its patches ``[h * w, ...]``, squares of which follow each other."""
    (h, w), n = grid, square
    cut = patches.reshape(h // n, w // n, n, n, -1, side, side)
    return cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(cut.shape[4], h * side, w * side)


def _patches(picture: Tensor, square: int, side: int) -> Tensor:
    """Cut a picture ``[C, H, W]`` into patches ``[h * w, C * side * side]``, the reverse of `_picture`."""
    h, w, n = picture.shape[1] // side, picture.shape[2] // side, square
    cut = picture.reshape(-1, h // n, n, side, w // n, n, side)
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(h * w, -1)
