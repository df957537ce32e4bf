import torch
from by_hand import check_boxes, check_inside, received, saliency

import foveate
from foveate.families import family_of
from foveate.methods import Downsample, Random
from tiny import collate, model, samples


def test_attention_is_that_of_the_last_layer():
    net, inputs = model("paligemma", "eager"), collate(samples("paligemma"))
    patches = received(net.model.vision_tower, pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(torch.stack(saliency(net, inputs)), patches)


def test_features_are_behind_the_last_norm():
    net, inputs = model("paligemma"), collate(samples("paligemma"))
    family = family_of(net)
    with torch.no_grad():
        tokens = family.encode(net, inputs, family.spans(net, inputs), ())
        expected = net.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert torch.equal(torch.stack(tokens.hidden), expected)


def test_methods_inside_the_encoder_stop_before_the_last_norm():
    net, inputs = model("paligemma"), collate(samples("paligemma"))
    with torch.no_grad():
        features = net.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    check_inside(net, inputs, features, 9)


def test_tokens_are_where_their_boxes_are():
    net, inputs = model("paligemma"), collate(samples("paligemma")[:1])
    assert check_boxes(net, inputs, [(32, 32)]) == 64


def test_only_kept_tokens_are_projected():
    net, inputs = model("paligemma"), collate(samples("paligemma"))
    seen = []
    net.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    foveate.reduce(net, inputs, Random(keep=7))
    assert seen == [28]


def test_a_suffix_stays_causal():
    """Answers to train on have the type 1, and nothing in the prefix may see them."""
    net, inputs = model("paligemma"), collate(samples("paligemma")[:1])
    inputs["token_type_ids"][:, -3:] = 1
    reduced = foveate.reduce(net, inputs, Random(keep=7))
    assert reduced["token_type_ids"].tolist() == [[0] * (4 + 7 + 2) + [1] * 3]
    other = {**reduced, "input_ids": reduced["input_ids"].clone()}
    other["input_ids"][:, -1] += 1
    with torch.no_grad():
        assert torch.equal(net(**reduced).logits[:, :-1], net(**other).logits[:, :-1])


def test_smaller_pictures():
    net, inputs = model("paligemma"), collate(samples("paligemma"))
    reduced = foveate.reduce(net, inputs, Downsample(keep=16))
    small = torch.nn.functional.interpolate(inputs["pixel_values"], size=(16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        tower = net.model.vision_tower(small, interpolate_pos_encoding=True)
        expected = net.model.multi_modal_projector(tower.last_hidden_state).flatten(0, 1)
    torch.testing.assert_close(reduced["mm_encoder_outputs"]["image"].pooler_output[:, 0], expected, atol=1e-5, rtol=0)
