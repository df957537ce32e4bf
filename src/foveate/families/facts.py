"""What a family says of its models: what they give to methods, and what counting costs asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModelError
from foveate.families.layout import Grid
from foveate.families.tower import encoder_layers


class Facts:
    """Facts about the models of a family; each has a default, which a family replaces where it differs."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that belong to the family."""
    inputs: ClassVar[Mapping[str, str]]
    """Model inputs that hold pixels, and the kind of span (``"image"``, ``"video"``) that each gives."""
    side_inputs: ClassVar[tuple[str, ...]] = ()
    """Further inputs that only the encoder reads."""
    notes: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Model types that might be taken for the family's, and why they are not."""
    keeps_positions: ClassVar[bool] = False
    """Whether positions have several axes (M-RoPE), so that kept tokens can only keep those of the full prompt."""
    axes: ClassVar[int] = 3
    """How many axes such positions have."""
    has_cls: ClassVar[bool] = False
    """Whether the vision encoder has a ``[CLS]`` token."""
    has_attention: ClassVar[bool] = True
    """Whether the attention layers of the vision encoder can be read."""
    has_grid: ClassVar[bool] = True
    """Whether the rows and columns of tokens are known."""
    resizes: ClassVar[bool] = False
    """Whether smaller pictures can be encoded, as methods of the stage ``"pixels"`` ask for."""
    reduces_inside: ClassVar[bool] = False
    """Whether methods can act inside the vision encoder, see `Family.encode_inside`."""
    projects_kept: ClassVar[bool] = False
    """Whether tokens are dropped before the projector, so that it maps the kept ones alone."""
    opaque: ClassVar[bool] = False
    """Whether only the model's own encoder tells what an image comes to and costs, its projector included."""
    packs_pictures: ClassVar[bool] = False
    """Whether the encoder attends to all pictures of a batch as one sequence, under a mask."""
    frames_are_images: ClassVar[bool] = False
    """Whether the frames of a video are images of a single crop each."""
    answer_type: ClassVar[int] = 0
    """What the ``token_type_ids`` of an answer's tokens are, where the model has these."""
    takes_compressor: ClassVar[bool] = False
    """Whether a trained compressor can stand in for the projector, which maps patches of a fixed grid one by one."""
    recurrent: ClassVar[bool] = False
    """Whether some layers of the LLM are convolutions or recurrent ones."""
    two_way: ClassVar[bool] = False
    """Whether the tokens of an image see each other in the LLM in both directions."""
    packs: ClassVar[bool] = True
    """Whether `transformers` keeps the prompts of a packed row apart."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of spans that the family reduces."""
        return tuple(dict.fromkeys(self.inputs.values()))

    @property
    def takes_videos(self) -> bool:
        """Whether the models see videos, be it as spans of their own or frame by frame."""
        return "video" in self.kinds or self.frames_are_images

    def encoder(self, model: Any) -> nn.Module | None:
        """Return the vision encoder whose layers are read and counted; `None` if it is no stack of such layers."""
        return None

    def layers(self, model: Any) -> nn.ModuleList:
        """Return the layers of the vision encoder."""
        encoder = self.encoder(model)
        if encoder is None:
            raise UnsupportedModelError(
                f"the vision encoder of {self.name} has no attention to read: use a method that needs only token "
                "features, such as 'divprune', 'uniform' or 'random'"
            )
        return encoder_layers(encoder)

    def lead(self, model: Any) -> int:
        """Return how many tokens stand before the patches of a picture in the encoder, such as ``[CLS]``."""
        return 0

    def read_layer(self, model: Any) -> int:
        """Return the index of the last encoder layer whose output the projector reads."""
        return len(self.layers(model)) - 1

    def features_read(self, model: Any) -> int:
        """Return of how many encoder layers the projector reads the features, side by side."""
        return 1

    def whole_layers(self, model: Any) -> Sequence[int] | None:
        """Return which encoder layers attend to whole pictures, where others attend within windows; else `None`."""
        return None

    def window(self, model: Any) -> int:
        """Return how many patches the windows are high and wide in which encoder layers attend; 0 without windows."""
        return 0

    def patches_per_row(self, model: Any) -> int:
        """Return how many patches are merged before the projector, to one row of it."""
        return 1

    def tokens_of(self, model: Any, patches: Grid) -> Grid:
        """Return the rows and columns of tokens that a picture's rows and columns of patches make."""
        block = math.isqrt(self.patches_per_row(model))
        return patches[0] // block, patches[1] // block

    def pooled_side(self, model: Any, kind: str) -> int:
        """Return how many rows are pooled to a row of tokens, beside those that merge before the projector."""
        return 1

    def steps(self, model: Any, frames: int) -> int:
        """Return how many crops the frames of a video make."""
        return frames

    def patch_size(self, model: Any) -> Grid:
        """Return the height and width of a patch in pixels."""
        return _pair(model.config.vision_config.patch_size)

    def picture_grid(self, model: Any) -> Grid | None:
        """Return the rows and columns of patches of every picture; `None` if the encoder takes any size."""
        (height, width), (h, w) = _pair(model.config.vision_config.image_size), self.patch_size(model)
        return height // h, width // w

    def patch_grids(self, model: Any, inputs: Mapping[str, Any], key: str) -> list[Grid]:
        """Return the rows and columns of patches of all that goes through the encoder by itself, of one input."""
        shape, (h, w) = tuple(inputs[key].shape), self.patch_size(model)
        return [(shape[-2] // h, shape[-1] // w)] * math.prod(shape[:-3])

    def padded_patches(self, inputs: Mapping[str, Any]) -> int:
        """Return the patches to which the encoder pads every picture; 0 if it does not."""
        return 0

    def run_encoder(self, model: Any, pixels: Tensor, **side: Any) -> Any:
        """Run an encoder that is no stack of layers, without the projector unless the family is `opaque`."""
        return model.model.vision_tower(pixels, **side)

    def blank_pictures(self, model: Any, *shape: int) -> Tensor:
        """Make pixels without values, ``[*shape, 3, height, width]``, of the one size that the encoder takes."""
        grid, (h, w) = self.picture_grid(model), self.patch_size(model)
        assert grid is not None
        return torch.empty(*shape, 3, grid[0] * h, grid[1] * w, device="meta")


def _pair(size: Any) -> Grid:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
