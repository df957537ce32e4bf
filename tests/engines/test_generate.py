"""All of the ways to call generate, each as without foveate."""

import pytest
import torch
from oracle import (
    TOKENS,
    answer_logits,
    answer_of,
    both_positions,
    check,
    close,
    every_position_in_depth,
    generate,
)
from transformers import StoppingCriteria

import foveate
from foveate import Budget, Chain
from foveate.methods import Random, Uniform, VisPruner
from tiny import (
    collate,
    model,
    samples,
)


@every_position_in_depth
def test_beams(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, output_scores=True)
    assert out.sequences.shape == (6, inputs["input_ids"].shape[1] + 5)
    prompts = inputs["input_ids"].repeat_interleave(2, 0)
    assert torch.equal(out.sequences[:, : prompts.shape[1]], prompts)

    def score(answers):
        logits = answer_logits(net, inputs, handle.selections, answers, positions)
        return logits.log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2)) / 5

    for k in (0, 1):
        close(out.sequences_scores[k::2], score(answer_of(out, inputs)[k::2]))
    assert (out.sequences_scores[::2] > out.sequences_scores[1::2]).all()


@both_positions
def test_sampling_with_several_answers(positions):
    net, inputs = model("llava"), collate(samples("llava"))
    reducer = Uniform(keep=9)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    with foveate.attach(net, reducer, positions=positions) as handle:
        torch.manual_seed(7)
        out = generate(net, inputs, **options)
    torch.manual_seed(7)
    pure = generate(net, foveate.reduce(net, inputs, reducer, positions=positions), **options)
    assert torch.equal(answer_of(out, inputs), pure.sequences[:, -TOKENS:])
    for k in (0, 1):
        logits = answer_logits(net, inputs, handle.selections, answer_of(out, inputs)[k::2], positions)
        close(torch.stack(out.logits, 1)[k::2], logits)
    assert (out.sequences[0::2] != out.sequences[1::2]).any()


class Recorder:
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_gets_the_whole_prompt():
    net, inputs = model("llava"), collate(samples("llava")[:1])
    streamer = Recorder()
    with foveate.attach(net, Uniform(keep=9)):
        out = net.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert torch.equal(streamer.received[0], inputs["input_ids"])
    assert torch.cat([x.flatten() for x in streamer.received]).tolist() == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}], ids=str)
def test_callbacks_see_the_whole_prompt(options):
    net, inputs = model("llava"), collate(samples("llava"))
    whole, seen = inputs["input_ids"], []

    def note(ids, scores=None):
        each = len(ids) // len(whole)
        assert torch.equal(ids[:, : whole.shape[1]], whole.repeat_interleave(each, dim=0))
        seen.append(ids.shape[1] - whole.shape[1])
        return scores

    class Stop(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            note(ids)
            return torch.full((len(ids),), ids.shape[1] >= whole.shape[1] + 3)

    def allowed(prompt, ids):
        assert torch.equal(ids[: whole.shape[1]], whole[prompt])
        return list(range(5, 40))

    calls = {"stopping_criteria": [Stop()], "logits_processor": [note], "prefix_allowed_tokens_fn": allowed}
    with foveate.attach(net, Random(keep=9)):
        out = net.generate(**inputs, max_new_tokens=9, **calls, **options)
    assert sorted(set(seen)) == [0, 1, 2, 3]
    assert out.shape[1] == whole.shape[1] + 3
    assert bool(((out[:, whole.shape[1] :] >= 5) & (out[:, whole.shape[1] :] < 40)).all())


@pytest.mark.parametrize("how", ["max_length", "config", "config-object", "default", "min_length"])
def test_limits_count_the_whole_prompt(how):
    net, inputs = model("llava"), collate(samples("llava"))
    length, kwargs = inputs["input_ids"].shape[1], {"do_sample": False}
    if how == "max_length":
        kwargs["max_length"] = length + 5
    elif how == "config":
        net.generation_config.max_length = length + 5
    elif how == "config-object":
        kwargs["generation_config"] = foveate_config = type(net.generation_config)(max_length=length + 5)
    elif how == "min_length":
        net.generation_config.eos_token_id = list(range(1, 120))  # would end at once
        kwargs |= {"max_new_tokens": 7, "min_length": length + 5}
    plain = net.generate(**inputs, **kwargs)
    before = net.generation_config.to_dict()
    with foveate.attach(net, Uniform(keep=9)):
        out = net.generate(**inputs, **kwargs)
    assert out.shape == plain.shape
    assert how in ("default", "min_length") or out.shape[1] == length + 5
    assert net.generation_config.to_dict() == before
    assert how != "config-object" or foveate_config.max_length == length + 5


@pytest.mark.parametrize("call", ["positional", "inputs", "keyword"])
def test_ways_to_pass_ids(call):
    net, inputs = model("llava"), collate(samples("llava"))
    ids, rest = inputs["input_ids"], {k: x for k, x in inputs.items() if k != "input_ids"}
    options = {"max_new_tokens": 3, "do_sample": False}
    with foveate.attach(net, Uniform(keep=9)) as handle:
        expected = net.generate(**inputs, **options)
        if call == "positional":
            out = net.generate(ids, **rest, **options)
            logits = net(ids, inputs["pixel_values"], inputs["attention_mask"]).logits
        else:
            out = net.generate(**{"inputs" if call == "inputs" else "input_ids": ids}, **rest, **options)
            logits = net(**inputs).logits
        assert len(handle.selections) == 3
    assert torch.equal(out, expected)
    assert logits.shape[1] < ids.shape[1]


def test_generating_inside_a_chain_of_methods():
    net, inputs = model("llava_next"), collate(samples("llava_next"))
    chain = Chain(Uniform(keep=0.5), VisPruner(keep=Budget(4, per="crop")))
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs)
    check(net, inputs, out, handle.selections, "compact")


@every_position_in_depth
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches(family, positions, options):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs, **options)
    check(net, inputs, out, handle.selections, positions)
