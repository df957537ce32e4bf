"""Training of the gates of DyVTE (arXiv 2411.19628) on what a frozen model does without its visual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.exit_gates import Gates, feature
from foveate.engines.transformers.attach import attach
from foveate.engines.transformers.reduce import base_model
from foveate.families import family_of
from foveate.methods.dyvte import VisualExit


@dataclass(frozen=True, eq=False)
class Examples:
    """What gates learn from, M examples.

    Attributes
    ----------
    features
        ``[M, 2 D]`` float32 on the CPU, see `foveate.core.exit_gates.feature`.
    layers
        ``[M]`` int64: the layer whose output each comes from.
    labels
        ``[M]`` int64: 1 if the visual tokens may leave behind this layer.
    """

    features: Tensor
    layers: Tensor
    labels: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Put examples together."""
        if not parts:
            raise InputError("no batch to learn from: pass model inputs with images and labels")
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("features", "layers", "labels")))

    def __len__(self) -> int:
        return len(self.labels)


def may_leave(
    agreement: float, full: float, without: float, least_agreement: float = 0.99, loss_ratio: float = 1.03
) -> bool:
    """Return whether an answer stays the same without visual tokens.

    Parameters
    ----------
    agreement
        Share of the answer's tokens that are the likeliest ones in both runs.
    full, without
        Mean cross-entropy of the answer with and without the visual tokens in the later layers.
    """
    return agreement > least_agreement and without < loss_ratio * full


@torch.no_grad()
def observe(
    model: Any, inputs: Mapping[str, Any], layers: Sequence[int], agreement: float = 0.99, loss_ratio: float = 1.03
) -> Examples:
    """Run a batch with all visual tokens, and without them behind each of some layers.

    Parameters
    ----------
    inputs
        Model inputs with ``labels`` ``[B, L]``: ids at the tokens of one answer per prompt, -100 elsewhere. Prompts
        without image, answer, or text between the two are left out.
    layers
        Behind which layers the tokens are taken away.
    agreement, loss_ratio
        See `may_leave`.

    Raises
    ------
    InputError
        If there are no labels, or those of a prompt are more than one run.
    """
    model = base_model(model)
    decoder, given = model.get_decoder(), dict(inputs)
    depth, labels = decoder.config.num_hidden_layers, given.pop("labels", None)
    if labels is None:
        raise InputError("training gates needs labels: the ids of the answer's tokens, and -100 elsewhere")
    texts = _texts(model, given, labels)
    states: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[number] = torch.stack([feature(hidden[i, a:b]) for i, (a, b) in texts.items()])

        return hook

    training = model.training
    model.eval()
    hooks = [decoder.layers[i].register_forward_hook(keep(i)) for i in layers if texts]
    try:
        full = _answers(model(**given, use_cache=False).logits, labels, texts) if texts else []
        for hook in hooks:
            hook.remove()
        rows = []
        for layer in layers if texts else ():
            # Behind the last layer nothing is left that could tell.
            without = full if layer == depth - 1 else _without(model, given, labels, texts, (layer + 1) / depth)
            for (ids, loss), (other_ids, other_loss) in zip(full, without, strict=True):
                same = float((ids == other_ids).float().mean())
                rows.append(int(may_leave(same, loss, other_loss, agreement, loss_ratio)))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    features = [states[i].float().cpu() for i in layers] if texts else []
    return Examples(
        torch.cat(features) if features else torch.empty(0, 2 * decoder.config.hidden_size),
        torch.tensor([i for i in layers for _ in texts], dtype=torch.long),
        torch.tensor(rows, dtype=torch.long),
    )


def _without(
    model: Any, inputs: dict[str, Any], labels: Tensor, texts: Any, share: float
) -> list[tuple[Tensor, float]]:
    with attach(model, VisualExit(keep=share), positions="original"):
        return _answers(model(**inputs, use_cache=False).logits, labels, texts)


def _texts(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[int, tuple[int, int]]:
    """Return, of prompts that can be learnt from, the columns between the last image and the answer."""
    behind = {span.sample: int(span.columns[-1]) + 1 for span in family_of(model).spans(model, inputs)}
    answered, found = (labels >= 0).cpu(), {}
    for i, row in enumerate(answered):
        columns = row.nonzero().flatten()
        if not len(columns):
            continue
        if int(columns[-1] - columns[0]) + 1 != len(columns):
            raise InputError(f"prompt {i} has answers in several places: gates learn from prompts with one answer")
        if i in behind and int(columns[0]) > behind[i]:
            found[i] = (behind[i], int(columns[0]))
    return found


def _answers(logits: Tensor, labels: Tensor, texts: Mapping[int, Any]) -> list[tuple[Tensor, float]]:
    """Return the likeliest ids at the answer of each prompt, and its mean cross-entropy."""
    found = []
    for i in texts:
        columns = (labels[i] >= 0).nonzero().flatten()
        rows = logits[i, columns - 1].float()
        found.append((rows.argmax(dim=-1), float(nn.functional.cross_entropy(rows, labels[i, columns]))))
    return found


def fit(
    gates: Gates,
    examples: Examples,
    *,
    epochs: int = 1,
    batch: int = 128,
    learning_rate: float = 6e-5,
    warmup: float = 0.03,
    seed: int = 0,
) -> list[float]:
    """Train gates on examples: cross-entropy, one gate per step, AdamW without decay, warm-up and a cosine.

    Parameters
    ----------
    epochs, batch
        Passes over the examples, and how many of one layer make a step.
    warmup
        Share of the steps in which the learning rate rises.

    Returns
    -------
    list of float
        The loss of each step.
    """
    device, generator = next(gates.parameters()).device, torch.Generator().manual_seed(seed)
    steps: list[tuple[int, Tensor]] = []
    for _ in range(epochs):
        own = []
        for layer in gates.layers:
            index = (examples.layers == layer).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            own += [(layer, part) for part in torch.split(index, batch) if len(part)]
        steps += [own[i] for i in torch.randperm(len(own), generator=generator)]
    optimizer = torch.optim.AdamW(gates.parameters(), lr=learning_rate, weight_decay=0.0)
    rising = max(math.ceil(warmup * len(steps)), 1)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(len(steps) - rising, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for layer, index in steps:
        gate = gates.of(layer)
        assert gate is not None
        loss = nn.functional.cross_entropy(gate(examples.features[index].to(device)), examples.labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def train_gates(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    exits: int | None = 1,
    first: int = 0,
    hidden: int = 2048,
    agreement: float = 0.99,
    loss_ratio: float = 1.03,
    epochs: int = 1,
    batch: int = 128,
    learning_rate: float = 6e-5,
    warmup: float = 0.03,
    seed: int = 0,
) -> Gates:
    """Train the gates that `DyVTE` needs for a model, whose own weights stay as they are.

    The model says itself what is right: it answers with its visual tokens in all layers, and without them behind a
    layer drawn at random; they may leave there if the answer stays the same (`may_leave`). As the model is frozen,
    what gates read is computed once, and they are trained on it afterwards, which gives what training both at once
    does.

    Parameters
    ----------
    model
        A `transformers` model of a supported family.
    batches
        Model inputs with ``labels``, such as a `torch.utils.data.DataLoader` yields; see `observe`.
    exits
        Layers drawn per batch, or `None` for all of them. The paper draws one, which costs two passes; each further one
        costs one pass.
    first
        The first layer that gets a gate.
    hidden
        Width of the gates.
    agreement, loss_ratio
        See `may_leave`.
    epochs, batch, learning_rate, warmup, seed
        See `fit`. The defaults are the paper's, which takes 1 % of the LLaVA mix of 665 thousand samples.

    Examples
    --------
    >>> gates = foveate.train_gates(model, loader)  # doctest: +SKIP
    >>> gates.save("gates.safetensors")  # doctest: +SKIP
    >>> foveate.attach(model, DyVTE(gates="gates.safetensors"))  # doctest: +SKIP
    """
    model = base_model(model)
    config, generator = model.get_decoder().config, torch.Generator().manual_seed(seed)
    among = range(first, config.num_hidden_layers)
    if not among or (exits is not None and not 1 <= exits <= len(among)):
        raise InputError(f"gates of the layers {first} to {config.num_hidden_layers - 1}, {exits} of them per batch")
    parts = []
    for inputs in batches:
        drawn = torch.randperm(len(among), generator=generator)[:exits].tolist()
        parts.append(observe(model, inputs, sorted(first + i for i in drawn), agreement, loss_ratio))
    gates = Gates(among, config.hidden_size, hidden).initialise(seed).to(model.device)
    fit(
        gates, Examples.joined(parts), epochs=epochs, batch=batch, learning_rate=learning_rate, warmup=warmup, seed=seed
    )
    return gates.requires_grad_(False).eval()
