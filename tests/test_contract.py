"""What a method may declare and return: each mistake is one error that names the method, what came, what was due."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import Chain, FoveateError, VisPruner, nano
from foveate.author import (
    ContractError,
    CropBatch,
    CropMerger,
    CropReducer,
    EncoderReducer,
    Groups,
    InLlmReducer,
    LayerTokens,
    Merge,
    Reducer,
    Selection,
    SpanSelection,
    VisualTokens,
    checked_values,
    probes,
    ranking,
    register,
)
from foveate.core import checks
from foveate.nano.runner import Condition, Runner
from tiny import collate, deep_model, model, sample

INPUTS = collate([sample(4, "image", 5, seed=1), sample(2, "image", 3, "image", 6, seed=2)])


@dataclass(frozen=True)
class Faulty(Reducer):
    """A method that returns what `make` makes of the right answer and of what it sees."""

    make: Any = None

    name = "faulty"
    needs = (probes.Attention(),)

    def select(self, tokens: VisualTokens) -> Selection:
        right = tokens.per_crop(self.keep, lambda crops, n: ranking.top(crops.probe(probes.Attention()), n))
        return self.make(right, tokens)


def changed(**changes: Any) -> Any:
    return lambda right, _: Selection(tuple(replace(span, **changes) for span in right))


def kept(f: Any) -> Any:
    return lambda right, _: Selection(tuple(replace(span, kept=f(span.kept)) for span in right))


def merging(f: Any) -> Any:
    def make(right: Selection, _: Any) -> Selection:
        own = [torch.arange(len(span)) for span in right]
        merges = [Merge(i, span.kept, torch.ones(len(i))) for i, span in zip(own, right, strict=True)]
        return Selection(tuple(replace(s, merge=replace(m, **f(m))) for s, m in zip(right, merges, strict=True)))

    return make


SHAPES = {
    "half of the budget": (kept(lambda k: k[::2]), "keeps 5 of the 64 .* keep=9 is due 9"),
    "four times the budget": (
        lambda right, tokens: Faulty(keep=36, make=lambda all_, _: all_).select(tokens),
        "keeps 36 of the 64 .* is due 9",
    ),
    "a mask": (lambda right, tokens: torch.ones(64, dtype=torch.bool), r"returns a mask \[64\] .* not a Selection"),
    "scores": (lambda right, tokens: tokens.probe(probes.Attention()), "returns a list, and not a Selection"),
    "nothing": (lambda *_: None, "returns a NoneType, and not a Selection"),
    "a span too few": (lambda right, _: Selection(tuple(right)[:-1]), "selection of 2 spans, but 3 are due"),
    "no spans": (lambda right, _: Selection(tuple(s.kept for s in right)), "made of SpanSelection, not of a tensor"),
    "another length": (changed(length=9), "length 9, .* where length 64"),
    "another prompt": (changed(sample=7), "sample 7 .* where length 64, sample 0"),
    "another kind": (changed(kind="video"), "kind 'video', where"),
    "a mask for kept": (
        changed(kept=torch.ones(9, dtype=torch.bool)),
        r"kept is a tensor \[K\] of torch.int64, not a mask",
    ),
    "floats for kept": (kept(lambda k: k.float()), "kept is a tensor .* not a tensor .* torch.float32"),
    "int32 for kept": (kept(lambda k: k.int()), "kept is a tensor .* not a tensor .* torch.int32"),
    "a row for kept": (kept(lambda k: k[None]), r"not a tensor \[1, 9\]"),
    "a list for kept": (kept(lambda k: k.tolist()), "kept is a tensor .* not a list"),
    "undeclared merging": (merging(lambda m: {}), "merges tokens, but declares merges = None"),
}
"""Faults that shapes and types tell, which are always found."""


@pytest.mark.parametrize("fault", SHAPES)
@pytest.mark.parametrize("way", ["reduce", "attach", "chain"])
def test_faults_of_shape(fault, way, monkeypatch):
    make, message = SHAPES[fault]
    monkeypatch.setattr(checks, "_values", checks.ContextVar("off", default=False))
    net, faulty = model("llava"), Faulty(keep=9, make=make)

    def attached():
        with foveate.attach(net, faulty):
            net(**INPUTS)

    calls = {
        "reduce": lambda: foveate.reduce(net, INPUTS, faulty),
        "chain": lambda: foveate.reduce(net, INPUTS, Chain(faulty, VisPruner(keep=4))),
        "attach": attached,
    }
    with pytest.raises(ContractError, match=f"faulty.*{message}"):
        calls[way]()


VALUES = {
    "token 0 many times": (kept(torch.zeros_like), "keeps a token twice, or not in order"),
    "descending": (kept(lambda k: k.flip(0)), "keeps a token twice, or not in order"),
    "behind the end": (kept(lambda k: k + 60), "of a span of 64 tokens"),
    "negative": (kept(lambda k: k - 64), "keeps positions -"),
}
"""Faults that only values tell, which are found within `checked_values`."""
MERGES = {
    "targets behind the end": (lambda m: {"target": m.target + 1}, "each of the 9 kept tokens is the target"),
    "a token without a source": (lambda m: {"target": torch.zeros_like(m.target)}, "each of the 9 kept tokens"),
    "sources behind the end": (lambda m: {"source": m.source + 64}, "but there are 64 rows"),
    "infinite weights": (lambda m: {"weight": m.weight / 0}, "weights that are no finite numbers"),
    "float targets": (lambda m: {"target": m.target.float()}, "the target of a merge is a tensor"),
    "integer weights": (lambda m: {"weight": m.weight.long()}, "the weight of a merge is a tensor"),
    "a weight too few": (lambda m: {"weight": m.weight[1:]}, "as many targets as sources and weights, not 9, 9 and 8"),
}


@pytest.mark.parametrize("fault", VALUES)
def test_faults_of_value(fault):
    make, message = VALUES[fault]
    with pytest.raises(ContractError, match=f"faulty.*{message}"), checked_values():
        foveate.reduce(model("llava"), INPUTS, Faulty(keep=9, make=make))


@pytest.mark.parametrize("fault", MERGES)
def test_faults_of_merges(fault, monkeypatch):
    change, message = MERGES[fault]
    monkeypatch.setattr(Faulty, "merges", "features")
    with pytest.raises(ContractError, match=f"faulty.*{message}"), checked_values():
        foveate.reduce(model("llava"), INPUTS, Faulty(keep=9, make=merging(change)))


@dataclass(frozen=True)
class Picking(CropReducer):
    make: Any = None

    name = "picking"
    needs = (probes.Attention(),)

    def pick(self, crops: CropBatch, count: int) -> Tensor:
        return self.make(crops, count)


@dataclass(frozen=True)
class Grouping(CropMerger):
    make: Any = None

    name = "grouping"
    needs = (probes.Attention(),)
    merges = "features"

    def pick(self, crops: CropBatch, count: int) -> Groups:
        index = torch.arange(count).expand(len(crops.ordinals), -1)
        return self.make(Groups(index, index, index, torch.ones(index.shape)))


PICKS = {
    "scores": (lambda crops, n: crops.probe(probes.Attention()), r"pick returns \[3, 64\] of torch.float32"),
    "a mask": (lambda crops, n: crops.probe(probes.Attention()) > 0, r"pick returns \[3, 64\] of torch.bool"),
    "too few": (lambda crops, n: ranking.top(crops.probe(probes.Attention()), n - 1), r"\[3, 8\] .* \[3, 9\]"),
    "one row": (lambda crops, n: torch.arange(n), r"pick returns \[9\]"),
    "nothing": (lambda crops, n: None, "pick returns a NoneType"),
    "an unknown probe": (lambda crops, n: crops.probe(probes.Keys()), r"reads Keys\(.*\), .* list it in needs"),
}
GROUPS = {
    "indices": (lambda g: g.kept, "pick returns a Tensor, where Groups"),
    "too few": (lambda g: replace(g, kept=g.kept[:, 1:]), "pick merges by kept"),
    "a float index": (lambda g: replace(g, source=g.source.float()), "all but the weights of torch.int64"),
    "a weight too few": (lambda g: replace(g, weight=g.weight[:, 1:]), "pick merges by kept"),
    "a crop too few": (lambda g: replace(g, target=g.target[:1]), "pick merges by kept"),
}


@pytest.mark.parametrize(("cls", "fault"), [*((Picking, f) for f in PICKS), *((Grouping, f) for f in GROUPS)])
def test_faults_of_picks(cls, fault):
    make, message = (PICKS if cls is Picking else GROUPS)[fault]
    with pytest.raises(ContractError, match=f"{cls.name}: .*{message}"):
        foveate.reduce(model("llava"), INPUTS, cls(keep=9, make=make))


@dataclass(frozen=True)
class Inside(InLlmReducer):
    keep: Any = None
    at: Any = (2,)
    left: Any = (9,)
    make: Any = None

    name = "inside"
    needs = (probes.LayerAttention("last"),)

    def boundaries(self, depth: int) -> Any:
        return self.at

    def counts(self, depth: int, images: Any) -> Any:
        return self.left

    def select(self, tokens: LayerTokens) -> Selection:
        if self.make is not None:
            return self.make(tokens)
        return tokens.per_prompt(lambda crops, n: ranking.top(crops.probe(probes.LayerAttention("last")), n))


INSIDE = {
    "layer 99 of 4": ({"at": (99,)}, r"inside.boundaries\(4\) returns \(99,\), .* at most 3"),
    "layer 0": ({"at": (0,)}, r"returns \(0,\)"),
    "descending layers": ({"at": (3, 1), "left": (9, 9)}, r"returns \(3, 1\)"),
    "a single layer": ({"at": 2}, "returns 2, where whole numbers are due"),
    "a share of the depth": ({"at": (0.5,)}, r"returns \(0.5,\)"),
    "no count": ({"left": ()}, r"inside.counts\(4, ...\) returns \(\) of 64 tokens, where one whole number"),
    "a count for each image": ({"left": (9, 9)}, r"returns \(9, 9\) of 64"),
    "a share for a count": ({"left": (0.5,)}, r"returns \(0.5,\) of 64"),
    "a negative count": ({"left": (-1,)}, r"returns \(-1,\)"),
    "too few left": (
        {"make": lambda t: t.selection({i: [torch.arange(5)] for i in range(len(t.spans))})},
        "leaves 5 of 64 tokens in front of layer 2, where counts.. is due 9",
    ),
    "too many left": (
        {"make": lambda t: t.selection({i: [torch.arange(20)] for i in range(len(t.spans))})}, "leaves 20 of 64",
    ),
    "scores": ({"make": lambda t: t.probe(probes.LayerAttention("last"))}, "returns a list, and not a Selection"),
    "a mask per prompt": (
        {"make": lambda t: t.per_prompt(lambda c, n: c.probe(probes.LayerAttention("last")) > 0)}, "of torch.bool",
    ),
    "an unknown probe": (
        {"make": lambda t: t.per_prompt(lambda c, n: c.probe(probes.LayerKeys()))}, r"LayerKeys\(\), .* list it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", INSIDE)
@pytest.mark.parametrize("chained", [False, True])
def test_faults_inside_the_llm(fault, chained):
    config, message = INSIDE[fault]
    net, method = deep_model("llava"), Inside(**config)
    method = Chain(VisPruner(keep=64), method) if chained else method
    with pytest.raises(ContractError, match=message) as caught, foveate.attach(net, method):
        net(**collate([sample(4, "image", 5, seed=1)]))
    assert "inside" in str(caught.value)


@dataclass(frozen=True)
class Listed(Inside):
    layers: Any = ()


def test_parameters_inside_the_llm_can_be_part_of_a_key():
    with pytest.raises(ContractError, match=r"listed has a parameter.*turn lists into tuples"):
        foveate.attach(deep_model("llava"), Listed(keep=9, layers=[1, 2]))
    foveate.attach(deep_model("llava"), Listed(keep=9, layers=(1, 2))).detach()


def declared(base: type, **declarations: Any) -> type:
    def select(self: Any, tokens: Any) -> Any:
        raise AssertionError

    body = {"select": select, "boundaries": select, "counts": select, "step": select, "schedule": select}
    cls = type("Declared", (base,), {**body, **declarations, "__annotations__": {"keep": Any}, "__module__": __name__})
    return dataclass(frozen=True)(cls)


DECLARATIONS = {
    "reads for needs": (Reducer, {"reads": (probes.Attention(),)}, "declares 'reads': .* called needs"),
    "probes for needs": (Reducer, {"probes": lambda self: ()}, "declares 'probes'"),
    "llm_probes for needs": (InLlmReducer, {"llm_probes": lambda self: ()}, "declares 'llm_probes'"),
    "a probe alone": (Reducer, {"needs": probes.Attention()}, "needs is a tuple of probes .* not a Attention"),
    "a class of probes": (Reducer, {"needs": (probes.Attention,)}, r"not \(Attention,\)"),
    "names of probes": (Reducer, {"needs": ("attention",)}, r"not \('attention',\)"),
    "a list of probes": (Reducer, {"needs": [probes.Attention()]}, "not a list"),
    "LLM probes before it": (Reducer, {"needs": (probes.LayerKeys(),)}, "derive it from InLlmReducer"),
    "members": (EncoderReducer, {"needs": (probes.Members(),)}, "leave it out"),
    "an unknown stage": (Reducer, {"stage": "after_llm"}, "stage is one of 'before_llm', 'pixels', not 'after_llm'"),
    "a stage of others": (Reducer, {"stage": "in_llm"}, "stage is one of"),
    "pixels without a plan": (Reducer, {"stage": "pixels"}, "acts on pixels and needs plan"),
    "merging that is none": (Reducer, {"merges": True}, "merges is one of None, 'encoder'"),
    "positions that are none": (Reducer, {"positions": "relative"}, "positions is one of 'original', 'compact'"),
    "a unit that is none": (InLlmReducer, {"unit": "token"}, "unit is one of 'prompt'"),
    "a flag as text": (Reducer, {"query_aware": "yes"}, "query_aware is one of True, False, not 'yes'"),
    "the question denied": (
        Reducer, {"needs": (probes.Query(),), "query_aware": False}, r"needs Query\(\) and declares",
    ),
    "budgets that are no parameters": (Reducer, {"budgets": ("ratio",)}, r"declares the budgets \['ratio'\]"),
    "judges without a choice": (
        InLlmReducer, {"needs": (probes.LayerAttention("judges"),)}, "has no judges",
    ),
    "a prior that nobody makes": (InLlmReducer, {"needs": (probes.Prior(),)}, "has no prior"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DECLARATIONS)
def test_faults_of_declarations(fault):
    base, declarations, message = DECLARATIONS[fault]
    cls = declared(base, **declarations)
    with pytest.raises(ContractError, match=message):
        register("declared")(cls)
    assert "declared" not in foveate.list_methods()
    with pytest.raises(FoveateError, match=message):  # one that nobody registered
        foveate.attach(model("llava"), cls(keep=4))


def test_faults_of_needs_that_are_properties():
    cls = declared(Reducer, needs=property(lambda self: probes.Attention()))
    with pytest.raises(ContractError, match="needs is a tuple of probes"):
        foveate.reduce(model("llava"), INPUTS, cls(keep=4))


def test_what_asks_for_the_question_is_query_aware():
    assert declared(Reducer, needs=(probes.Query(),))(keep=4).query_aware
    assert not declared(Reducer, needs=(probes.Features(),))(keep=4).query_aware
    assert declared(InLlmReducer, needs=(probes.LayerAttention("text"),))(keep=4).query_aware
    assert not declared(InLlmReducer, needs=(probes.LayerAttention("visual"),))(keep=4).query_aware
    assert Chain(VisPruner(keep=9), foveate.load_reducer("cdpruner", keep=4)).query_aware


def test_adaptive_methods_may_keep_less():
    half = kept(lambda k: k[::2])
    with pytest.raises(ContractError):
        foveate.reduce(model("llava"), INPUTS, Faulty(keep=9, make=half))
    adaptive = dataclass(frozen=True)(type("Adaptive", (Faulty,), {"adaptive": True, "__module__": __name__}))
    assert [len(s) for s in foveate.reduce(model("llava"), INPUTS, adaptive(keep=9, make=half)).selection] == [5] * 3
    with pytest.raises(ContractError, match="at most 9"):
        foveate.reduce(model("llava"), INPUTS, adaptive(keep=9, make=changed(kept=torch.arange(10))))


def test_evaluations_check_values(monkeypatch):
    monkeypatch.setattr(checks, "_values", checks.ContextVar("off", default=False))
    runner = Runner(*nano.load())
    shown = next(nano.scenes(1, 1, "validation"))
    twice = Faulty(keep=9, make=kept(torch.zeros_like))
    inputs, tokens = runner.look(shown.image, [twice])
    with pytest.raises(ContractError, match="faulty keeps a token twice"):
        runner.ask(inputs, tokens, Condition("faulty", twice), shown.questions[:1])


def test_a_method_has_a_name_before_it_is_registered():
    assert declared(Reducer).name == "declared"
    assert Inside().to_dict()["method"] == "inside"
    assert SpanSelection(3, torch.arange(3)).kind == "image"
