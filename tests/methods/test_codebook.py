"""The codebook method against the score written out with loops in float64, and its refusals."""

import copy
import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import foveate
from foveate import Chain, VisPruner
from foveate.core.codebook import Codebook, projector_hash
from foveate.core.crops import CropBatch
from foveate.core.errors import FoveateError, InputError
from foveate.core.probes import Embeddings
from foveate.families import family_of
from foveate.methods import CodebookPruner
from tiny import codebook_file, collate, model, samples, visual_tokens


def wave(n, c, s, p):
    return [[math.sin(s * (i + 1) * (j + 1)) + 0.3 * math.cos(p * (i + 1) + (j + 1)) for j in range(c)]
            for i in range(n)]  # fmt: skip


TOKENS, PROTOTYPES = wave(16, 8, 0.8, 1.3), wave(5, 8, 1.3, 0.4)
LIKENESS = [-0.112654, 0.400551, 0.635763, 0.094732, 0.810975, 0.201914, 0.281972, 0.795911, -0.013801, 0.223296,
            0.910965, 0.084312, 0.296539, 0.148657, 0.236454, 0.999532]  # fmt: skip
BELOW_45 = [0, 1, 3, 5, 6, 8, 9, 11, 12, 13, 14]
HALF = [0, 3, 5, 8, 9, 11, 13, 14]
HALF_BY_SOFTMAX = [0, 3, 5, 6, 8, 9, 11, 13]


def cosine(x, y):
    norm = math.hypot(*x) * math.hypot(*y)
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else 0.0


def reference(tokens, prototypes, score="cosine"):
    """Return how much each token is like a prototype."""
    c = [[cosine(x, y) for y in prototypes] for x in tokens]
    if score == "softmax":
        over_tokens = [math.fsum(math.exp(row[k]) for row in c) for k in range(len(prototypes))]
        over_prototypes = [math.fsum(map(math.exp, row)) for row in c]
        c = [
            [math.exp(x) ** 2 / over_tokens[k] / over_prototypes[i] for k, x in enumerate(row)]
            for i, row in enumerate(c)
        ]
    return [max(row) for row in c]


def fewest(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i])[:count])


def pick(tokens, prototypes, count, score="cosine"):
    reducer = CodebookPruner(keep=1, codebook=codebook_file(None), score=score)
    x = torch.as_tensor(tokens)
    x = x if x.dim() == 3 else x[None]
    unit = torch.nn.functional.normalize(torch.as_tensor(prototypes).float(), dim=-1)
    crops = CropBatch(None, tuple(range(len(x))), x.shape[1], x.device, {Embeddings(): x})
    return reducer.pick(crops, count, unit).tolist()


@pytest.fixture
def book(tmp_path):
    def write(prototypes, **changes):
        path = tmp_path / "book.safetensors"
        Codebook(torch.as_tensor(prototypes), **{"model": "m", "projector": "p", **changes}).save(path)
        return str(path)

    return write


def test_published_numbers():
    m = reference(TOKENS, PROTOTYPES)
    assert m == pytest.approx(LIKENESS, abs=1e-6)
    assert [i for i, x in enumerate(m) if x < 0.45] == BELOW_45 == fewest(m, 11)
    assert pick(TOKENS, PROTOTYPES, 11) == [BELOW_45]
    assert pick(TOKENS, PROTOTYPES, 8) == [HALF] == [fewest(m, 8)]
    u = reference(TOKENS, PROTOTYPES, "softmax")
    assert pick(TOKENS, PROTOTYPES, 8, "softmax") == [HALF_BY_SOFTMAX] == [fewest(u, 8)]
    ranked = sorted(u)
    assert ranked[8] - ranked[7] == pytest.approx(1.1e-3, abs=5e-5)


@pytest.mark.parametrize("score", ["cosine", "softmax"])
def test_through_a_file(book, score):
    reducer = CodebookPruner(keep=0.5, codebook=book(PROTOTYPES), score=score)
    tokens = visual_tokens(reducer, [(0, [(4, 4)])])
    tokens.planes[Embeddings()][:] = [torch.tensor(TOKENS)]
    assert reducer.select(tokens)[0].kept.tolist() == (HALF if score == "cosine" else HALF_BY_SOFTMAX)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10_000), st.data())
def test_equals_the_reference(size, prototypes, seed, data):
    """With entries of +1 and -1 every cosine is exact in float32, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x, y = (torch.randint(0, 2, (n, 16), generator=generator) * 2.0 - 1 for n in (size, prototypes))
    count = data.draw(st.integers(1, size))
    assert pick(x.to(dtype), y, count) == [fewest(reference(x.tolist(), y.tolist()), count)]


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["cosine", "softmax"]), st.integers(0, 10_000), st.data())
def test_equals_the_reference_on_any_values(size, prototypes, score, seed, data):
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = torch.randn(size, 6, generator=generator).to(dtype)
    y = torch.randn(prototypes, 6, generator=generator)
    scores = reference(x.tolist(), y.tolist(), score)
    count = data.draw(st.integers(1, size))
    ranked = sorted(scores)
    if count < size and ranked[count] - ranked[count - 1] < 1e-5 * abs(ranked[count]):
        return  # float32 cannot tell the last one from the next
    assert pick(x, y, count, score) == [fewest(scores, count)]


@pytest.mark.parametrize("score", ["cosine", "softmax"])
def test_properties(score):
    x, y = torch.tensor(TOKENS), torch.tensor(PROTOTYPES)
    (kept,) = pick(x, y, 8, score)
    assert pick(x * torch.linspace(0.5, 9, 16)[:, None], y * 3, 8, score) == [kept]
    assert pick(x, y.flip(0), 8, score) == [kept]
    order = torch.randperm(16)
    (shuffled,) = pick(x[order], y, 8, score)
    assert sorted(order[shuffled].tolist()) == kept
    for i in range(16):
        copied = torch.cat([y, x[i : i + 1] * 2])
        assert i not in pick(x, copied, 15, "cosine")[0]  # equal to a prototype: the first to go
    batch = torch.randn(4, 16, 8)
    assert pick(batch, y, 5, score) == [pick(one, y, 5, score)[0] for one in batch]


def test_edge_cases():
    y = PROTOTYPES
    assert pick(torch.ones(9, 8), y, 4) == [[0, 1, 2, 3]]
    assert pick(torch.zeros(9, 8), y, 4) == [[0, 1, 2, 3]]
    assert pick(TOKENS, y, 1) == [[0]]
    broken = torch.tensor(TOKENS)
    broken[[2, 8]] = torch.nan
    broken[5, 3] = torch.inf
    for score in ("cosine", "softmax"):
        assert not {2, 5, 8} & set(pick(broken, y, 13, score)[0])
    assert pick(TOKENS, [[0.0] * 8], 3) == [[0, 1, 2]]


def test_configuration(book, tmp_path):
    path = book(PROTOTYPES)
    reducer = CodebookPruner(keep=8, codebook=os.path.abspath(path))
    assert foveate.load_reducer("codebook", keep=8, codebook=path) == reducer
    assert type(CodebookPruner(keep=8, codebook=tmp_path / "book.safetensors").codebook) is str
    json.dumps(reducer.to_dict())
    with pytest.raises(FoveateError, match="'cosine' or 'softmax'"):
        CodebookPruner(keep=8, codebook=path, score="euclid")
    with pytest.raises(FoveateError, match="lacks codebook"):
        foveate.load_reducer("codebook", keep=8)


@pytest.mark.parametrize("content", ["absent", "text", "no-tensor", "flat", "empty", "no-metadata"])
def test_what_is_no_codebook_is_refused(tmp_path, content):
    path, metadata = tmp_path / "book.safetensors", {"model": "m", "projector": "p", "built": "{}"}
    tensors = {"flat": torch.ones(3), "empty": torch.ones(0, 3), "no-metadata": torch.ones(2, 3)}
    if content == "text":
        path.write_text("prototypes")
    elif content == "no-tensor":
        save_file({"others": torch.ones(2, 3)}, path, metadata)
    elif content != "absent":
        save_file({"prototypes": tensors[content]}, path, None if content == "no-metadata" else metadata)
    with pytest.raises(FoveateError, match=r"no codebook in .*foveate codebook"):
        CodebookPruner(keep=8, codebook=str(path))


def test_other_widths_are_refused(book):
    reducer = CodebookPruner(keep=8, codebook=book(torch.randn(3, 7)))
    with pytest.raises(InputError, match="width 7, but the tokens of this model have 12"):
        reducer.select(visual_tokens(reducer, [(0, [(4, 4)])]))


def test_a_file_that_changes_is_read_again(book):
    path = book(PROTOTYPES)
    first = Codebook.load(path)
    assert Codebook.load(path) is first
    os.utime(book(TOKENS), ns=(1, 1))
    assert len(Codebook.load(path).prototypes) == 16


@pytest.mark.parametrize("how", ["reduce", "attach", "chain"])
def test_another_projector_is_refused(how):
    net, inputs = model("llava"), collate(samples("llava"))
    reducer = CodebookPruner(keep=8, codebook=codebook_file("llava"))
    if how == "chain":
        reducer = Chain(VisPruner(keep=0.5), reducer)
    assert [len(span) for span in foveate.reduce(net, inputs, reducer).selection] == [8] * 4
    with torch.no_grad():
        net.model.multi_modal_projector.linear_2.bias[3] += 1
    use = {"attach": lambda: foveate.attach(net, reducer)}.get(how, lambda: foveate.reduce(net, inputs, reducer))
    with pytest.raises(FoveateError, match=r"made for the projector of 'llava'.*`foveate codebook`"):
        use()
    assert "generate" not in vars(net)


def test_hash_is_that_of_the_weights_in_any_precision():
    net = model("llava")
    projector = family_of(net).projector(net)
    for dtype in (torch.float16, torch.bfloat16):
        stored = copy.deepcopy(projector)
        with torch.no_grad():  # down to what float16 holds poorly or not at all
            stored.linear_1.weight.mul_(10.0 ** -torch.arange(32))
        stored = stored.to(dtype)
        assert len({projector_hash(copy.deepcopy(stored).to(d)) for d in (torch.float32, torch.float16, dtype)}) == 1
        if dtype == torch.float16:
            assert projector_hash(copy.deepcopy(stored).to(torch.bfloat16)) == projector_hash(stored)
    before = projector_hash(projector)
    assert projector_hash(projector) == before == projector_hash(copy.deepcopy(projector))
    with torch.no_grad():
        projector.linear_1.weight[0, 0] += 0.5
    assert projector_hash(projector) != before
