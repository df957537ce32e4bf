"""Trained compressors: projectors that give the LLM fewer tokens than the vision encoder has patches."""

from foveate.projectors.base import (
    Compressor,
    Projector,
    Retrofit,
    Sizes,
    get_projector,
    list_projectors,
    projector_from_dict,
    register_projector,
)
from foveate.projectors.ldp import LdpV2
from foveate.projectors.pooling import M3, AveragePool
from foveate.projectors.shuffle import PixelShuffle
from foveate.projectors.tokenpacker import TokenPacker

__all__ = [
    "M3",
    "AveragePool",
    "Compressor",
    "LdpV2",
    "PixelShuffle",
    "Projector",
    "Retrofit",
    "Sizes",
    "TokenPacker",
    "get_projector",
    "list_projectors",
    "projector_from_dict",
    "register_projector",
]
