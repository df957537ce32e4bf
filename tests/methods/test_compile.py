"""Every method decides in one graph whose shapes follow from sizes and budgets, or says why it cannot."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from foveate import Chain
from foveate.methods import EVS, FasterVLM, Uniform
from foveate.registry import get_method, list_methods
from tiny import METHODS, VIDEO_METHODS, make, method_id, of_each_kind, visual_tokens

LAYOUT = [(0, [(3, 4)]), (1, [(3, 4), (3, 4)])]
NOT_ONE_GRAPH = {
    "codebook": "`select` looks whether its file has changed, which no graph can hold; what follows does compile",
    "chain": "does not compile to one graph: how many tokens of a crop are left to the next method depends on values",
}
"""Methods whose `select` does not compile, and what their docstrings say about it."""
WAITING = [("prumerge", {"adaptive": True}), ("text_interaction_image", {}), ("vflowopt", {"a": 2.0, "exact": False})]
"""Options that leave a number of tokens that depends on values."""

one_graph = of_each_kind([entry for entry in METHODS + VIDEO_METHODS if entry[0] not in NOT_ONE_GRAPH])
"""Every method waits for nothing, by fake tensors; that those also compile is a slow test, but for one of each kind."""


def tokens_for(reducer):
    return visual_tokens(reducer, LAYOUT, kind="video" if reducer.video_only else "image")


def tensors(selection):
    """Return all tensors of a selection."""
    return [x for span in selection for x in (span.kept, *(vars(span.merge).values() if span.merge else ()))]


def faked(tokens):
    """Replace what a model computed by tensors without values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    planes = {probe: [mode.from_tensor(x) for x in plane] for probe, plane in tokens.planes.items()}
    queries = tokens.queries and tuple(mode.from_tensor(x) for x in tokens.queries)
    object.__setattr__(tokens, "planes", planes)
    object.__setattr__(tokens, "queries", queries)
    return mode


def test_every_method_before_the_llm_is_in_the_table():
    early = {name for name in list_methods() if get_method(name).stage in ("pixels", "encoder", "before_llm")}
    assert {name for name, _ in METHODS + VIDEO_METHODS} | {"chain"} == early


@pytest.mark.filterwarnings("ignore:Dynamo d")
@pytest.mark.parametrize("entry", one_graph, ids=method_id)
def test_select_compiles_to_one_graph(entry):
    reducer = make(entry, 5)
    tokens = tokens_for(reducer)

    def select(tokens):
        return tensors(reducer.select(tokens))

    torch.compiler.reset()
    compiled = torch.compile(select, fullgraph=True, dynamic=False, backend="eager")(tokens)
    for got, expected in zip(compiled, select(tokens), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:Dynamo d")
@pytest.mark.parametrize("name", NOT_ONE_GRAPH)
def test_methods_that_do_not_compile_say_why(name):
    chain = Chain(Uniform(keep=8), FasterVLM(keep=5))
    reducer = chain if name == "chain" else make((name, {}), 5)
    tokens = tokens_for(reducer)
    torch.compiler.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(reducer.select, fullgraph=True, dynamic=False, backend="eager")(tokens)
    assert NOT_ONE_GRAPH[name] in " ".join(inspect.getdoc(get_method(name)).split())


@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS, ids=method_id)
def test_select_waits_for_nothing(entry):
    reducer = make(entry, 5)
    tokens = tokens_for(reducer)
    expected = [x.shape for x in tensors(reducer.select(tokens))]
    with faked(tokens):
        assert [x.shape for x in tensors(reducer.select(tokens))] == expected


@pytest.mark.parametrize("entry", WAITING, ids=method_id)
def test_options_that_wait_say_so(entry):
    reducer = make(entry, 5)
    tokens = tokens_for(reducer)
    with faked(tokens), pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        reducer.select(tokens)
    doc = " ".join(inspect.getdoc(type(reducer)).split())
    assert "aits for the device once per batch, and so does not compile to one graph" in doc


def test_evs_compiles_on_several_frames():
    reducer = EVS(keep=0.5)
    tokens = visual_tokens(reducer, [(0, [(2, 3)] * 4), (1, [(2, 3)] * 4)], kind="video")
    torch.compiler.reset()
    compiled = torch.compile(lambda x: tensors(reducer.select(x)), fullgraph=True, dynamic=False, backend="eager")
    assert all(map(torch.equal, compiled(tokens), tensors(reducer.select(tokens))))
