"""The transformers engine: `reduce`, a pure function from model inputs to smaller model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.ambient import defaults
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer
from foveate.core.offload import weights_at_hand
from foveate.core.reducer import Method, Positions, identity
from foveate.core.selection import Selection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.engines.finite import check_pixels
from foveate.engines.pipeline import UNMETERED, Decision, Meter, probes_of, readers, run
from foveate.engines.settings import Separators, Settings, inside_llm
from foveate.engines.transformers.bias.planes import Bias, spread
from foveate.engines.transformers.compaction import Compaction, full_positions, plan, position_behind
from foveate.engines.transformers.keywords import compact_planes
from foveate.engines.transformers.packing import check_packing, packed_prompts, repack
from foveate.engines.transformers.priors import priors_of
from foveate.engines.transformers.prompt_tokens import Prefill, tokens_by_prompt
from foveate.families import Family, family_of
from foveate.registry import get_method, list_methods, load_reducer


class Reduced(dict[str, Any]):
    """Model inputs after reduction, ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Attributes
    ----------
    selection
        What was kept, or `None` if the inputs held nothing to reduce.
    compaction
        How compact columns map to those of the full prompt, or `None` if the inputs are unchanged.
    spans
        The visual tokens of the full prompts.
    added
        Of a later turn, given without what is cached: how its own columns map to those that it was given with.
    priors
        What methods inside the LLM make of the tokens that are left, ``[K]`` per span.
    bias
        By what the LLM is to raise the attention logits of each column.
    counts
        How many tokens those that are left stand for, ``[K]`` per span.
    """

    selection: Selection | None = None
    compaction: Compaction | None = None
    added: Compaction | None = None
    spans: tuple[Span, ...] = ()
    priors: Mapping[InLlmReducer, Sequence[Tensor]] = {}
    bias: Bias | None = None
    counts: Sequence[Tensor] | None = None


def reduce(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Path | Method,
    *,
    positions: Positions | None = None,
    separators: Separators = "drop",
    rectify: float = 0.0,
    absorb: bool = False,
    **config: Any,
) -> Reduced:
    """Encode the images of some model inputs, and return inputs that hold only the kept visual tokens.

    The model is not touched: the result goes into the plain ``model.generate`` or ``model.forward``. Gradients flow to
    the projector and the tower; call it under `torch.no_grad` where they are not wanted.

    Parameters
    ----------
    model
        A `transformers` model of a supported family.
    inputs
        What its processor returned: ``input_ids`` ``[B, L]``, ``pixel_values``, optionally masks and labels.
    method
        A reducer, the name of one (its parameters follow as keywords), or a JSON file that `Method.save` wrote.
    positions, separators, absorb
        See `Settings`. Positions default to those of the method's paper.
    rectify
        Of `attach` alone: no inputs of a model say by what its attention logits are raised.

    Returns
    -------
    Reduced
        The same keys without pixels, with ``mm_encoder_outputs``. A budget that covers everything, and inputs without
        images, come back unchanged.

    Raises
    ------
    UnsupportedModelError
        If the model belongs to no supported family.
    InputError
        If placeholders and images do not match, or if the images are encoded or reduced already, or with `rectify`.
    """
    model = base_model(model)
    reducer = load_reducer(method, **config)
    refuse_vllm(model, reducer)
    family = family_of(model)
    settings = Settings.make(reducer, positions, separators, family, rectify, absorb)
    if settings.rectify:
        raise InputError(
            "rectify raises attention logits inside the LLM, which no change of its inputs does: use "
            "foveate.attach(model, ..., rectify=...)"
        )
    if settings.inside:
        raise UnsupportedModelError(
            f"{settings.inside[0].name} acts inside the LLM, and no change of its inputs does the same: use "
            "foveate.attach(model, ...)"
        )
    return reduce_with(model, family, inputs, settings)


@defaults()
def reduce_with(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    settings: Settings,
    meter: Meter = UNMETERED,
    seen: VisualTokens | None = None,
) -> Reduced:
    """Reduce as `reduce` does, with the family and the settings at hand; see `foveate.engines.pipeline.run`."""
    out = Reduced(inputs)
    if settings.before is not None and inputs.get("mm_encoder_outputs") is not None:
        raise InputError(
            f"the images of these inputs are encoded already, or reduced, and {settings.before.name} acts before that "
            "is done: pass what the processor returned, and several methods as one Chain"
        )
    # A later turn of a conversation, and the steps of decoding, bring no image.
    if all(inputs.get(key) is None for key in family.inputs):
        return out
    if inputs.get("input_ids") is None:
        raise InputError("reduction needs input_ids beside the pixels; inputs_embeds do not show where the images are")
    spans = family.spans_for(model, inputs, probes_of(readers(settings)) if seen is None else ())
    if seen is None and settings.leaves_alone(spans):
        out.selection = identity(spans)
        return out
    if packed_prompts(inputs) is not None:
        check_packing(family, model, settings)
    check_pixels(model, family, inputs, spans)

    def applied(decision: Decision) -> Reduced:
        ready = apply(model, family, inputs, spans, decision.selection, decision.embeds, settings.positions)
        if settings.rectify and decision.shares is not None:
            assert ready.compaction is not None
            ready.bias = spread(spans, decision.selection, decision.shares, settings.rectify, ready.compaction)
            ready.counts = [one.counts for one in decision.shares]
        if decision.tokens is not None:
            ready.priors = priors_of(settings.judging, decision.tokens, decision.selection)
        return ready

    # Families read parameters of these two, such as the newline of LLaVA-NeXT, and no call of theirs loads them.
    with weights_at_hand(part for part in (model, getattr(model, "model", None)) if part is not None):
        return run(model, family, inputs, spans, settings, applied, meter, seen)


def apply(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    spans: Sequence[Span],
    selection: Selection,
    embeds: Sequence[Tensor],
    positions: Positions,
) -> Reduced:
    """Compact all planes of the inputs together and hand the embeddings over."""
    family.check_kept(model, selection)
    packed = packed_prompts(inputs)
    compaction = plan(inputs["input_ids"], inputs.get("attention_mask"), spans, selection)
    # M-RoPE positions follow from the ids and sizes of the full prompt: of the compact one they cannot be computed.
    own = family.positions(model, inputs) if positions == "original" and inputs.get("position_ids") is None else None
    full = with_positions(inputs, inputs["input_ids"].shape, positions, own, packed is not None)
    if family.keeps_positions and positions == "original":
        # A later turn goes on behind the last M-RoPE position, which the number of columns does not tell.
        full["position_ids"] = rotary_axes(full["position_ids"], len(inputs["input_ids"]), family.axes)
        compaction = replace(compaction, behind=position_behind(full["position_ids"], inputs.get("attention_mask")))
    out = Reduced(compact_planes(full, compaction, pad_id(model)))
    # The images are encoded: a model that is given pixels beside mm_encoder_outputs may encode them again.
    for key in (*family.inputs, *family.side_inputs):
        out.pop(key, None)
    if packed is not None:
        repack(out, inputs, packed, compaction, positions, model.get_input_embeddings().weight.dtype)
    elif out.get("position_ids") is not None and out.get("attention_mask") is None:
        # Without a mask, transformers takes gaps between positions for the borders of packed prompts.
        out["attention_mask"] = torch.ones_like(out["input_ids"])
    out["mm_encoder_outputs"] = family.encoder_outputs(spans, embeds)
    out.selection, out.compaction, out.spans = selection, compaction, tuple(spans)
    return out


def shown_to_llm(inputs: Mapping[str, Any], reduced: Reduced) -> Prefill:
    """Describe to methods inside the LLM what methods before it have left of some inputs."""
    ids, mask = reduced["input_ids"], inputs.get("attention_mask")
    width = inputs["input_ids"].shape[1]
    prompts = tokens_by_prompt(
        reduced.spans, mask, width, ids.device, reduced.selection, reduced.compaction, reduced.priors,
        reduced.counts,
    )  # fmt: skip
    return Prefill(prompts, *ids.shape)


def with_positions(
    inputs: Mapping[str, Any],
    shape: Sequence[int],
    positions: Positions,
    own: Tensor | None = None,
    packed: bool = False,
) -> dict[str, Any]:
    """Return the inputs of full prompts of a shape ``[B, L]`` with the position ids that their tokens are to keep.

    `own` are the family's, if they are not counted along the prompt.
    """
    full = dict(inputs)
    if full.get("position_ids") is None:
        full.pop("position_ids", None)
        if positions == "original":
            device = inputs["input_ids"].device
            counted = full_positions(inputs.get("attention_mask"), shape[0], shape[1], device)
            full["position_ids"] = counted if own is None else own
    elif positions == "compact" and not packed:  # those of packed prompts are counted anew, each by itself
        raise InputError("position_ids number the full prompt: leave them out, or use positions='original'")
    return full


def rotary_axes(positions: Tensor, batch: int, axes: int) -> Tensor:
    """Return the positions along so many axes, ``[axes, B, L]``, among M-RoPE position ids.

    A row in front of them that counts the tokens is left out: with gaps in it, transformers would take one prompt for
    several packed ones.
    """
    own = positions[-axes:] if positions.dim() == 3 else positions[None]
    return own.expand(axes, batch, -1)


def refuse_vllm(model: Any, reducer: Method) -> None:
    """Raise `UnsupportedModelError` for an engine of vLLM, which this one cannot run a method in."""
    # By name, so that vLLM need not be installed.
    if type(model).__module__.partition(".")[0] != "vllm":
        return
    if inside := inside_llm(reducer):
        others = [n for n in list_methods() if n != "chain" and get_method(n).stage == "before_llm"]
        raise UnsupportedModelError(
            f"{inside[0].name} prunes inside the LLM, and vLLM cannot do that: use a method that acts before the LLM: "
            f"{', '.join(others)}; or the transformers model"
        )
    raise UnsupportedModelError(
        "reduce and attach take models of transformers, not engines of vLLM: load the model with transformers"
    )


def pad_id(model: Any) -> int:
    """Return the id that fills padding columns; it is masked, so any will do where the model names none."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


def base_model(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, or the model itself.

    Raises
    ------
    UnsupportedModelError
        If it is hidden in another wrapper; the message says where it is.
    """
    inner = getattr(model, "module", None)  # DistributedDataParallel, DataParallel, FullyShardedDataParallel, DeepSpeed
    if isinstance(inner, nn.Module) and not hasattr(model, "config"):
        raise UnsupportedModelError(f"{type(model).__name__} runs a model of its own: pass its .module")
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is no model, but has one: pass its .model")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("torch.compile hides the parts of this model: pass the one that it was made of")
    return model.get_base_model() if hasattr(model, "get_base_model") else model
