from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import foveate
from foveate.core.errors import FoveateError, InputError, UnsupportedModelError
from foveate.engines.settings import Settings
from foveate.engines.transformers.reduce import reduce_with
from foveate.families import all_families, family_of
from foveate.families.classes import missing
from foveate.families.generic import Generic
from foveate.methods import Downsample, Random, Uniform
from tiny import IMAGE, Visual, collate, model, sample, samples


def generic(net, inputs, reducer, positions="original"):
    family = Generic.of(net)
    return reduce_with(net, family, inputs, Settings.make(reducer, positions, family=family))


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3", "pixtral", "lfm2_vl"])
def test_equals_a_family_that_knows_the_model(name):
    """Lists of images and one tensor for all, with and without inputs beside the pixels."""
    net, inputs = model(name), collate(samples(name))
    own = foveate.reduce(net, inputs, Random(keep=9), positions="original")
    found = generic(net, inputs, Random(keep=9))
    assert set(found) == set(own)
    with torch.no_grad():
        torch.testing.assert_close(net(**found).logits, net(**own).logits, atol=1e-4, rtol=1e-4)


def test_one_flat_tensor_is_split_at_the_text():
    net, inputs = model("llava"), collate(samples("llava"))
    encode = net.get_image_features

    def flat(*args, **kwargs):
        output = encode(*args, **kwargs)
        output.pooler_output = torch.cat(list(output.pooler_output))
        return output

    net.get_image_features = flat
    found = generic(net, inputs, Random(keep=9))
    assert [len(s) for s in found.selection] == [9] * 4
    assert found["mm_encoder_outputs"]["image"].pooler_output.shape == (36, 32)


def test_one_row_per_patch_is_split_at_the_text():
    """Inkling's encoder returns its patches as if each were an image."""
    net, inputs = model("llava"), collate(samples("llava"))
    encode = net.get_image_features

    def by_patch(*args, **kwargs):
        output = encode(*args, **kwargs)
        output.pooler_output = torch.cat(list(output.pooler_output))[:, None]
        return output

    net.get_image_features = by_patch
    found = generic(net, inputs, Random(keep=9))
    assert [len(s) for s in found.selection] == [9] * 4
    assert found["mm_encoder_outputs"]["image"].pooler_output.shape == (36, 1, 32)


def test_encodes_once():
    net, inputs = model("generic"), collate(samples("generic"))
    calls = []
    net.model.vision_encoder.register_forward_hook(lambda *args: calls.append(1))
    with foveate.attach(net, Random(keep=9)):
        net.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(calls) == 1


def test_a_grid_that_is_no_square_is_unknown():
    net = model("generic")
    inputs = collate([sample(2, Visual("generic", (48, 48)), 1, Visual("generic", (32, 48)), 2)])
    family = family_of(net)
    square, other = family.spans(net, inputs)
    assert (square.grid, square.crops[0].grid) == ((1, 6, 6), (6, 6))
    assert (other.grid, other.crops[0].grid) == ((1, 1, 24), None)
    assert [len(s) for s in foveate.reduce(net, inputs, Random(keep=9)).selection] == [9, 9]
    assert [len(s) for s in foveate.reduce(net, inputs, Uniform(keep=[9, 1.0])).selection] == [9, 24]
    with pytest.raises(InputError, match="a model whose family knows the grid"):
        foveate.reduce(net, inputs, Uniform(keep=9))


def test_smaller_pictures_are_refused():
    net = model("generic")
    with pytest.raises(UnsupportedModelError, match="takes smaller pictures"):
        foveate.attach(net, Downsample(keep=9))


def test_other_placeholders_than_the_encoder_makes():
    net, inputs = model("generic"), collate(samples("generic")[:1])
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(IMAGE)] = 5
    with pytest.raises(InputError, match="35 image placeholder tokens, but the 1"):
        foveate.reduce(net, inputs, Random(keep=9))


def test_further_planes_and_videos_are_refused():
    net, inputs = model("generic"), collate(samples("generic")[:1])
    with pytest.raises(UnsupportedModelError, match="no videos"):
        foveate.reduce(net, {**inputs, "pixel_values_videos": inputs["pixel_values"]}, Random(keep=9))
    encode = net.get_image_features

    def deep(*args, **kwargs):
        output = encode(*args, **kwargs)
        return type(output)(**output) | {"deepstack_features": [1]}

    net.get_image_features = deep
    with pytest.raises(UnsupportedModelError, match="have deepstack_features beside tokens"):
        foveate.reduce(net, inputs, Random(keep=9))


def test_what_a_model_lacks():
    class Headless:
        def get_image_features(self): ...
        def forward(self, mm_encoder_outputs): ...

    class Old(Headless):
        def generate(self): ...
        def forward(self): ...

    class Bare:
        def generate(self): ...
        def forward(self, mm_encoder_outputs): ...

    assert missing(Headless) == "a language-model head"
    assert missing(Old) == "mm_encoder_outputs among the arguments of forward"
    assert missing(Bare) == "a method get_image_features"
    assert missing(LlavaForConditionalGeneration) is None


def test_messages_say_what_there_is_and_what_would_be_needed():
    class Old:
        config = SimpleNamespace(model_type="old")

        def generate(self): ...
        def get_image_features(self): ...
        def forward(self): ...

    with pytest.raises(UnsupportedModelError, match=r"'old'\) .* llava, .* this one lacks mm_encoder_outputs among"):
        family_of(Old())

    class Nameless(Old):
        def forward(self, mm_encoder_outputs): ...

    with pytest.raises(UnsupportedModelError, match="this one lacks image_token_id in its configuration"):
        family_of(Nameless())
    with pytest.raises(FoveateError, match="no supported family"):
        family_of(object())


def test_named_families_come_first():
    assert type(family_of(model("generic"))) is Generic
    assert family_of(model("llava")) is all_families()["llava"]
