import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate import Budget, FoveateError
from foveate.core.budget import check, resolve
from foveate.core.errors import BudgetError

sizes = st.lists(st.integers(1, 700), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("value", "n", "count"),
    [(64, 576, 64), (64, 10, 10), (0.25, 576, 144), (0.5, 5, 2), (0.5, 7, 4), (0.001, 64, 1), (1.0, 64, 64), (1, 9, 1)],
)
def test_count(value, n, count):
    assert Budget(value).count(n) == count


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "at least 1"), (-3, "at least 1"), (0.0, r"\(0, 1\]"), (1.5, r"\(0, 1\]"), (float("nan"), "not nan"),
     (True, "count such as 64"), ("64", "count such as 64"), (None, "count such as 64")],
)  # fmt: skip
def test_what_is_no_budget_is_refused(value, message):
    with pytest.raises(BudgetError, match=message) as error:
        Budget(value)
    assert isinstance(error.value, ValueError | FoveateError)


def test_unknown_scope_is_refused():
    with pytest.raises(BudgetError, match="'image', 'crop' or 'joint'"):
        Budget(64, per="tile")


@given(sizes, st.one_of(st.integers(1, 3000), st.floats(0.001, 1.0)))
def test_split_adds_up_and_never_exceeds_a_crop(sizes, value):
    budget = Budget(value)
    parts = budget.split(sizes)
    assert sum(parts) == budget.count(sum(sizes))
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
    exact = [budget.count(sum(sizes)) * size / sum(sizes) for size in sizes]
    assert all(abs(part - share) < 1 for part, share in zip(parts, exact, strict=True))


@given(sizes, st.one_of(st.integers(1, 700), st.floats(0.001, 1.0)))
def test_per_crop_budgets_hold_for_each_crop(sizes, value):
    assert Budget(value, per="crop").split(sizes) == [Budget(value).count(n) for n in sizes]


def test_remainders_go_to_the_earlier_crop():
    assert Budget(5).split([10, 10, 10]) == [2, 2, 1]
    assert Budget(1).split([4, 40]) == [0, 1]
    assert Budget(7).split([]) == []


def test_resolve():
    assert resolve(8, "image", 3) == Budget(8)
    assert resolve([8, 0.5], "image", 1) == Budget(0.5)
    assert resolve({"image": 8, "video": Budget(4, per="crop")}, "video", 0) == Budget(4, per="crop")
    with pytest.raises(BudgetError, match="no budget for 'video'"):
        resolve({"image": 8}, "video", 0)
    with pytest.raises(BudgetError, match="names 2 budgets"):
        resolve([8, 8], "image", 2)


@pytest.mark.parametrize("keep", [[], [8, 0], {}, {"audio": 3}, {"image": 2.0}, "0.5", None])
def test_check_refuses(keep):
    with pytest.raises(BudgetError):
        check(keep)


@pytest.mark.parametrize("keep", [1, 0.5, Budget(3), [1, 0.5], (Budget(2),), {"image": 8, "video": 0.1}])
def test_check_accepts(keep):
    check(keep)
