"""Qwen3.5: three of four LLM layers are recurrent, and an LLM without DeepStack."""

from foveate.families.mrope import MRopeFamily


class Qwen3_5(MRopeFamily):  # noqa: N801  the model's own name
    """Qwen3.5 and its mixture of experts: dropped tokens never enter the state of the recurrent layers."""

    recurrent = True
    packs = False
    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    notes = "as qwen2_vl; timestamps between frames stay; recurrent layers never see dropped tokens"
