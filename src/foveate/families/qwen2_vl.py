"""Qwen2-VL."""

from foveate.families.mrope import MRopeFamily


class Qwen2Vl(MRopeFamily):
    """Qwen2-VL: full attention within each picture or temporal step, and a merger of 2 x 2 patches."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "cosmos3_edge")
    notes = "temporal steps of a video are crops; pruned behind the merger; positions are always the original ones"
