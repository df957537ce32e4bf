"""Outputs of a pass over compact prompts, at the columns of the full ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.engines.transformers.compaction import Compaction, sources, spread
from foveate.engines.transformers.keywords import check_columns

_WANTED = "logits_to_keep"


@dataclass(frozen=True, eq=False)
class FullLength:
    """What stands at the columns of the full prompts in the outputs of a pass over compact ones.

    Attributes
    ----------
    states
        ``[B, L]``: per column the one of the pass that stands there, see `sources`.
    logits
        ``[B, k]``: per column that logits are wanted of, those that stand there among the ones that the pass returns.
    plain
        Whether the caller wants a tuple.
    """

    states: Tensor
    logits: Tensor
    plain: bool

    @classmethod
    def ask(cls, kwargs: dict[str, Any], compaction: Compaction, wanted: Any, plain: bool) -> FullLength:
        """Change the keywords of a pass so that it returns what stands at wanted columns of the full prompts.

        Parameters
        ----------
        wanted
            ``logits_to_keep`` of the full prompts; `None` and 0 are all.
        """
        states = sources(compaction.columns, compaction.length)
        if plain:  # a tuple does not say which of its tensors are states
            kwargs["return_dict"] = True
        if wanted is None or (isinstance(wanted, int) and wanted == 0):
            return cls(states, states, plain)
        check_columns(_WANTED, wanted)
        picked = states[:, slice(-wanted, None) if isinstance(wanted, int) else wanted.to(states.device).long()]
        # Prompts of a batch that keep different columns each get all that one of them wants.
        used, places = torch.unique(picked.clamp(min=0), return_inverse=True)
        kwargs[_WANTED] = used
        return cls(states, torch.where(picked < 0, -1, places), plain)

    def of(self, output: Any) -> Any:
        """Return the output of the pass with its logits and hidden states at full length."""
        output.logits = spread(output.logits, self.logits)
        if output.get("hidden_states") is not None:  # those that are not asked for by number are None
            output.hidden_states = tuple(None if x is None else spread(x, self.states) for x in output.hidden_states)
        return output.to_tuple() if self.plain else output


def wants_tuple(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of a model asks for a tuple, by itself or by the model's configuration."""
    wish = kwargs.get("return_dict")
    return not (model.config.return_dict if wish is None else wish)
