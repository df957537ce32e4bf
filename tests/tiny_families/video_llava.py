"""Video-LLaVA: pictures and videos of two frames."""

import inspect

from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO, Tiny, clip_config, llama_config, picture

FRAMES = 2
# What this version of transformers calls the pictures.
PIXELS = next(p for p in inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters if "pixel" in p)


class TinyVideoLlava(Tiny):
    name = "video_llava"
    visuals = ("video", "image", "video")

    def build(self):
        return VideoLlavaForConditionalGeneration(
            VideoLlavaConfig(
                vision_config=clip_config(), text_config=llama_config(), image_token_id=IMAGE, video_token_id=VIDEO,
                vision_feature_layer=-2, vision_feature_select_strategy="default",
            )
        )  # fmt: skip

    def place(self, what, generator):
        if what == "video":
            return {
                "ids": [VIDEO] * FRAMES * 65,
                "pixel_values_videos": [picture(generator, 1, FRAMES, 3, 32, 32)],
            }
        return {"ids": [IMAGE] * 64, PIXELS: [picture(generator, 1, 3, 32, 32)]}


TINY = TinyVideoLlava()
