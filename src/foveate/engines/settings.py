"""How an engine applies a method: its parts before and inside the LLM, the positions of what is kept, separators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from foveate.core.checks import check_declarations_of
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer, of_encoder, split
from foveate.core.reducer import Method, Positions, Reducer
from foveate.core.spans import Span
from foveate.families import Family
from foveate.methods.chain import Chain
from foveate.registry import by_default, list_methods

Separators: TypeAlias = Literal["drop", "keep", "nonempty"]


def before_llm(reducer: Method) -> Reducer | Chain | None:
    """Return what of a method acts before the LLM, as one method; `None` if nothing does."""
    before, _ = split(reducer.stages())
    return (before[0] if len(before) == 1 else Chain(*before)) if before else None


def inside_llm(reducer: Method) -> tuple[InLlmReducer, ...]:
    """Return the parts of a method that act inside the LLM."""
    return split(reducer.stages())[1]


@dataclass(frozen=True)
class Settings:
    """How an engine applies a method; `make` works it out and refuses what does not go together.

    Attributes
    ----------
    reducer
        The method, which may be made of several.
    positions
        Of methods before the LLM. ``"original"``: kept tokens and the text after them keep the position ids of the full
        prompt. ``"compact"``: the prompt is numbered anew, as if the dropped tokens had never been there.
    separators
        Tokens of a reduced span that no method selects from, such as newline vectors and the ``[CLS]`` tokens of
        video frames: ``"drop"`` them (as papers count), ``"keep"`` them all, or keep the ``"nonempty"`` ones,
        which close a row that still has a token.
    inside_positions
        The same as `positions` of methods inside the LLM, where ``"compact"`` numbers the tokens anew behind each
        boundary at which some are dropped.
    rectify
        Strength of a bias on the attention to each kept token: that many times the logarithm of how many tokens it
        stands for. 0 for none; 0.5 is a good start, and 1 with `absorb`.
    absorb
        Whether embeddings of kept tokens become the means of what they stand for. It does not turn `rectify` on.
    """

    reducer: Method
    positions: Positions
    separators: Separators
    inside_positions: Positions
    rectify: float = 0.0
    absorb: bool = False

    @property
    def represents(self) -> bool:
        """Whether it matters what kept tokens stand for."""
        return self.absorb or self.rectify > 0

    @property
    def before(self) -> Reducer | Chain | None:
        """What acts before the LLM."""
        return before_llm(self.reducer)

    @property
    def inside(self) -> tuple[InLlmReducer, ...]:
        """The parts of the method that act inside the LLM."""
        return inside_llm(self.reducer)

    @property
    def judging(self) -> tuple[InLlmReducer, ...]:
        """Those parts inside the LLM that also read the vision encoder, for `InLlmReducer.prior`."""
        return tuple(r for r in self.inside if of_encoder(r))

    def leaves_alone(self, spans: Sequence[Span]) -> bool:
        """Return whether nothing is to be done before the LLM, of which the model itself can encode these spans."""
        return not self.judging and (self.before is None or self.before.keeps_all(spans))

    @classmethod
    def make(
        cls,
        reducer: Method,
        positions: Positions | None = None,
        separators: Separators = "drop",
        family: Family | None = None,
        rectify: float = 0.0,
        absorb: bool = False,
    ) -> Settings:
        """Work out how a method is applied, on a family or, before a model is there, on any.

        Parameters
        ----------
        positions
            By default those of the method's paper, or those that the family can only keep.

        Raises
        ------
        UnsupportedModelError
            If the engine, or the family, lacks what the method needs.
        InputError
            If positions, separators, `rectify` or `absorb` are none of these, or do not go with the method or the
            family.
        """
        if strange := [r for r in reducer.stages() if r.stage == "projector"]:
            raise UnsupportedModelError(f"{strange[0].name} acts at the stage 'projector', which this engine lacks")
        check_declarations_of(reducer)
        if family is not None:
            _check_family(reducer, family)
        if positions not in (None, "original", "compact"):
            raise InputError(f"positions are 'original' or 'compact', not {positions!r}")
        if separators not in ("drop", "keep", "nonempty"):
            raise InputError(f"separators are 'drop', 'keep' or 'nonempty', not {separators!r}")
        check_representation(reducer, rectify, absorb)
        before, inside = split(reducer.stages())
        # A smaller picture is a grid of its own: the rows that separators would close are not there.
        if any(r.stage == "pixels" for r in before) and separators != "drop":
            raise InputError(f"{reducer.name} encodes smaller pictures, which have no separators: use 'drop'")
        # M-RoPE: an image with holes has no compact numbering along three axes.
        fixed = family is not None and family.keeps_positions
        if family is not None and fixed and positions == "compact":
            raise InputError(f"tokens of {family.name} have positions along several axes: use positions='original'")
        if positions is None and not fixed and len({r.positions for r in inside}) > 1:
            raise InputError(
                f"{' and '.join(r.name for r in inside)} give positions differently: pass positions='original' or "
                "'compact'"
            )
        # The last method's paper counts: it leaves the tokens that the LLM is given.
        own = [part[-1].positions if part and not fixed else "original" for part in (before, inside)]
        return cls(reducer, positions or own[0], separators, positions or own[1], float(rectify), absorb)


def check_representation(reducer: Method, rectify: float, absorb: bool) -> None:
    """Raise `InputError` unless a method goes with the options `rectify` and `absorb`."""
    if not isinstance(rectify, int | float) or isinstance(rectify, bool) or not 0 <= rectify < float("inf"):
        raise InputError(f"rectify is a finite number from 0 on, such as 0.5, not {rectify!r}")
    if not isinstance(absorb, bool):
        raise InputError(f"absorb is True or False, not {absorb!r}")
    if not absorb:
        return
    before, _ = split(reducer.stages())
    if not before:
        raise InputError(
            f"absorb averages embeddings before the LLM, and {reducer.name} drops nothing there: use rectify alone"
        )
    if asking := [part for part in before if part.query_aware]:
        raise InputError(
            f"{asking[0].name} chooses tokens by the question, and absorb would mix what it rejects into them: use "
            "rectify alone"
        )
    if strange := [part for part in before if part.stage != "before_llm"]:
        raise InputError(
            f"{strange[0].name} leaves no embeddings of dropped tokens that could be absorbed: use rectify alone"
        )


def _check_family(reducer: Method, family: Family) -> None:
    if (lacking := family.lacks(reducer)) is None:
        return
    others = [name for name in list_methods() if name != "chain" and not family.lacks(by_default(name))]
    raise UnsupportedModelError(
        f"{reducer.name} needs {lacking}, which the family {family.name!r} does not give; methods that run on "
        f"it are: {', '.join(others)}"
    )
