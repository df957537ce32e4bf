"""LLaVA-NeXT-Video: pictures of tiles, and videos of frames that are pooled from 8 x 8 to 4 x 4."""

from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO, clip_config, llama_config, picture
from tiny_families.llava_next import PINPOINTS, TinyLlavaNext

FRAMES = 3


class TinyLlavaNextVideo(TinyLlavaNext):
    name = "llava_next_video"
    packs_features = False
    visuals = ("video", (24, 64), "video")

    def build(self):
        return LlavaNextVideoForConditionalGeneration(
            LlavaNextVideoConfig(
                vision_config=clip_config(), text_config=llama_config(), image_token_index=IMAGE,
                video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
        )  # fmt: skip

    def place(self, what, generator):
        if what == "video":
            return {
                "ids": [VIDEO] * FRAMES * 16,
                "pixel_values_videos": [picture(generator, 1, FRAMES, 3, 32, 32)],
            }
        return super().place(what, generator)

    def collate(self, inputs):
        videos = {"pixel_values_videos": inputs["pixel_values_videos"]} if "pixel_values_videos" in inputs else {}
        images = {key: rows for key, rows in inputs.items() if key not in videos}
        joined = super(TinyLlavaNext, self).collate(videos)
        return joined | (super().collate(images) if images else {})


TINY = TinyLlavaNextVideo()
