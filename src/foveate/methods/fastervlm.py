"""FasterVLM: the tokens with the most ``[CLS]`` attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.author import CropBatch, CropReducer, probes, ranking, register


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(CropReducer):
    """FasterVLM (arXiv 2412.01818 v1), the predecessor of VisPruner: equal to ``VisPruner(important_ratio=1)``.

    Parameters
    ----------
    keep
        The budget.

    Notes
    -----
    Deviations from the paper: encoders without ``[CLS]`` use the attention that each token receives.
    """

    needs = (probes.Attention(),)
    paper = "arXiv:2412.01818v1"
    complexity = "O(N log N)"

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        return ranking.top(crops.probe(probes.Attention()), count)
