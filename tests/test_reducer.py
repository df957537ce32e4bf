import json
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Optional

import pytest

import foveate.core.reducer
from foveate import Budget, Chain, FoveateError, Reducer, VisPruner, list_methods, load_reducer, register
from foveate.core.errors import BudgetError, InputError, UnknownNameError
from foveate.core.reducer import identity
from foveate.core.selection import Selection
from foveate.methods import (
    Downsample,
    DyVTE,
    Pool,
    PyramidDrop,
    Random,
    SparseVLM,
    ToDREExit,
    Uniform,
    VFlowOptLlm,
    VisionZip,
    VisualExit,
)
from foveate.registry import by_default, get_method, reducer_from_dict
from tiny import IN_LLM, METHODS, STAGED, VIDEO_METHODS, make, method_id

KEEPS = [64, 0.25, Budget(8, per="joint"), [8, 0.5], (8, Budget(4, per="crop")), {"image": 8, "video": Budget(0.5)}]


@pytest.fixture
def registry(monkeypatch):
    foveate.registry._all()
    registry = dict(foveate.registry._registry)
    monkeypatch.setattr(foveate.registry, "_registry", registry)
    monkeypatch.setattr(foveate.registry, "_seen_plugins", set())
    foveate.registry._plugins.cache_clear()
    yield registry
    foveate.registry._plugins.cache_clear()


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS, ids=method_id)
def test_save_and_load(entry, keep, tmp_path):
    reducer = make(entry, keep)
    reducer.save(tmp_path / "reducer.json")
    for path in (tmp_path / "reducer.json", str(tmp_path / "reducer.json")):
        loaded = load_reducer(path)
        assert loaded == reducer
        assert repr(loaded) == repr(reducer)
    assert load_reducer(tmp_path / "reducer.json", keep=3).keep == 3


def test_chain_saves_and_loads(tmp_path):
    chain = Chain(VisPruner(keep=0.5, step=None), Chain(Random(keep=[9, 8], seed=4), Pool(keep=Budget(3, per="crop"))))
    chain.save(tmp_path / "chain.json")
    loaded = load_reducer(tmp_path / "chain.json")
    assert loaded == chain
    assert repr(loaded) == repr(chain)
    assert "Chain(VisPruner(keep=0.5" in repr(chain)
    assert loaded.merges
    assert not Chain(VisPruner(keep=0.5)).merges
    assert chain.needs == VisPruner(keep=1).needs


def test_every_registered_method_is_in_the_table():
    apart = {"chain", "sgl"}  # sgl needs the scores of another model
    assert {name for name, _ in METHODS + VIDEO_METHODS + IN_LLM + STAGED} | apart >= set(list_methods())


def test_configuration_is_the_parameters_and_nothing_else():
    assert Downsample(keep=8).to_dict() == {"method": "downsample", "keep": 8}
    assert Downsample.stage == "pixels"
    assert repr(Uniform(keep=0.5)) == "Uniform(keep=0.5)"
    assert VisPruner(keep=8).to_dict() == {
        "method": "vispruner", "keep": 8, "important_ratio": 0.5, "step": "auto", "order": "similarity",
    }  # fmt: skip
    json.dumps(VisPruner(keep={"image": Budget(3)}).to_dict())


def test_reducers_are_values():
    assert Uniform(keep=[8, 4]) == Uniform(keep=(8, 4))
    assert len({Uniform(keep=[8, 4]), Uniform(keep=(8, 4)), Uniform(keep=8)}) == 2
    with pytest.raises(AttributeError):
        Uniform(keep=8).keep = 9


def test_load_by_name_and_with_changes():
    assert load_reducer("vispruner", keep=64) == VisPruner(keep=64)
    reducer = VisPruner(keep=64)
    assert load_reducer(reducer) is reducer
    assert load_reducer(reducer, step=4) == VisPruner(keep=64, step=4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: load_reducer("vispruner"), FoveateError, "lacks keep; its parameters are: keep, important_ratio"),
        (lambda: load_reducer("vispruner", keep=8, k=3), FoveateError, "does not know k"),
        (lambda: load_reducer(VisPruner(keep=8), k=3), FoveateError, "does not know k"),
        (lambda: load_reducer(Chain(VisPruner(keep=8)), keep=3), FoveateError, "one parameter, its reducers"),
        (lambda: load_reducer("vispruna", keep=8), UnknownNameError, "'vispruna'; there are: .*vispruner"),
        (lambda: load_reducer("uniform", keep=0), BudgetError, "at least 1"),
        (
            lambda: load_reducer("vispruner", keep=8, important_ratio="a"),
            FoveateError,
            "vispruner: important_ratio is a number, not 'a'",
        ),
        (lambda: load_reducer("pyramiddrop", layers=2), FoveateError, "layers of pyramiddrop .* not 2"),
        (lambda: load_reducer("sparsevlm", keep=8, recycle="a"), FoveateError, "recycle is a number, not 'a'"),
        (lambda: load_reducer("todre_exit", tau="x"), FoveateError, "tau is a share .* not 'x'"),
        (lambda: reducer_from_dict({"keep": 8}), FoveateError, '"method"'),
        (lambda: reducer_from_dict([]), FoveateError, '"method"'),
        (lambda: Chain(), FoveateError, "made of reducers"),
        (lambda: Chain("vispruner"), FoveateError, "made of reducers"),
        (lambda: Chain(Downsample(keep=8), Uniform(keep=4)), FoveateError, "inside the LLM only"),
        (lambda: Chain(Pool(keep=8), Uniform(keep=4)), FoveateError, "last"),
    ],
)
def test_errors_help(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PyramidDrop(layers=2), "layers of pyramiddrop ascend from 1 on, in whole numbers, not 2"),
        (lambda: PyramidDrop(layers="24"), "layers of pyramiddrop .* not"),
        (lambda: SparseVLM(keep=8, recycle="a"), "recycle is a number, not 'a'"),
        (lambda: VisualExit(rule="mass", threshold="x"), "threshold is a number or None, not 'x'"),
        (lambda: VisualExit(rule="converged", threshold=float("nan")), "threshold is a number such as 0.99, not nan"),
        (lambda: VisualExit(rule=["mass"]), "rule is 'fixed', 'mass' or 'converged'"),
        (lambda: ToDREExit(tau="x"), "tau is a share of attention such as 0.1, not 'x'"),
        (lambda: DyVTE(gates=3), "gates are a safetensors file, or a folder with some, not 3"),
        (lambda: DyVTE(gates="gates", bias="a"), "bias is a number, not 'a'"),
        (lambda: VisionZip(keep=8, contextual_ratio="a"), "contextual_ratio is a number, not 'a'"),
        (lambda: VFlowOptLlm(ratios=2), "ratios of vflowopt_llm are shares .* not 2"),
        (lambda: Budget(float("nan")), "a budget is a count such as 64 or a ratio such as 0.25, not nan"),
    ],
)
def test_values_of_the_wrong_kind_are_named(call, message):
    with pytest.raises(FoveateError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not describe a method: Expecting"),
        ("\x80", "does not describe a method: .* codec"),
        ("[" * 100_000, "does not describe a method: .* recursion"),
        ("[1]", 'does not describe a method: it holds no object with the keys "method"'),
        ("{}", '"method"'),
        ('{"method": ["a"]}', r"is the name of a method, such as \"vispruner\", not \['a'\]"),
        ('{"method": "chain", "reducers": 5}', "the reducers of a chain are a list, not 5"),
        ('{"method": "chain", "reducers": {"method": "random", "keep": 5}}', "the reducers of a chain are a list"),
        ('{"method": "random", "keep": {"coverage": 0.5, "foo": 0}}', "takes per, least, most beside it, not foo"),
        ('{"method": "random", "keep": {"budget": 5, "pr": "crop"}}', "'budget' takes per beside it, not pr"),
        ('{"method": "random", "keep": {"image": {"budget": 5, "pr": "crop"}}}', "not pr"),
        ('{"method": "random", "keep": [{"budget": 5, "coverage": 0.5}]}', "not budget"),
    ],
)
def test_files_that_describe_no_method(tmp_path, text, message):
    path = tmp_path / "method.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(FoveateError, match=message) as caught:
        load_reducer(path)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path):
    for name in ("absent.json", "."):
        with pytest.raises(InputError, match="cannot read the method from"):
            load_reducer(tmp_path / name)


def test_list_methods_takes_a_pattern():
    assert list_methods("*prune*") == [name for name in list_methods() if "prune" in name] != []
    assert list_methods("nothing*") == []
    assert list_methods() == sorted(list_methods())


def test_register(registry):
    @register("first_two")
    @dataclass(frozen=True)
    class FirstTwo(Reducer):
        def select(self, tokens):
            return identity(tokens.spans)

    assert get_method("first_two") is FirstTwo
    assert FirstTwo.name == "first_two"
    assert load_reducer("first_two", keep=2) == FirstTwo(keep=2)

    with pytest.raises(FoveateError, match="taken by"):

        @register("uniform")
        @dataclass(frozen=True)
        class Other(Reducer):
            def select(self, tokens):
                return identity(tokens.spans)

    with pytest.raises(FoveateError, match="lower-case"):
        register("Bad-Name")(FirstTwo)
    with pytest.raises(FoveateError, match="dataclass"):

        @register("thawed")
        class Thawed(Uniform):
            pass


def test_entry_points_are_loaded(registry, monkeypatch):
    @dataclass(frozen=True)
    class Foreign(Reducer):
        def select(self, tokens):
            return Selection(())

    class Point:
        name, value, loads = "foreign", "foreign:Foreign", 0

        def load(self):
            Point.loads += 1
            return Foreign

    def points(group):
        return [Point()] if group == "foveate.reducers" else []

    monkeypatch.setattr(foveate.registry, "entry_points", points)
    assert "foreign" in list_methods()
    assert load_reducer("foreign", keep=3) == Foreign(keep=3)
    assert Point.loads == 1


def test_a_broken_or_clashing_plugin_is_named_and_left_out(registry, monkeypatch):
    broken = EntryPoint("broken", "no_such_package:Method", "foveate.reducers")
    clashing = EntryPoint("random", "foveate.methods:Pool", "foveate.reducers")
    monkeypatch.setattr(foveate.registry, "entry_points", lambda group: [broken, clashing])
    before = set(registry)
    with pytest.warns(UserWarning, match="is left out") as caught:
        assert "broken" not in list_methods()
    messages = [str(warning.message) for warning in caught]
    assert any("'broken' of 'no_such_package:Method' is left out" in m for m in messages)
    assert any(
        "'random' of 'foveate.methods:Pool' is left out" in m and "taken by foveate.methods.random.Random" in m
        for m in messages
    )
    assert set(list_methods()) == before


def test_plugins_that_are_no_methods_are_left_out(registry, monkeypatch):
    @dataclass(frozen=True)
    class Random(foveate.Reducer):  # named as a method of ours
        def select(self, tokens):
            raise NotImplementedError

    @dataclass(frozen=True)
    class Unfinished(foveate.Reducer):
        pass

    @dataclass(frozen=True)
    class Other:
        keep: int

    @dataclass(frozen=True)
    class Picky(Random):
        def __post_init__(self):
            if self.keep != 7:
                raise ValueError("seven")

    class Point:
        def __init__(self, cls, name):
            self.name, self.value, self.load = name, f"elsewhere:{cls.__name__}", lambda: cls

    points = [Point(Random, "random"), Point(Unfinished, "unfinished"), Point(Other, "other"), Point(Picky, "picky")]
    monkeypatch.setattr(foveate.registry, "entry_points", lambda group: points)
    before = set(registry)
    with pytest.warns(UserWarning, match="is left out") as caught:
        assert set(list_methods()) == {*before, "picky"}
    assert ["taken by" in str(w.message) or "is no method" in str(w.message) for w in caught] == [True] * 3
    assert by_default("picky") is Picky


@pytest.mark.parametrize(
    ("name", "config", "allowed"),
    [
        ("vispruner", {"step": 2.5}, "a whole number, 'auto' or None"),
        ("vispruner", {"step": "8"}, "a whole number, 'auto' or None"),
        ("vispruner", {"order": ["rank"]}, "'similarity' or 'rank'"),
        ("vtc_cls", {"reduce": "mean"}, "'sum', 'min' or 'max'"),
        ("hiprune", {"alpha": "x"}, "a number"),
        ("hiprune", {"alpha": True}, "a number"),
        ("hiprune", {"wrap": 1}, "True or False"),
        ("dart", {"pivots": 2.5}, "a whole number"),
        ("prumerge", {"neighbours": 2.5}, "a whole number"),
        ("prumerge", {"layer": False}, "a whole number"),
        ("prumerge", {"layer": -1.5}, "a whole number"),
        ("gprune", {"steps": 2.5}, "a whole number"),
        ("holov", {"regions": 2.5}, "a whole number or None"),
        ("random", {"seed": 1.5}, "a whole number"),
        ("codebook", {"codebook": 5}, "a text"),
        ("fastv", {"layer": 1.5}, "a whole number"),
        ("topv", {"recovery": None}, "a whole number"),
    ],
    ids=str,
)
def test_parameters_of_another_type_are_refused(name, config, allowed):
    ((parameter, value),) = config.items()
    with pytest.raises(FoveateError, match=f"^{name}: {parameter} is {allowed}, not {re.escape(repr(value))}$"):
        get_method(name)(keep=8, **config)


def test_parameters_of_methods_of_others_are_checked_as_far_as_annotations_say_it(registry):
    @register("shaped")
    @dataclass(frozen=True)
    class Shaped(Random):
        size: "int | tuple[int, int]" = 3
        ratio: float = 1
        label: Optional[str] = None  # noqa: UP045

    assert Shaped(keep=8, size="any").ratio == 1
    with pytest.raises(FoveateError, match=r"^shaped: label is a text or None, not 3$"):
        Shaped(keep=8, label=3)
    with pytest.raises(FoveateError, match=r"^shaped: seed is a whole number, not 0.5$"):
        Shaped(keep=8, seed=0.5)

    @dataclass(frozen=True)
    class Unnamed(Random):
        size: "OnlyForTypeCheckers" = 3  # noqa: F821
        ratio: float = 1

    assert Unnamed(keep=8, ratio="any").size == 3
