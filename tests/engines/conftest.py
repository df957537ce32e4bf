import pytest

from foveate.families import FAMILIES


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


@pytest.fixture(autouse=True)
def _fitting(request):
    """Leave out a method that refuses a family."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (
        "inside" in given
        and given["inside"][1].get("rows") == "visible"
        and FAMILIES[given.get("family", "llava")].two_way
    ):
        pytest.skip("all rows see all tokens of an image")
