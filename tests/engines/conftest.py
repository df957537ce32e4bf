import pytest


@pytest.fixture(autouse=True)
def _that_run(request):
    """Skip what a family does not give a method inside the LLM."""
    from inside import make

    from foveate.families import FAMILIES

    given = getattr(request.node, "callspec", None)
    if given is None or not {"family", "inside"} <= given.params.keys():
        return
    if lacking := FAMILIES[given.params["family"]].lacks(make(given.params["inside"])):
        pytest.skip(f"needs {lacking}")
