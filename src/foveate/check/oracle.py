"""What a pruned run must equal: the plain model on the full prompt, whose layers do not see the dropped tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedModelError
from foveate.core.selection import SpanSelection
from foveate.engines.transformers.compaction import full_positions
from foveate.engines.transformers.keywords import named
from foveate.measure.job import Job

Cuts: TypeAlias = Mapping[int, Sequence[Sequence[SpanSelection]]]
"""From which layer on, per prompt and span, what is left; a method before the LLM cuts in front of layer 0."""


@torch.no_grad()
def oracle_logits(job: Job, cuts: Cuts, answers: Tensor) -> Tensor:
    """Return the logits ``[B, T, V]``, float32, that the plain model draws each token of some answers from.

    One pass over the full prompts and their answers, without a cache: every layer behind a cut hides from all tokens
    but themselves what the cut dropped. Positions are those of the full prompt.

    Parameters
    ----------
    answers
        ``[B, T]``.

    Raises
    ------
    UnsupportedModelError
        If hiding a token is not the same as dropping it in such a model.
    """
    model, family, length = job.model, job.family, answers.shape[1]
    inputs = _extended(job, answers)
    _check(job, inputs["input_ids"].shape[1])
    own, ids = family.positions(model, inputs), inputs["input_ids"]
    counted = full_positions(inputs["attention_mask"], len(ids), ids.shape[1], ids.device)
    inputs["position_ids"] = counted if own is None else own
    seen = {boundary: _seen(job, rows, length) for boundary, rows in cuts.items()}
    with ExitStack() as hooks:
        for number, layer in enumerate(model.get_decoder().layers):
            behind = [boundary for boundary in seen if boundary <= number]
            if behind:
                hook = layer.register_forward_pre_hook(_hiding(model, seen[max(behind)]), with_kwargs=True)
                hooks.callback(hook.remove)
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=length + 1).logits
    return logits[:, -length - 1 : -1].float()


def _extended(job: Job, answers: Tensor) -> dict[str, Any]:
    shape = job.inputs["input_ids"].shape
    further = {"input_ids": answers, "attention_mask": torch.ones_like(answers)}
    further["token_type_ids"] = torch.full_like(answers, job.family.answer_type)
    return {
        key: torch.cat([x, further.get(key, torch.zeros_like(answers))], dim=1) if x.shape == shape else x
        for key, x in job.inputs.items()
    }


def _check(job: Job, width: int) -> None:
    config = job.model.get_decoder().config
    if job.family.recurrent:
        raise UnsupportedModelError(
            "layers of convolution or recurrence pass hidden tokens on, so that hiding is not dropping"
        )
    window = getattr(config, "sliding_window", None)
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if windows and window is not None and width > window:
        raise UnsupportedModelError(
            f"a sliding window of {window} counts hidden tokens, but no dropped ones, and the prompt has {width}"
        )


def _seen(job: Job, rows: Sequence[Sequence[SpanSelection]], further: int) -> Tensor:
    """Return which columns of the prompts and their answers are neither padding nor dropped, ``[B, L + T]`` bool."""
    seen = job.inputs["attention_mask"].bool().clone()
    for sample, selections in enumerate(rows):
        spans = [span for span in job.spans if span.sample == sample]
        for span, chosen in zip(spans, selections, strict=True):
            columns = span.columns.to(seen.device)
            seen[sample, columns] = False
            seen[sample, columns[chosen.kept.to(seen.device)]] = True
    return torch.nn.functional.pad(seen, (0, further), value=True)


def _hiding(model: Any, seen: Tensor) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = named(type(layer).forward, args, kwargs)
        implementation = str(model.get_decoder().config._attn_implementation)
        given["attention_mask"] = hide(given.get("attention_mask"), seen, implementation)
        return ((given.pop("hidden_states"),) if args else ()), given

    return hook


def hide(mask: Tensor | None, seen: Tensor, implementation: str) -> Tensor:
    """Return a layer's mask ``[B or 1, 1, L, L]``, ``[B, L]`` or `None` with the columns hidden that are not seen.

    Every column sees itself: a row that sees nothing comes to NaN in some kernels.
    """
    if mask is None and "flash" in implementation:
        return seen.long()
    if mask is not None and mask.dim() == 2:
        return mask * seen
    width = seen.shape[1]
    itself = torch.eye(width, dtype=torch.bool, device=seen.device)
    columns = seen[:, None, None, :]
    if mask is None:
        return (torch.ones_like(itself).tril() & columns) | itself
    if mask.dtype == torch.bool:
        return (mask & columns) | itself
    return mask.masked_fill(~(columns | itself), torch.finfo(mask.dtype).min)


@contextmanager
def other_kernel(model: Any) -> Iterator[None]:
    """Let the LLM attend with another implementation: the plain one of PyTorch operations, or that of PyTorch."""
    decoder = model.get_decoder()
    own = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa" if own == "eager" else "eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(own)
