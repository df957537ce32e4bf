"""What the tiny models of Qwen-VL and its relatives share."""

import torch

from tiny_families.base import IMAGE, VIDEO, Tiny, picture, text_shape

START, END, STAMP = 111, 112, 113
"""Markers around an image, and text between the frames of a video."""
PATCH, MERGE = 4, 2


class TinyMRope(Tiny):
    """A picture or video is known by its kind and its grid of tokens ``(t, h, w)``."""

    visuals = (("image", 1, 6, 4), ("video", 2, 4, 5), ("image", 1, 3, 8))
    type_plane = "mm_token_type_ids"
    whole_grid = None  # nothing is ever cut
    positions = ("original",)

    def place(self, what, generator):
        kind, t, h, w = what
        pixels = picture(generator, t * h * w * MERGE**2, 3 * 2 * PATCH**2)
        suffix = "_videos" if kind == "video" else ""
        return {
            "ids": self.ids(kind, t, h * w),
            f"pixel_values{suffix}": [pixels],
            f"{kind}_grid_thw": [torch.tensor([[t, h * MERGE, w * MERGE]])],
        }

    def ids(self, kind, frames, size):
        return [START, *[VIDEO if kind == "video" else IMAGE] * (frames * size), END]

    def position_ids(self, net, inputs):
        ids = inputs["input_ids"]
        side = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        given = {key: inputs[key] for key in side if key in inputs}
        return net.model.get_rope_index(ids, mm_token_type_ids=self.types(ids), **given)[0]


def films(name):
    """Make two prompts with videos alone: GLM takes no images beside them."""
    from tiny import Visual, sample

    film = Visual(name, ("video", 3, 2, 4))
    return [sample(3, film, 4, seed=1), sample(1, Visual(name, ("video", 2, 3, 3)), 2, film, 5, seed=2)]


def mrope_text(**changes):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return text_shape(rope_parameters=rope, **changes)
