"""How much it matters where a method differs, or could differ, from its authors' code: kept tokens and answers of nano.

``python tests/authors/record.py`` writes ``results/authors.json``. Sharing is the mean share of kept tokens that two
forms of a method have in common, over validation scenes and over near-blank pages: white, with one line of strokes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import foveate
from foveate import nano
from foveate.core import ranking
from foveate.methods import DART, SGL, CDPruner, FlowCut, MMTok, PruneSID, cdpruner, mmtok
from foveate.methods.flowcut import AttentionShare
from foveate.nano.evaluate import evaluate
from foveate.nano.runner import Condition

FILE = Path(__file__).parents[2] / "results" / "authors.json"
SEED, SCENES, ASKED = 5, 20, 30
BUDGETS = (16, 64, 128)


def page(index: int, size: tuple[int, int]) -> Image.Image:
    """Return a white page with a line of strokes somewhere."""
    image, generator = Image.new("RGB", size, "white"), torch.Generator().manual_seed(index)
    left, top = (int(torch.randint(10, side - 60, (), generator=generator)) for side in size)
    for stroke in range(6):
        height = int(torch.randint(4, 10, (), generator=generator))
        ImageDraw.Draw(image).line([(left + 6 * stroke, top), (left + 6 * stroke, top + height)], fill="black", width=2)
    return image


@cache
def pictures() -> dict[str, tuple[Any, Any]]:
    """Return nano and its inputs for scenes and for pages."""
    net, processor = nano.load()
    shown = list(nano.scenes(SEED, SCENES, "validation"))
    texts = [f"<image> {s.questions[0].text}" for s in shown]
    pages = [page(i, s.image.size) for i, s in enumerate(shown)]
    return {
        kind: (net, processor(images=images, text=texts, return_tensors="pt", padding=True))
        for kind, images in (("scenes", [s.image for s in shown]), ("pages", pages))
    }


def kept(net: Any, inputs: Any, method: Any) -> list[set[int]]:
    return [set(span.kept.tolist()) for span in foveate.reduce(net, inputs, method).selection]


def sharing(ones: list[set[int]], others: list[set[int]]) -> dict[str, float]:
    shares = [len(one & other) / len(one) for one, other in zip(ones, others, strict=True)]
    return {"mean": round(fmean(shares), 4), "least": round(min(shares), 4)}


def compare(make: Callable[[int], Any], other: Callable[[], Any]) -> dict[str, Any]:
    """Compare a method with itself inside the context `other`."""
    found: dict[str, Any] = {}
    for kind, (net, inputs) in pictures().items():
        for budget in BUDGETS:
            ours = kept(net, inputs, make(budget))
            with other():
                found[f"{kind} {budget}"] = sharing(ours, kept(net, inputs, make(budget)))
    return found


def in_float32(similarity: Tensor, weight: Tensor, count: int) -> Tensor:
    """Follow CDPruner's weighted kernel in float32 as long as it lasts, without a guard."""
    weight = weight.float()
    kernel = weight[:, :, None] * similarity.float() * weight[:, None]
    left, basis, picks = kernel.diagonal(dim1=1, dim2=2).clone(), kernel.new_zeros(len(kernel), 0, kernel.shape[1]), []
    for _ in range(count):
        pick = left.argmax(dim=1, keepdim=True)
        row = ranking.row_of(kernel, pick) - (
            basis.gather(2, pick[:, :, None].expand(-1, basis.shape[1], 1)) * basis
        ).sum(1)
        row = row / left.gather(1, pick).sqrt()
        basis, left = torch.cat([basis, row[:, None]], dim=1), (left - row.square()).scatter(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, dim=1)


def of_cdpruner() -> dict[str, Any]:
    orders: dict[str, list[list[int]]] = {"float64": [], "float32": []}
    exact, net_inputs = cdpruner.most_diverse, pictures()["scenes"]

    def both(similarity: Tensor, weight: Tensor, count: int) -> Tensor:
        orders["float64"] += exact(similarity, weight, count).tolist()
        orders["float32"] += in_float32(similarity, weight, count).tolist()
        return exact(similarity, weight, count)

    with patch.object(cdpruner, "most_diverse", both):
        kept(*net_inputs, CDPruner(keep=128))
    parted = [
        next((t for t, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), 128)
        for one, other in zip(orders["float64"], orders["float32"], strict=True)
    ]
    return {
        "float32 instead": compare(
            lambda k: CDPruner(keep=k), lambda: patch.object(cdpruner, "most_diverse", in_float32)
        ),
        "pick at which float32 parts": {"first": min(parted), "median": median(parted)},
    }


@contextmanager
def pivots_backwards() -> Iterator[None]:
    order = ranking.descending
    with patch.object(ranking, "descending", lambda x: torch.cat([order(x)[:, :4].flip(1), order(x)[:, 4:]], dim=1)):
        yield


@contextmanager
def no_ties() -> Iterator[None]:
    cover = mmtok.cover
    with patch.object(mmtok, "cover", lambda matrix, count, taken, noise: cover(matrix, count, taken, 0.0)):
        yield


def of_sgl() -> dict[str, Any]:
    found = {}
    for kind, (net, inputs) in pictures().items():
        scores = [
            foveate.guide(net, net, SGL(layer=1, include_last_visual=include)).scores(**inputs, max_new_tokens=2)
            for include in (True, False)
        ]
        for budget in BUDGETS:
            sets = [[set(s.topk(budget).indices.tolist()) for s in form] for form in scores]
            found[f"{kind} {budget}"] = sharing(*sets)
    return {"text rows alone": found}


def of_flowcut() -> dict[str, Any]:
    shares: list[float] = []
    read = AttentionShare.read

    def noted(probe: AttentionShare, heads: Any) -> Tensor:
        share = read(probe, heads)
        entropy = torch.special.entr(share.double()).sum(dim=1) / torch.tensor(float(share.shape[1])).log()
        shares.extend(entropy.tolist())
        return share

    with patch.object(AttentionShare, "read", noted):
        kept(*pictures()["scenes"], FlowCut(keep=64))
    found: dict[str, Any] = {}
    for kind, (net, inputs) in pictures().items():
        for budget in BUDGETS:
            ours, constant = (kept(net, inputs, FlowCut(keep=budget, entropy=e)) for e in (None, 0.9))
            found[f"{kind} {budget}"] = sharing(ours, constant)
    return {
        "constant 0.9 instead": found,
        "entropy": {"mean": round(fmean(shares), 3), "least": round(min(shares), 3), "most": round(max(shares), 3)},
    }


def of_answers() -> dict[str, Any]:
    """Return the share of right answers of nano."""
    net, processor = nano.load()
    forms = {
        "flowcut": lambda k: FlowCut(keep=k),
        "flowcut, entropy 0.9": lambda k: FlowCut(keep=k, entropy=0.9),
        "prunesid": lambda k: PruneSID(keep=k),
        "prunesid, one token less for [CLS]": lambda k: PruneSID(keep=k - 1),
        "cdpruner": lambda k: CDPruner(keep=k),
    }
    conditions = [Condition(f"{name} {k}", form(k)) for name, form in forms.items() for k in BUDGETS[:2]]
    tallies = evaluate(net, processor, list(nano.scenes(SEED, ASKED, "validation")), conditions)
    return {name: {k: round(v, 4) for k, v in tally.share().items()} for name, tally in tallies.items()}


@torch.no_grad()
def found() -> dict[str, Any]:
    """Return all comparisons."""
    return {
        "about": f"nano, validation scenes of seed {SEED}: {SCENES} for kept tokens, {ASKED} for answers",
        "cdpruner": of_cdpruner(),
        "dart": {"pivots backwards": compare(lambda k: DART(keep=k), pivots_backwards)},
        "mmtok": {"no ties": compare(lambda k: MMTok(keep=k), no_ties)},
        "sgl": of_sgl(),
        "flowcut": of_flowcut(),
        "right answers": of_answers(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(found(), indent=1) + "\n", encoding="utf-8")
