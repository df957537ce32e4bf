"""ToDRE's second stage, and both together, against the specification's numbers."""

import pytest
import torch
from layer_cases import layer_tokens

import foveate
from foveate import Chain
from foveate.core.errors import FoveateError, UnsupportedModelError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerAttention
from foveate.methods import ToDRE, ToDREAll, ToDREExit
from tiny import collate, deep_model, sample, samples

TEXT = LayerAttention("text")
# 0 system, 1 to 3 visual, 4 and 5 text: attention of the rows 1 to 5.
MAP = [[1, 0, 0, 0, 0, 0], [0.8, 0.2, 0, 0, 0, 0], [0.7, 0.2, 0.1, 0, 0, 0], [0.6, 0.2, 0.1, 0.1, 0, 0],
       [0.7, 0.03, 0.02, 0.01, 0.24, 0], [0.6, 0.02, 0.02, 0.02, 0.14, 0.20]]  # fmt: skip


def masses(text, visual):
    """Return how much attention text gives visual tokens, and how much these give text, as the paper's formulas."""
    a = torch.tensor(MAP, dtype=torch.float64)
    to_visual = a[text][:, visual].sum() / a[text].sum()
    to_text = a[visual][:, text].sum() / a[visual].sum()
    return float(to_visual), float(to_text)


def toy(**further):
    return attended([torch.tensor(MAP)[4:6, 1:4].mean(dim=0)], **further)


def attended(values, **further):
    """Make prompts whose visual tokens get this attention, each with text behind its image."""
    given = {"behind": (2,) * len(values), **further}
    return layer_tokens([len(x) for x in values], [0] * len(values), {TEXT: values}, **given)


def kept(selection):
    return [span.kept.tolist() for span in selection]


def test_toy():
    assert masses([4, 5], [1, 2, 3]) == pytest.approx((0.06, 0.0))
    assert float(toy().probe(TEXT)[0].sum()) == pytest.approx(0.06)
    assert kept(ToDREExit(tau=0.10).select(toy())) == [[]]
    assert kept(ToDREExit(tau=0.05).select(toy())) == [[0, 1, 2]]


def test_toy_what_is_text_matters():
    assert masses([0, 4, 5], [1, 2, 3])[1] == pytest.approx(0.70)


def test_every_prompt_decides_for_itself():
    values = [torch.full((4,), 0.01), torch.full((6,), 0.05), torch.full((2,), 0.049)]
    assert kept(ToDREExit().select(attended(values))) == [[], [0, 1, 2, 3, 4, 5], []]


def test_equal_to_tau_is_not_less():
    assert kept(ToDREExit(tau=0.125).select(attended([torch.full((2,), 0.0625)]))) == [[0, 1]]


def test_without_text_nothing_goes():
    assert kept(ToDREExit(tau=2.0).select(toy(behind=(0,)))) == [[0, 1, 2]]
    assert kept(ToDREExit(tau=0.0).select(toy())) == [[0, 1, 2]]


def test_the_layer():
    assert ToDREExit().boundaries(32) == (28,)
    assert ToDREExit().boundaries(28) == (24,)
    assert ToDREExit(layer=3).boundaries(4) == (3,)
    with pytest.raises(UnsupportedModelError, match="layers 0 to 3"):
        ToDREExit(layer=4).boundaries(4)


@pytest.mark.parametrize("tau", [0.0, 0.86, 2.0])
def test_the_attention_is_that_of_the_last_layer_with_visual_tokens(tau):
    net, inputs = deep_model("llava", "eager"), collate([sample(4, "image", 5)])
    mass = net(**inputs, output_attentions=True).attentions[2][0, :, 68:, 4:68].sum(dim=-1).mean()
    assert 0.1 < mass < 0.99
    with foveate.attach(net, ToDREExit(tau=tau)) as handle, torch.no_grad():
        net(**inputs)
    assert list(handle.layers) == ([3] if mass < tau else [])
    assert len(handle.selections[0][0]) == (0 if mass < tau else 64)


def test_never_leaving_is_bit_identical():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    plain = net(**inputs).logits
    with foveate.attach(net, ToDREExit(tau=0.0)):
        content = inputs["attention_mask"].bool()
        assert torch.equal(net(**inputs).logits[content], plain[content])


def test_both_stages_are_those_alone():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, ToDREAll(keep=16, tau=2.0)) as handle:
        out = net.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert [[len(span) for span in row] for row in handle.selections] == [[0], [0, 0], [0]]
    reduced = foveate.reduce(net, inputs, ToDRE(keep=16))
    with foveate.attach(net, ToDREExit(tau=2.0)):
        two = net.generate(
            **reduced, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(two.logits), atol=1e-5, rtol=1e-5)
    chain = Chain(ToDRE(keep=16), ToDREExit(tau=2.0))
    assert chain.stages() == ToDREAll(keep=16, tau=2.0).stages()


def test_the_schedule_is_the_most_there_can_be():
    assert tokens_per_layer(ToDREAll(keep=0.25), 32, 576) == (144,) * 32


def test_it_has_no_budget():
    with pytest.raises(FoveateError, match="leave keep=8 out"):
        ToDREExit(keep=8)
    assert foveate.load_reducer("todre_exit") == ToDREExit()


@pytest.mark.parametrize(("config", "message"), [({"tau": -0.1}, "tau is"), ({"layer": 0}, "layers of todre_exit")])
def test_impossible_parameters_are_refused(config, message):
    with pytest.raises(FoveateError, match=message):
        ToDREExit(**config)
    with pytest.raises(FoveateError, match=message):
        ToDREAll(keep=8, **config)
