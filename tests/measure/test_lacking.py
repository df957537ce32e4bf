"""What transformers says at length of a package that is not installed is one line that says what to type."""

import pytest
from transformers.utils.import_utils import BACKENDS_MAPPING

from foveate.measure.loading import first_line

TEXTS = {}
for backend, (_, text) in BACKENDS_MAPPING.items():
    if "not found in your environment" in text:
        TEXTS[backend] = text.replace("{0}", "SomeProcessor")


@pytest.mark.parametrize("backend", TEXTS)
def test_one_line_says_what_to_install(backend):
    said = first_line(ImportError(TEXTS[backend]))
    assert said.startswith("SomeProcessor needs ")
    assert "which is not installed: pip install '" in said
    assert said.endswith("'")
    assert "\n" not in said


def test_torchvision_comes_with_an_extra():
    said = first_line(ImportError(TEXTS["torchvision"]))
    assert said == ("SomeProcessor needs Torchvision, which is not installed: pip install 'foveate[torchvision]'")


def test_other_errors_keep_their_first_line():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ImportError("Package `num2words` is required. Install it with `pip install num2words`.")) == (
        "Package `num2words` is required. Install it with `pip install num2words`."
    )
