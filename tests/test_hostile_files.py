"""Files that describe no method, codebook, gates or model: one line of a `FoveateError` each."""

import json

import pytest

from foveate.core.codebook import Codebook
from foveate.core.errors import FoveateError
from foveate.core.exit_gates import Gates
from foveate.cost.shapes import SHAPES, load_shape
from foveate.registry import get_method, load_reducer
from tiny import IN_LLM, METHODS, STAGED, VIDEO_METHODS, make, method_id

VALUES = [
    None, 5, -1, 1.5, float("nan"), float("inf"), "x", "", [], {}, [[]], [{}], {"a": 1}, True, 10**26, -(10**26),
    ["x", 1], {"method": "random", "keep": 9}, {"method": 5}, {"budget": {}}, {"budget": 10**26}, {"coverage": []},
]  # fmt: skip


def refusal(path):
    try:
        load_reducer(path)
    except FoveateError as error:
        return str(error)
    return None


@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS + IN_LLM + STAGED, ids=method_id)
def test_any_value_in_any_field_of_a_method(entry, tmp_path):
    name, config = entry
    reducer = make(entry, 9) if entry in METHODS + VIDEO_METHODS else get_method(name)(**config)
    data, path = reducer.to_dict(), tmp_path / "method.json"
    for key in data:
        for value in VALUES:
            path.write_text(json.dumps({**data, key: value}))
            message = refusal(path)
            assert message is None or "\n" not in message
            assert message or value not in (10**26, -(10**26))


@pytest.mark.parametrize("depth", [70, 400, 5000])
def test_a_chain_nested_deep(depth, tmp_path):
    text = '{"method":"chain","reducers":[' * depth + '{"method":"random","keep":9}' + "]}" * depth
    path = tmp_path / "method.json"
    path.write_text(text)
    with pytest.raises(FoveateError) as caught:
        load_reducer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "5", '"x"', "null", "{", "{}", "[" * 5000, "\0" * 64, "9" * 5000])
@pytest.mark.parametrize("read", [load_reducer, Codebook.load, Gates.load, load_shape])
def test_files_of_anything(read, text, tmp_path):
    path = tmp_path / ("config.json" if read is load_shape else "file.json")
    path.write_text(text)
    with pytest.raises(FoveateError) as caught:
        read(str(tmp_path) if read is load_shape else path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "text_config", "vision_config"])
@pytest.mark.parametrize("value", [5, "x", [], [1], True, 1.5, 10**26])
def test_any_value_in_a_configuration(key, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["llava-1.5-7b"].config, key: value}))
    with pytest.raises(FoveateError) as caught:
        load_shape(str(tmp_path))
    assert "\n" not in str(caught.value)
