"""Torch's ambient state, whatever it is, changes nothing of what is kept."""

import contextlib
import threading

import pytest
import torch
from inside import generate

import foveate
from callers import same_selection
from foveate.core.ambient import neutral
from foveate.core.checks import selected
from foveate.registry import get_method
from tiny import FAMILIES, IN_LLM, METHODS, STAGED, collate, deep_model, make, method_id, model, samples, visual_tokens

AUTOCAST = {"autocast-bf16": torch.bfloat16, "autocast-fp16": torch.float16}
DTYPES = {"dtype-bf16": torch.bfloat16, "dtype-fp16": torch.float16, "dtype-f64": torch.float64}
STATES = [*AUTOCAST, *DTYPES, "device-meta"]
LAYOUT = [(0, [(3, 4)]), (1, [(3, 4), (3, 4)])]

every_state = pytest.mark.parametrize("state", STATES)


@contextlib.contextmanager
def ambient(state):
    """Put torch into a state for a while."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if state in AUTOCAST:
            stack.enter_context(torch.autocast("cpu", AUTOCAST[state]))
        elif state == "device-meta":
            stack.enter_context(torch.device("meta"))
        else:
            torch.set_default_dtype(DTYPES[state])
            stack.callback(torch.set_default_dtype, before)
        yield


def same(a, b):
    """Compare selections by prompt."""
    return all(map(same_selection, a, b))


@every_state
@pytest.mark.parametrize("entry", METHODS, ids=method_id)
def test_methods_before_the_llm_decide_the_same(entry, state):
    reducer = make(entry, 5)
    if reducer.stage == "pixels":
        pytest.skip("a smaller picture is encoded, and nothing decided")
    tokens = visual_tokens(reducer, LAYOUT)
    expected = selected(reducer, tokens)
    with ambient(state):
        assert same_selection(selected(reducer, tokens), expected)


@every_state
@pytest.mark.parametrize("entry", METHODS, ids=method_id)
def test_generation_with_methods_before_the_llm(entry, state):
    net, inputs, reducer = model("llava"), collate(samples("llava")), make(entry, 5, "llava")
    with foveate.attach(net, reducer) as handle:
        expected = generate(net, inputs)
        selections = handle.selections
        with ambient(state):
            out = generate(net, inputs)
    if state in AUTOCAST:  # the tower runs in half precision then, and features differ
        assert [list(map(len, row)) for row in handle.selections] == [list(map(len, row)) for row in selections]
    else:
        assert same(handle.selections, selections)
        assert torch.equal(out.sequences, expected.sequences)


@every_state
@pytest.mark.parametrize("family", FAMILIES)
def test_bookkeeping_of_every_family(family, state):
    net, inputs = model(family), collate(samples(family))
    expected = foveate.reduce(net, inputs, "uniform", keep=3)
    with ambient(state):
        reduced = foveate.reduce(net, inputs, "uniform", keep=3)
    assert same_selection(reduced.selection, expected.selection)
    planes = [key for key, x in expected.items() if isinstance(x, torch.Tensor)]
    assert planes == [key for key, x in reduced.items() if isinstance(x, torch.Tensor)]
    assert all(torch.equal(reduced[key], expected[key]) for key in planes)


@every_state
@pytest.mark.parametrize("entry", IN_LLM + STAGED, ids=method_id)
def test_generation_with_methods_inside_the_llm(entry, state):
    name, config = entry
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, get_method(name)(**config)) as handle:
        expected = generate(net, inputs)
        layers = handle.layers
        with ambient(state):
            out = generate(net, inputs)
    if state in AUTOCAST:
        assert handle.layers.keys() == layers.keys() or handle.method.adaptive
    else:
        assert torch.equal(out.sequences, expected.sequences)
        assert handle.layers.keys() == layers.keys()
        assert all(same(handle.layers[key], layers[key]) for key in layers)


def test_the_default_dtype_comes_back_once_the_last_thread_has_left():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with neutral():
            inside.set()
            leave.wait()

    with ambient("dtype-bf16"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        with neutral():
            leave.set()
            thread.join()
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
