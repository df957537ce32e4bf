"""SmolVLM and SmolVLM2: built as Idefics3 is."""

from __future__ import annotations

from foveate.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """SmolVLM. The frames of a video come as pictures of one crop each, between time stamps."""

    name = "smolvlm"
    model_types = ("smolvlm",)
