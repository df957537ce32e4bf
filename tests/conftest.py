import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# Code that mutmut watches draws examples slowly.
settings.register_profile("mutants", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The models of the tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _checked():
    """Check what methods return to the last value."""
    from foveate.core.checks import checked_values

    with checked_values():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test where SmolVLM does not run because of a bug of transformers 5.20.1 and 5.20.2, and nowhere else."""
    from foveate.core.errors import InputError
    from foveate.families.smolvlm import BLOCKWISE

    try:
        return (yield)
    except InputError as error:
        if transformers.__version__ not in BLOCKWISE or "only takes multiples of" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _applies(request):
    """Skip what a family says does not apply to it, and methods that need what it does not give."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if not isinstance(params.get("family"), str):
        return
    from foveate.families import all_families
    from tiny import TINIES, make

    name = params["family"]
    if reason := TINIES[name].skips.get(request.node.originalname):
        pytest.skip(reason)
    reducer = params.get("reducer") or (make(params["entry"], 1) if "entry" in params else None)
    if reducer is not None and (lacking := all_families()[name].lacks(reducer)):
        pytest.skip(f"{name} lacks {lacking}")
