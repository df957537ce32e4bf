"""What a method must hold to whoever calls the model: one check for each column of docs/compatibility.md.

A check raises `AssertionError` where something differs from what is due, and `FoveateError` where foveate refuses.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import accelerate
import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.in_llm import InLlmReducer
from foveate.core.probes import Attention
from foveate.core.rows import Rows
from foveate.families import all_families
from foveate.methods import DivPrune, FastV, VisPruner
from tiny import IN_LLM_FAMILIES, TINIES, collate, deep_model, model, samples

PLACES = ("before the LLM", "inside the LLM")
STAY = {"glm4v": "Glm4vVisionEmbeddings", "idefics3": "Idefics3VisionEmbeddings", "lfm2_vl": "Siglip2VisionEmbeddings"}
"""Modules that accelerate cannot offload without foveate: stock models read their weights, or device, from outside."""


def method_of(family: str, place: str) -> Any:
    """Return the method with which a family is measured."""
    if place == "inside the LLM":
        return FastV(keep=0.3, layer=1)
    before = VisPruner(keep=0.3)
    return DivPrune(keep=0.3) if all_families()[family].lacks(before) else before


def cell(column: str, family: str, place: str) -> str:
    """Measure a cell of the table: "yes", or what foveate says where it refuses."""
    try:
        COLUMNS[column](family, method_of(family, place))
    except FoveateError as error:
        # What runs instead changes with every method that is added.
        return "refused: " + str(error).partition("; methods that run on it")[0]
    return "yes"


def net_for(family: str, reducer: Any) -> Any:
    deep = isinstance(reducer, InLlmReducer) and family in IN_LLM_FAMILIES
    return (deep_model if deep else model)(family)


def packed(family: str, net: Any, count: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the first prompts of a family in one row, and each by itself."""
    tiny, rows = TINIES[family], samples(family)[:count]
    alone, batch = [collate([row]) for row in rows], collate(rows)
    inputs = {
        key: torch.cat([one[key] for one in alone], dim=1) if key in ("input_ids", tiny.type_plane) else value
        for key, value in batch.items()
        if key != "attention_mask"
    }
    positions = torch.cat([tiny.position_ids(net, one) for one in alone], dim=-1)
    if positions.dim() == 3:
        text = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])
        positions = torch.cat([text[None, None], positions[-3:]])
    return {**inputs, "position_ids": positions}, alone


@torch.no_grad()
def check_packed(family: str, reducer: Any) -> None:
    """Two prompts in one row get the logits that each gets alone."""
    net = net_for(family, reducer)
    inputs, alone = packed(family, net)
    lengths = [one["input_ids"].shape[1] for one in alone]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    further = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths)}
    further |= {"max_length_k": max(lengths), "use_cache": False}
    with foveate.attach(net, reducer):
        first, second = (net(**one).logits[0] for one in alone)
        logits = net(**inputs, **further).logits[0]
    assert logits.shape[0] == len(first) + len(second) < sum(lengths)
    torch.testing.assert_close(logits[len(first) - 1], first[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[-1], second[-1], atol=1e-4, rtol=0)


@torch.no_grad()
def check_autocast(family: str, reducer: Any) -> None:
    """Under autocast, methods read and keep what they do without it of the same features; logits are finite."""
    net, inputs = net_for(family, reducer), collate(samples(family))
    with foveate.attach(net, reducer) as handle:
        plain = net(**inputs).logits
        counts = [sum(map(len, row)) for row in handle.selections]
        for dtype in (torch.bfloat16, torch.float16):
            with noted(reducer) as calls, torch.autocast("cpu", dtype):
                logits = net(**inputs).logits
            assert logits.isfinite().all()
            assert logits.shape == plain.shape
            assert [sum(map(len, row)) for row in handle.selections] == counts
            assert {name for name, *_ in calls} >= {"select"}
            for name, again, found in calls:
                assert alike(again(), found), f"{name} differs under autocast to {dtype}"


@contextmanager
def noted(reducer: Any) -> Iterator[list[tuple[str, Callable[[], Any], Any]]]:
    """Note down each call that chooses tokens or computes attention: its name, how to repeat it, and what it found."""
    calls: list[tuple[str, Callable[[], Any], Any]] = []

    def noting(owner: type, name: str) -> Any:
        plain = getattr(owner, name)

        def called(self: Any, given: Any) -> Any:
            if name == "attention":
                found = list(plain(self, given))
                calls.append((name, lambda: list(plain(self, given)), found))
                return iter(found)
            found = plain(self, given)
            calls.append((name, lambda: plain(self, given), found))
            return found

        return patch.object(owner, name, called)

    with ExitStack() as stack:
        for owner, name in ((type(reducer), "select"), (Rows, "attention"), (Attention, "read")):
            stack.enter_context(noting(owner, name))
        yield calls


def alike(a: Any, b: Any) -> bool:
    """Compare what calls have found, to the last bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return same_selection(a, b) if isinstance(a, foveate.Selection) else a == b


def same_selection(a: Any, b: Any) -> bool:
    """Compare the spans of two selections, merges too."""
    return all(
        x.length == y.length
        and torch.equal(x.kept, y.kept)
        and (x.merge is None) == (y.merge is None)
        and (x.merge is None or all(map(torch.equal, vars(x.merge).values(), vars(y.merge).values())))
        for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def check_offload(family: str, reducer: Any) -> None:
    """With weights that accelerate has put on the CPU or on disk, logits are those without."""
    inputs = collate(samples(family))
    for where in ("cpu", "disk"):
        net = net_for(family, reducer)
        with foveate.attach(net, reducer):
            expected = net(**inputs).logits
        with tempfile.TemporaryDirectory() as folder:
            if where == "cpu":
                accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
            else:
                accelerate.disk_offload(net, folder, execution_device=torch.device("cpu"))
            for module in [m for m in net.modules() if type(m).__name__ == STAY.get(family)]:
                remove_hook_from_module(module, recurse=True)
            assert sum(p.is_meta for p in net.parameters()) > 30
            with foveate.attach(net, reducer):
                assert torch.equal(net(**inputs).logits, expected), where


def check_threads(family: str, reducer: Any) -> None:
    """Two threads that call one attached model with prompts of their own get what each gets by itself."""
    net, given = net_for(family, reducer), [collate([row]) for row in samples(family)[:2]]
    start, found, faults = threading.Barrier(2), {0: [], 1: []}, []
    greedy = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def answer(i: int) -> Tensor:
        return torch.stack(net.generate(**given[i], **greedy).logits)

    def ask(i: int) -> None:
        try:
            for _ in range(3):
                start.wait(60)
                found[i].append(answer(i))
        except Exception as error:
            start.abort()
            faults.append(error)

    with foveate.attach(net, reducer):
        expected = [answer(i) for i in range(2)]
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []
    for i, answers in found.items():
        assert len(answers) == 3
        for own in answers:
            torch.testing.assert_close(own, expected[i], atol=1e-5, rtol=0)


def check_checkpointing(family: str, reducer: Any, reentrant: tuple[bool, ...] = (False, True)) -> None:
    """With gradient checkpointing, gradients are those without."""
    expected = _gradients(family, reducer, None)
    for each in reentrant:
        found = _gradients(family, reducer, each)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def _gradients(family: str, reducer: Any, reentrant: bool | None) -> dict[str, Tensor]:
    net = copy.deepcopy(net_for(family, reducer)).train()
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        net.enable_input_require_grads()
    runs: list[None] = []
    *_, projection = (m for m in net.get_decoder().layers[-1].modules() if isinstance(m, torch.nn.Linear))
    projection.register_forward_pre_hook(lambda *_: runs.append(None))
    with foveate.attach(net, reducer):
        net(**collate(samples(family), labels=True), use_cache=False).loss.backward()
    assert len(runs) == (1 if reentrant is None else 2)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


COLUMNS: dict[str, Callable[[str, Any], None]] = {
    "packed": check_packed,
    "autocast": check_autocast,
    "offload": check_offload,
    "threads": check_threads,
    "checkpointing": check_checkpointing,
}
