"""PerceptionLM: pictures of an overview and two tiles, videos of two frames; CLIP stands in for the tower of timm."""

from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO, Tiny, clip_config, llama_config, picture

FRAMES, TILES = 2, 3


class TinyPerceptionLM(Tiny):
    name = "perception_lm"
    visuals = ("video", "image", "video")
    whole_grid = (4, 4)

    def build(self):
        return PerceptionLMForConditionalGeneration(
            PerceptionLMConfig(
                vision_config=clip_config(model_args={"embed_dim": 32}), text_config=llama_config(),
                image_token_id=IMAGE, video_token_id=VIDEO, projector_pooling_ratio=2,
            )
        )  # fmt: skip

    def place(self, what, generator):
        if what == "video":
            pixels = picture(generator, 1, FRAMES, 3, 32, 32)
            return {"ids": [VIDEO] * FRAMES * 16, "pixel_values_videos": [pixels]}
        return {"ids": [IMAGE] * TILES * 16, "pixel_values": [picture(generator, 1, TILES, 3, 32, 32)]}


TINY = TinyPerceptionLM()
