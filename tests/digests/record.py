"""Digests of what every method decides, so that a change that must not change a result can show that it does not.

``python tests/digests/record.py [FILE]`` writes a file, by default ``digests.json`` beside this one, which
``test_digests.py`` compares with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import foveate
from foveate import nano
from foveate.core.errors import BudgetError
from tiny import FAMILIES, IN_LLM, METHODS, STAGED, codebook_file, collate, make, method_id, model, samples

FILE = Path(__file__).with_name("digests.json")
BUDGETS = (16, 64)
SCENES = 20
FAMILY_METHODS = (("vispruner", {}), ("visionzip", {}), ("divprune", {}))
"""One that ranks by attention, one that merges, and one that compares features."""


def digest(*parts: Any) -> str:
    """Return a digest of tensors, numbers and texts, by their values to the bit."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            x = part.detach().cpu().contiguous()
            sha.update(f"{x.dtype}{tuple(x.shape)}".encode())
            sha.update(x.view(torch.uint8).numpy().tobytes() if x.numel() and x.dim() else repr(x.tolist()).encode())
        else:
            sha.update(repr(part).encode())
    return sha.hexdigest()[:16]


def nano_entries() -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield for each method at each budget a label, the method's name, and parameters of which the first allowed count.

    Some methods take shares alone, or cannot come down so far in four layers: these have the budget of their table.
    """
    for budget in BUDGETS:
        for entry in METHODS + IN_LLM + STAGED:
            name, config = entry[0], dict(entry[1])
            if name == "codebook":
                config["codebook"] = _codebook_file()
            if name == "dyvte":
                config["gates"] = _gates_file()
            keeps = [budget, budget / 256] if name not in ("todre_exit", "visual_exit", "dyvte") else []
            yield (
                f"{method_id(entry)} {budget}",
                name,
                [*({**config, "keep": k} for k in keeps), config],
            )


def of_nano() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what each method decides on scenes, and what nano answers then."""
    net, processor = nano.load()
    shown = list(nano.scenes(5, SCENES, "validation"))
    texts = [f"<image> {s.questions[0].text}" for s in shown]
    inputs = processor(images=[s.image for s in shown], text=texts, return_tensors="pt", padding=True)
    yield (
        "features",
        {"of": digest(foveate.reduce(net, inputs, "random", keep=255)["mm_encoder_outputs"]["image"].pooler_output[0])},
    )
    for label, name, configs in nano_entries():
        handle, out = _first_allowed(net, inputs, name, configs)
        answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield label, {"answers": [a.strip() for a in answers], **_decided(handle)}


def _first_allowed(net: Any, inputs: Any, name: str, configs: list[dict[str, Any]]) -> tuple[Any, Tensor]:
    for config in configs[:-1]:
        try:
            with foveate.attach(net, name, **config) as handle:
                return handle, net.generate(**inputs, max_new_tokens=4)
        except BudgetError:
            continue
    with foveate.attach(net, name, **configs[-1]) as handle:
        return handle, net.generate(**inputs, max_new_tokens=4)


def _decided(handle: Any) -> dict[str, Any]:
    rows = [handle.selections, *(handle.layers[layer] for layer in sorted(handle.layers))]
    spans = [span for row in rows for prompt in row for span in prompt]
    merged = [x for span in spans if span.merge is not None for x in vars(span.merge).values()]
    return {"kept": digest(*(span.kept for span in spans)), "merge": digest(*merged), "counts": [len(s) for s in spans]}


def of_families() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the reduced inputs of every family's tiny model."""
    for family in FAMILIES:
        net, inputs = model(family), collate(samples(family))
        for entry in FAMILY_METHODS:
            reducer = make(entry, 0.3, family)
            if lacking := _lacking(family, reducer):
                yield f"{family} {entry[0]}", {"refused": lacking}
                continue
            with torch.no_grad():
                reduced = foveate.reduce(net, inputs, reducer)
            yield f"{family} {entry[0]}", {"inputs": digest(*_flat(dict(reduced)))}


def _lacking(family: str, reducer: Any) -> str | None:
    from foveate.families import all_families

    return all_families()[family].lacks(reducer)


def _flat(value: Any) -> Iterable[Any]:
    """Return the tensors and numbers of nested model inputs, in the order of their names."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in (key, *_flat(value[key]))]
    if isinstance(value, list | tuple):
        return [x for part in value for x in _flat(part)]
    return [value]


def _codebook_file() -> str:
    from foveate.core.codebook import Codebook, projector_hash
    from foveate.families import family_of

    path = Path(codebook_file(None)).with_name("nano.safetensors")
    if not path.exists():
        net, _ = nano.load()
        width = net.get_input_embeddings().weight.shape[-1]
        prototypes = torch.randn(7, width, generator=torch.Generator().manual_seed(5))
        Codebook(prototypes, "llava", projector_hash(family_of(net).projector(net))).save(path)
    return str(path)


def _gates_file() -> str:
    from foveate.core.exit_gates import Gates

    path = Path(codebook_file(None)).with_name("nano-gates.safetensors")
    if not path.exists():
        net, _ = nano.load()
        Gates(range(4), net.get_input_embeddings().weight.shape[-1], 16).initialise(6).save(path)
    return str(path)


def found() -> dict[str, dict[str, Any]]:
    """Return all digests."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"nano": dict(of_nano()), "families": dict(of_families())}
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    path.write_text(json.dumps(found(), indent=1) + "\n", encoding="utf-8")
