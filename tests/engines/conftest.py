import pytest


@pytest.fixture(autouse=True)
def _that_run(request):
    """Skip what a family does not give a method inside the LLM."""
    from inside import make

    from foveate.families import all_families

    given = getattr(request.node, "callspec", None)
    if given is None or not {"family", "inside"} <= given.params.keys():
        return
    family, reducer = all_families()[given.params["family"]], make(given.params["inside"])
    if lacking := family.lacks(reducer):
        pytest.skip(f"needs {lacking}")
    if family.two_way and getattr(reducer, "rows", None) == "visible":
        pytest.skip("all rows see all tokens of an image")
