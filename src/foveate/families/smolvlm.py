"""SmolVLM and SmolVLM2: built as Idefics3 is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import transformers

from foveate.core.errors import InputError
from foveate.core.selection import Selection
from foveate.families.idefics3 import Idefics3

BLOCKWISE = ("5.20.1", "5.20.2")
"""Versions of transformers whose SmolVLM merges image tokens by mistake in blocks of `vision_config.patch_size`."""


class SmolVLM(Idefics3):
    """SmolVLM. The frames of a video come as pictures of one crop each, between time stamps."""

    name = "smolvlm"
    model_types = ("smolvlm",)
    frames_are_images = True

    def check_kept(self, model: Any, selection: Selection) -> None:
        if transformers.__version__ not in BLOCKWISE:
            return
        block, kept = self.patch_size(model)[0], Counter[int]()
        for chosen in selection:
            kept[chosen.sample] += len(chosen)
        if any(count % block for count in kept.values()):
            raise InputError(
                f"the prompts keep {list(kept.values())} visual tokens, but SmolVLM of transformers "
                f"{transformers.__version__} only takes multiples of {block} per prompt, which is a bug of "
                f"{' and '.join(BLOCKWISE)}: install another version, or keep a multiple of {block}"
            )
