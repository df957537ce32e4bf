"""Methods, one file each; importing this package registers them."""

from foveate.methods.downsample import Downsample
from foveate.methods.fastervlm import FasterVLM
from foveate.methods.pool import Pool
from foveate.methods.random import Random
from foveate.methods.uniform import Uniform
from foveate.methods.vispruner import VisPruner

__all__ = [
    "Downsample",
    "FasterVLM",
    "Pool",
    "Random",
    "Uniform",
    "VisPruner",
]
