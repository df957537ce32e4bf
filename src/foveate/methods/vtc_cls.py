"""VTC-CLS: the tokens with the most ``[CLS]`` attention over several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.author import CropBatch, CropReducer, FoveateError, probes, ranking, register


@register("vtc_cls")
@dataclass(frozen=True)
class VTCCLS(CropReducer):
    """VTC-CLS (arXiv 2412.05819): the ``[CLS]`` attention of the deep layers, summed, ranks the tokens.

    Attention ``[N, layers]`` is the mean over heads of each layer; layers are not normalised against each other.

    Parameters
    ----------
    keep
        The budget T.
    start
        The first layer, as a share of the depth in [0, 1): 2 / 3 is layer 16 (from 0) of the 24 of CLIP-L. The last
        is the one whose output the projector reads, layer 22 there; 22 / 24 is that layer alone, which is FasterVLM.
        A start behind it raises `UnsupportedModelError` once the model is known.
    reduce
        How the layers are joined: ``"sum"``, ``"min"`` or ``"max"``.

    Notes
    -----
    Deviations from the paper: encoders without ``[CLS]``, which it leaves open, use the attention that each token
    receives (UNVERIFIED), and those with windows only the layers that attend to whole pictures: attention within a
    window adds up to one there. Crops and frames are ranked one by one; the official code knows a single crop.
    """

    start: float = 2 / 3
    reduce: Literal["sum", "min", "max"] = "sum"

    paper = "arXiv:2412.05819"
    complexity = "O(N log N)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.start < 1.0:
            raise FoveateError(f"start is a share of the encoder's depth from 0 up to 1, such as 2/3, not {self.start}")

    @property
    def needs(self) -> tuple[probes.Probe, ...]:
        return (probes.Attention(layers=float(self.start)),)

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        (probe,) = self.needs
        layers = crops.probe(probe).float()
        if self.reduce == "sum":
            return ranking.top(layers.sum(dim=-1), count)
        return ranking.top(layers.amin(dim=-1) if self.reduce == "min" else layers.amax(dim=-1), count)
