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
from foveate.projectors.c_abstractor import CAbstractor
from foveate.projectors.ldp import LdpV2
from foveate.projectors.mqt import Mqt
from foveate.projectors.pooling import M3, AveragePool
from foveate.projectors.quecc import QueCC
from foveate.projectors.resampler import Resampler
from foveate.projectors.shuffle import PixelShuffle
from foveate.projectors.tokenpacker import TokenPacker
from foveate.projectors.wico import WiCo

__all__ = [
    "M3",
    "AveragePool",
    "CAbstractor",
    "Compressor",
    "LdpV2",
    "Mqt",
    "PixelShuffle",
    "Projector",
    "QueCC",
    "Resampler",
    "Retrofit",
    "Sizes",
    "TokenPacker",
    "WiCo",
    "get_projector",
    "list_projectors",
    "projector_from_dict",
    "register_projector",
]
