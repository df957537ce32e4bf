"""Methods, one file each; importing this package registers them."""

from foveate.methods.agilepruner import AgilePruner
from foveate.methods.cdpruner import CDPruner
from foveate.methods.chain import Chain
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
from foveate.methods.gaze import Gaze, GazeQuery
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
from foveate.methods.sparsevlm import SparseVLM, SparseVLMPlus
from foveate.methods.text_interaction import TextInteraction, TextInteractionImage, TextInteractionLLM
from foveate.methods.todre import ToDRE, ToDREAll, ToDREExit
from foveate.methods.tome import ToMe
from foveate.methods.tops import TOPS
from foveate.methods.topv import TopV
from foveate.methods.uniform import Uniform
from foveate.methods.vflowopt import VFlowOpt
from foveate.methods.vflowopt_stages import VFlowOptAll, VFlowOptLlm
from foveate.methods.visiondrop import VisionDrop, VisionDropAll, VisionDropLlm
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
    "Chain",
    "CodebookPruner",
    "DivPrune",
    "Downsample",
    "DyVTE",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "GPrune",
    "Gaze",
    "GazeQuery",
    "HiPrune",
    "HoloV",
    "MMTok",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "SparseVLMPlus",
    "TextInteraction",
    "TextInteractionImage",
    "TextInteractionLLM",
    "ToDRE",
    "ToDREAll",
    "ToDREExit",
    "ToMe",
    "TopV",
    "Uniform",
    "VFlowOpt",
    "VFlowOptAll",
    "VFlowOptLlm",
    "VisPruner",
    "VisionDrop",
    "VisionDropAll",
    "VisionDropLlm",
    "VisionZip",
    "VisualExit",
]
