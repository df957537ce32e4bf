"""A picture that is no numbers is refused by name, whatever the method."""

import math

import pytest
from inside import generate

import foveate
from foveate.core.errors import InputError
from foveate.registry import get_method
from tiny import FAMILIES, IN_LLM, METHODS, STAGED, collate, deep_model, make, method_id, model, samples

values = pytest.mark.parametrize("value", [math.nan, math.inf])


def broken(family, value):
    """Return inputs whose first pixel is no number."""
    inputs = collate(samples(family))
    key = next(k for k in inputs if k.startswith("pixel_values") and inputs[k].is_floating_point())
    pixels = inputs[key].clone()
    pixels.view(-1)[0] = value
    return {**inputs, key: pixels}


@values
@pytest.mark.parametrize("entry", METHODS, ids=method_id)
def test_methods_before_the_llm(entry, value):
    with pytest.raises(InputError, match=r"features of image 0 of prompt 0 \(counted from 0\) hold NaN"):
        foveate.reduce(model("llava"), broken("llava", value), make(entry, 5, "llava"))


@values
@pytest.mark.parametrize("entry", IN_LLM + STAGED, ids=method_id)
def test_methods_inside_the_llm(entry, value):
    net = deep_model("llava")
    with (
        foveate.attach(net, get_method(entry[0])(**entry[1])),
        pytest.raises(InputError, match=r"features of image 0 of prompt 0 \(counted from 0\) hold NaN"),
    ):
        generate(net, broken("llava", value))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    with pytest.raises(InputError, match="hold NaN or infinite values"):
        foveate.reduce(model(family), broken(family, math.nan), "uniform", keep=3)


def test_features_that_overflow():
    net, inputs = model("llava"), collate(samples("llava"))
    hook = net.model.vision_tower.register_forward_pre_hook(lambda m, a: (a[0] * math.inf, *a[1:]))
    try:
        with pytest.raises(InputError, match="image 0 of prompt 0, image 0 of prompt 1"):
            foveate.reduce(net, inputs, "uniform", keep=3)
    finally:
        hook.remove()
