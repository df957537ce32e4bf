"""Methods on more than 1,024 tokens, where they compute the same in other ways, and how much memory they take."""

import pytest
import torch
from greedy_cases import crop_batch

from foveate.bench.growth import measure_memory
from foveate.bench.naive import plain_divprune, plain_selection
from foveate.bench.selection import exact_tokens
from foveate.core import ranking
from foveate.core.probes import Attention
from foveate.core.ranking import AddedCoverage, CosineRows, added_coverage, cosine_matrix
from foveate.methods import MMR, TOPS, DivPrune, GPrune, PruneSID, ToDRE, VisPruner, gprune, prunesid
from foveate.registry import load_reducer
from tiny import METHODS, make, method_id, visual_tokens

SIZE = 1100
FEATURES, SALIENCY = (
    torch.cat(parts)
    for parts in zip(*(exact_tokens(SIZE, 64, torch.Generator().manual_seed(s)) for s in range(2)), strict=True)
)
"""Two crops whose cosines are exact in float32, whatever order they are summed in."""


def picks(method, count):
    planes = {probe: SALIENCY if isinstance(probe, Attention) else FEATURES for probe in method.needs}
    return method.pick(crop_batch(planes), count)


def test_rows_on_demand_are_those_of_the_matrix():
    matrix, rows = cosine_matrix(FEATURES), CosineRows(FEATURES)
    for t in range(40):
        token = torch.tensor([[(17 * t) % SIZE], [(5 * t) % 90]])
        scores = SALIENCY.clone()
        scores[:, ::3] = -torch.inf if t % 2 else torch.nan
        assert torch.equal(rows.of(token, scores), ranking.row_of(matrix, token))


def test_likely_rows_come_along_and_none_is_computed_twice():
    rows, scores = CosineRows(FEATURES[:1]), torch.zeros(1, SIZE)
    scores[0, 40:140] = 1.0
    scores[0, 200:] = -torch.inf
    for token in range(40, 140):
        rows.of(torch.tensor([[token]]), scores)
    known = set(rows._known[0])
    assert set(range(40, 140)) <= known < set(range(200))
    assert len(known) < 200


def test_without_waiting_a_row_is_computed_alone(monkeypatch):
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    rows, token = CosineRows(FEATURES), torch.tensor([[3], [70]])
    assert torch.equal(rows.of(token, SALIENCY), ranking.row_of(cosine_matrix(FEATURES), token))
    assert rows._known == [{}, {}]


def test_coverage_by_differences_is_that_of_all_elements():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(2, SIZE, SIZE, generator=generator)
    matrix, covered = matrix + matrix.mT, torch.full((2, SIZE), -1.0)
    coverage = AddedCoverage(matrix)
    for _ in range(6):
        assert torch.allclose(coverage.beyond(covered), added_coverage(matrix, covered), rtol=1e-5, atol=1e-3)
        covered = torch.maximum(covered, torch.randn(covered.shape, generator=generator))


@pytest.mark.parametrize(
    "method", [MMR(keep=60), ToDRE(keep=60), ToDRE(keep=60, criterion="k_center"), TOPS(keep=60)], ids=repr
)
def test_picks_are_those_from_the_whole_matrix(method, monkeypatch):
    here = picks(method, 60)
    monkeypatch.setattr(ranking, "_WHOLE", SIZE)
    assert torch.equal(here, picks(method, 60))


def test_flow_in_parts_is_the_flow(monkeypatch):
    here = picks(GPrune(keep=60), 60)
    monkeypatch.setattr(gprune, "_AT_ONCE", SIZE**2)
    assert torch.equal(here, picks(GPrune(keep=60), 60))


def test_components_by_way_of_the_channels_are_those_of_the_tokens(monkeypatch):
    features = torch.randn(2, SIZE, 24, generator=torch.Generator().manual_seed(2))
    groups, number = prunesid._components(features, 15)
    monkeypatch.setattr(prunesid, "_MOST", SIZE)
    plain, same = prunesid._components(features, 15)
    assert number == same == 15
    assert torch.equal(groups, plain)
    assert picks(PruneSID(keep=60), 60).shape == (2, 60)


def test_divprune_keeps_what_the_plain_loop_keeps():
    kept = picks(DivPrune(keep=60), 60).sort(dim=1).values
    assert torch.equal(kept, torch.stack([plain_divprune(x, 60) for x in FEATURES]))


@pytest.mark.parametrize("step", ["auto", 8, None])
def test_vispruner_keeps_what_the_plain_loop_keeps(step):
    method = VisPruner(keep=60, step=step)
    kept = picks(method, 60).sort(dim=1).values
    assert torch.equal(kept, plain_selection(FEATURES, SALIENCY, 60, step=method.per_round(SIZE, 60)))


def test_vispruner_keeps_the_number_of_rounds():
    by_default = VisPruner(keep=64).per_round
    steps = {(size, count): by_default(size, count) for size in (576, 1024) for count in (9, 64)}
    assert set(steps.values()) == {8}
    larger = ((2304, 256), (2880, 320), (9216, 1024), (1100, 1000))
    assert [by_default(size, count) for size, count in larger] == [32, 40, 128, 8]
    assert VisPruner(keep=64, step=5).per_round(9216, 1024) == 5
    assert VisPruner(keep=64, step=None).per_round(9216, 1024) == 9216


@pytest.mark.parametrize("entry", METHODS, ids=method_id)
def test_what_a_method_reads_stays_as_it_is(entry):
    reducer = make(entry, 5)
    tokens = visual_tokens(reducer, [(0, [(3, 4)])])
    before = {probe: [x.clone() for x in plane] for probe, plane in tokens.planes.items()}
    reducer.select(tokens)
    for probe, plane in tokens.planes.items():
        assert all(map(torch.equal, plane, before[probe]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vispruner", "divprune", "todre", "mmr", "dart", "gprune", "tops", "prunesid", "agilepruner", "fsr"]
)
def test_memory_at_scale(name):
    peak, kept = measure_memory(load_reducer(name, keep=1 / 9), 96)
    assert kept == 1024
    assert peak <= 700 * 2**20
