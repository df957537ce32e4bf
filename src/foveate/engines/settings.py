"""How the transformers engine applies a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer, split
from foveate.core.reducer import Method, Positions, Reducer
from foveate.families import Family
from foveate.methods.chain import Chain
from foveate.registry import by_default, list_methods, load_reducer

Separators: TypeAlias = Literal["drop", "keep", "nonempty"]


@dataclass(frozen=True)
class Settings:
    """How an engine applies selections.

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
    """

    reducer: Method
    positions: Positions
    separators: Separators = "drop"
    inside_positions: Positions = "original"

    @property
    def before(self) -> Reducer | Chain | None:
        """The part of the method that acts before the LLM."""
        before, _ = split(self.reducer.stages())
        return (before[0] if len(before) == 1 else Chain(*before)) if before else None

    @property
    def inside_alone(self) -> Method:
        """The method without the parts that act before the LLM."""
        return self.inside[0] if len(self.inside) == 1 else Chain(*self.inside)

    @property
    def inside(self) -> tuple[InLlmReducer, ...]:
        """The parts that act inside the LLM."""
        return tuple(r for r in self.reducer.stages() if isinstance(r, InLlmReducer))

    @classmethod
    def make(
        cls,
        method: str | Path | Method,
        positions: Positions | None,
        separators: Separators,
        config: Mapping[str, Any],
        family: Family | None = None,
    ) -> Settings:
        reducer = load_reducer(method, **config)
        stages = reducer.stages()
        if strange := [r for r in stages if r.stage == "projector"]:
            raise UnsupportedModelError(f"{strange[0].name} acts at the stage 'projector', which this engine lacks")
        before, inside = split(stages)
        if family is not None and (lacking := family.lacks(reducer)):
            others = [name for name in list_methods() if name != "chain" and not family.lacks(by_default(name))]
            raise UnsupportedModelError(
                f"{reducer.name} needs {lacking}, which the family {family.name!r} does not give; methods that run on "
                f"it are: {', '.join(others)}"
            )
        if positions not in (None, "original", "compact"):
            raise InputError(f"positions are 'original' or 'compact', not {positions!r}")
        if separators not in ("drop", "keep", "nonempty"):
            raise InputError(f"separators are 'drop', 'keep' or 'nonempty', not {separators!r}")
        if any(r.stage == "pixels" for r in before) and separators != "drop":
            raise InputError(f"{reducer.name} encodes smaller pictures, which have no separators: use 'drop'")
        fixed = family is not None and family.keeps_positions
        if family is not None and fixed and positions == "compact":
            raise InputError(f"tokens of {family.name} have positions along several axes: use positions='original'")
        if positions is None and not fixed and len({r.positions for r in inside}) > 1:
            raise InputError(
                f"{' and '.join(r.name for r in inside)} give positions differently: pass positions='original' or "
                "'compact'"
            )
        own = [part[-1].positions if part and not fixed else "original" for part in (before, inside)]
        return cls(reducer, positions or own[0], separators, positions or own[1])
