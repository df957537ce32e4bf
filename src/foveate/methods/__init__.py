"""Methods, one file each; importing this package registers them."""

from foveate.methods.agilepruner import AgilePruner
from foveate.methods.cdpruner import CDPruner
from foveate.methods.codebook import CodebookPruner
from foveate.methods.dart import DART
from foveate.methods.divprune import DivPrune
from foveate.methods.downsample import Downsample
from foveate.methods.dyvte import DyVTE, VisualExit
from foveate.methods.evs import EVS
from foveate.methods.fastervlm import FasterVLM
from foveate.methods.fastv import FastV
from foveate.methods.flowcut import FlowCut
from foveate.methods.fsr import FSR
from foveate.methods.gprune import GPrune
from foveate.methods.hiprune import HiPrune
from foveate.methods.holov import HoloV
from foveate.methods.mmr import MMR
from foveate.methods.mmtok import MMTok
from foveate.methods.pool import Pool
from foveate.methods.prumerge import PruMerge, PruMergePlus
from foveate.methods.prunesid import PruneSID
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.random import Random
from foveate.methods.scope import SCOPE
from foveate.methods.sgl import SGL
from foveate.methods.todre import ToDRE
from foveate.methods.tome import ToMe
from foveate.methods.tops import TOPS
from foveate.methods.uniform import Uniform
from foveate.methods.vflowopt import VFlowOpt
from foveate.methods.visiondrop import VisionDrop
from foveate.methods.visionzip import VisionZip
from foveate.methods.vispruner import VisPruner
from foveate.methods.vtc_cls import VTCCLS

__all__ = [
    "DART",
    "EVS",
    "FSR",
    "MMR",
    "SCOPE",
    "SGL",
    "TOPS",
    "VTCCLS",
    "AgilePruner",
    "CDPruner",
    "CodebookPruner",
    "DivPrune",
    "Downsample",
    "DyVTE",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "GPrune",
    "HiPrune",
    "HoloV",
    "MMTok",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "ToDRE",
    "ToMe",
    "Uniform",
    "VFlowOpt",
    "VisPruner",
    "VisionDrop",
    "VisionZip",
    "VisualExit",
]
