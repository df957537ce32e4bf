"""GLM-4.1V: placeholders of videos are those of images, between other markers."""

from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, STAMP, START, TinyMRope, mrope_text

VIDEO_START, VIDEO_END = 114, 115


class TinyGlm4v(TinyMRope):
    name = "glm4v"
    # The model itself takes either images or videos in one batch.
    visuals = (("image", 1, 6, 4), ("image", 1, 4, 6), ("image", 1, 3, 8))

    def build(self):
        vision = {
            "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "image_size": 32, "patch_size": PATCH, "spatial_merge_size": MERGE,
        }  # fmt: skip
        return Glm4vForConditionalGeneration(
            Glm4vConfig(
                vision_config=vision, text_config=mrope_text(), image_token_id=IMAGE, video_token_id=VIDEO,
                image_start_token_id=START, image_end_token_id=END, video_start_token_id=VIDEO_START,
                video_end_token_id=VIDEO_END,
            )
        )  # fmt: skip

    def ids(self, kind, frames, size):
        if kind == "image":
            return super().ids(kind, frames, size)
        frame = super().ids("image", 1, size)
        return [VIDEO_START, *[token for i in range(frames) for token in (*frame, STAMP, 50 + i)], VIDEO_END]

    def types(self, ids):
        inside = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
        return (ids == IMAGE).long() * (1 + inside.long())


TINY = TinyGlm4v()
