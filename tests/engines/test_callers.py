"""Callers that call in another way than the examples do: right, or refused at once with the reason."""

import functools
import threading

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import foveate
from callers import check_threads
from foveate import Chain, VisPruner
from foveate.core.errors import AttachError, UnsupportedModelError
from foveate.methods import FastV, ToMe, TopV
from tiny import FAMILIES, collate, deep_model, in_depth, model, sample, samples

METHODS = [VisPruner(keep=9), FastV(keep=9, layer=1), Chain(VisPruner(keep=16), FastV(keep=9, layer=2))]
INPUTS = collate([sample(4, "image", 5, seed=1), sample(2, "image", 3, "image", 6, seed=2)])
OTHERS = {key: value for key, value in INPUTS.items() if key != "input_ids"}


class Whole(LogitsProcessor):
    """Notes how long the prompts are that it is shown."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


class Enough(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
def test_arguments_by_place_are_those_by_name(reducer):
    net, width = deep_model("llava"), INPUTS["input_ids"].shape[1]
    config = GenerationConfig(max_length=width + 9, do_sample=False, pad_token_id=0)
    with foveate.attach(net, reducer):
        by_name, by_place = Whole(), Whole()
        stops = StoppingCriteriaList([Enough(width + 4)])
        expected = net.generate(
            **INPUTS, generation_config=config, logits_processor=LogitsProcessorList([by_name]), stopping_criteria=stops
        )
        got = net.generate(INPUTS["input_ids"], config, LogitsProcessorList([by_place]), stops, **OTHERS)
        assert torch.equal(got, expected)
        assert got.shape[1] == width + 4
        assert by_place.lengths == by_name.lengths == [width, width + 1, width + 2, width + 3]
        kwargs = {"generation_config": config}
        with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
            net.generate(INPUTS["input_ids"], config, **kwargs, **OTHERS)


@pytest.mark.parametrize("family", [pytest.param(name, marks=in_depth(name)) for name in FAMILIES])
def test_a_configuration_by_place_on_every_family(family):
    net, inputs = model(family), collate(samples(family))
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    with foveate.attach(net, "random", keep=5):
        expected = net.generate(**inputs, generation_config=config)
        assert torch.equal(net.generate(inputs["input_ids"], config, **others), expected)


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
@pytest.mark.parametrize("taken", ["before", "from the class"])
def test_a_generate_that_knows_nothing_is_refused(reducer, taken):
    net = deep_model("llava")
    before, plain = net.generate, net.generate(**INPUTS, max_new_tokens=3)
    with foveate.attach(net, reducer):
        generate = before if taken == "before" else functools.partial(type(net).generate, net)
        with pytest.raises(AttachError, match=r"call model\.generate"):
            generate(**INPUTS, max_new_tokens=3)
        reduced = net.generate(**INPUTS, max_new_tokens=3)
    assert torch.equal(before(**INPUTS, max_new_tokens=3), plain)
    assert torch.equal(type(net).generate(net, **INPUTS, max_new_tokens=3), plain)
    assert "prepare_inputs_for_generation" not in vars(net)
    assert reduced.shape == plain.shape


def test_threads_that_attach_get_one_handle():
    for _ in range(5):
        net, start, handles, refused = model("llava"), threading.Barrier(4), [], []
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

        def attach(net=net, start=start, handles=handles, refused=refused):
            start.wait()
            try:
                handles.append(foveate.attach(net, FastV(keep=9, layer=1)))
            except AttachError as error:
                refused.append(error)

        threads = [threading.Thread(target=attach) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(handles), len(refused)) == (1, 3)
        handles[0].detach()
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == hooks
        foveate.attach(net, VisPruner(keep=9)).detach()


def test_a_failed_attachment_leaves_nothing():
    net = model("llava")  # of two layers
    with pytest.raises(foveate.FoveateError, match="layers 0 to 1"):
        foveate.attach(net, FastV(keep=9, layer=7))
    foveate.attach(net, VisPruner(keep=9)).detach()


def test_a_model_that_is_refused_stays_as_it_was():
    net = deep_model("llava")
    for layer in net.get_decoder().layers:
        layer.block = layer.mlp
        del layer.mlp
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("config")) for m in net.modules()]
    with pytest.raises(UnsupportedModelError, match="no feed-forward network"):
        foveate.attach(net, TopV(keep=0.4, layer=1, target="mlp"))
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("config")) for m in net.modules()]
    assert all(a[:2] == b[:2] and a[2] is b[2] for a, b in zip(after, before, strict=True))
    foveate.attach(net, VisPruner(keep=9)).detach()


def test_threads_do_not_see_each_other_inside_the_encoder():
    check_threads("llava", ToMe(keep=9))


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
def test_threads_read_their_own_selections(reducer):
    net, turns = deep_model("llava"), [threading.Event(), threading.Event()]
    few, many = collate([sample(4, "image", 5)]), collate([sample(2, "image", 3, "image", 6), sample(1, "image", 4)])
    found = {}

    def first(handle):
        net(**few)
        turns[0].set()
        assert turns[1].wait(60)
        found["first"] = [len(row) for row in handle.selections], len(handle.received), sorted(handle.layers)

    def second(handle):
        assert turns[0].wait(60)
        net(**many)
        found["second"] = [len(row) for row in handle.selections], len(handle.received), sorted(handle.layers)
        turns[1].set()

    layers = {METHODS[1]: [1], METHODS[2]: [2]}.get(reducer, [])
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        assert (handle.selections, handle.layers, handle.received) == ([], {}, [])
        threads = [threading.Thread(target=ask, args=(handle,)) for ask in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"first": ([1], 1, layers), "second": ([2, 1], 2, layers)}
        # A thread that has made no call, such as the one that reads what a streamer is given, learns of the last one.
        assert [len(row) for row in handle.selections] == [2, 1]
        net(**few)
        worker = threading.Thread(target=net.generate, kwargs={**many, "max_new_tokens": 2})
        worker.start()
        worker.join()
        assert [len(row) for row in handle.selections] == [1]


class Pipeline:
    def __init__(self, net):
        self.model = net


def test_wrappers_say_where_the_model_is():
    net = model("llava")
    wrapped = torch.nn.DataParallel(net)
    for call in (
        lambda m: foveate.attach(m, "vispruner", keep=9),
        lambda m: foveate.reduce(m, INPUTS, "random", keep=9),
    ):
        with pytest.raises(UnsupportedModelError, match=r"DataParallel runs a model of its own: pass its \.module"):
            call(wrapped)
        with pytest.raises(UnsupportedModelError, match=r"Pipeline is no model, but has one: pass its \.model"):
            call(Pipeline(net))
    foveate.attach(wrapped.module, "vispruner", keep=9).detach()
