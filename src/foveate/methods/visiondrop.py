"""VisionDrop: dominant and contextual tokens, chosen by what visual tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.methods.visionzip import VisionZip
from foveate.reducer import register


@register("visiondrop")
@dataclass(frozen=True)
class VisionDrop(VisionZip):
    """VisionDrop (arXiv 2506.22283, AAAI 2026), its stage 0: what it does at the output of the vision encoder.

    The rule is that of `VisionZip` with another share of contextual tokens. The stages inside the LLM, where the
    published method goes on dropping, are no part of this class: the LLM gets `keep` tokens in all of its layers. The
    paper's encoder keeps 1.5 times the number of tokens that a run has on average over the layers of the LLM.

    Parameters
    ----------
    keep
        The budget of stage 0, in which the ``[CLS]`` token counts.
    contextual_ratio
        Share of contextual tokens; 0 merges nothing. The one published stage 0 has 6 of 48, a ratio of 0.125.
    merge
        ``"add"``: the anchor plus the mean of its members, as in the official code. ``"mean"``: the mean of all.

    Notes
    -----
    Deviations from the paper: those of `VisionZip`. The share is a round choice near the published ones, which are
    12.5 to 16 % over all stages (UNVERIFIED at budgets other than 48).
    """

    contextual_ratio: float = 0.14

    paper = "arXiv:2506.22283"
