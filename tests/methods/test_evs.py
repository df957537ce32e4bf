"""EVS against the rule written out with loops in float64, and in chains through a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate import Budget, Chain, VisPruner
from foveate.core.errors import BudgetError, InputError
from foveate.core.probes import Embeddings
from foveate.methods import EVS, FasterVLM, Random
from tiny import VISUALS, collate, model, sample, samples, visual_tokens

FRAMES, SIDE = 2, 8

DEGREES = [
    [[0, 10, 20], [30, 40, 50]],
    [[0, 15, 20], [90, 40, 52]],
    [[1, 15, 80], [90, 41, 52]],
    [[1, 14, 80], [95, 100, 53]],
]


def count_of(frames, size, rate):
    """The published count of a pruning rate."""
    return max(size, int(frames * size * (1 - rate)))


def reference(video, count):
    """Return the kept tokens of a video ``[t][n][D]`` of lists, and their dissimilarities."""
    news = []
    for f, frame in enumerate(video):
        for i, x in enumerate(frame):
            if f == 0:
                news.append(255.0)
                continue
            y = video[f - 1][i]
            norm = math.hypot(*x) * math.hypot(*y)
            cosine = math.fsum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else 0.0
            news.append(round((1 - cosine) * 1e6) / 1e6)
    order = sorted(range(len(news)), key=lambda i: -news[i])
    return sorted(order[:count]), news


def pick(videos, count, dtype=torch.float32):
    return [sorted(row) for row in EVS(keep=1).pick(torch.as_tensor(videos).to(dtype), count).tolist()]


def video_tokens(reducer, videos, kinds=None, seed=0):
    """Make spans of frames ``(t, h, w)``, the frames of a span related as in a video."""
    layout = [(row, [(h, w)] * t) for row, (t, h, w) in enumerate(videos)]
    tokens = visual_tokens(reducer, layout, seed, kind="video")
    rows, c = tokens.planes.get(Embeddings(), []), 0
    for t, _, _ in videos:
        for f in range(1, t):
            if rows:
                rows[c + f] = rows[c + f - 1] + rows[c + f] * torch.linspace(0, 1, len(rows[c]))[:, None] ** 4
        c += t
    return tokens


def places(span):
    """Map positions in the span to indices into its frames, flattened."""
    return torch.cat([crop.index for crop in span.crops]).tolist()


@pytest.fixture(scope="module")
def toy():
    radians = torch.tensor(DEGREES, dtype=torch.float64).deg2rad().reshape(4, 6)
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (0.6, [0, 1, 2, 3, 4, 5, 9, 14, 22]),
        (0.5, [0, 1, 2, 3, 4, 5, 7, 9, 11, 14, 21, 22]),
        (0.75, [0, 1, 2, 3, 4, 5]),
        (0.9, [0, 1, 2, 3, 4, 5]),
        (0.0, list(range(24))),
    ],
)
def test_toy_video(toy, rate, kept):
    tokens = video_tokens(EVS(keep=1 - rate), [(4, 2, 3)])
    tokens.planes[Embeddings()][:] = list(toy)
    (span,) = EVS(keep=1 - rate).select(tokens)
    flat = places(tokens.spans[0])
    assert span.kept.tolist() == [flat[i] for i in kept]
    assert reference(toy.tolist(), len(kept))[0] == kept


def test_toy_dissimilarities(toy):
    kept, news = reference(toy.tolist(), 12)
    assert [news[i] for i in (22, 14, 9)] == pytest.approx([0.484962, 0.5, 0.5], abs=1e-6)
    assert [sum(i // 6 == f for i in kept) for f in range(4)] == [6, 3, 1, 2]


@pytest.mark.parametrize(("grid", "keep", "count"), [
    ((10, 2, 5), 0.1, 10),  # int(100 * (1 - 0.9)) is 9, and a frame has 10
    ((100, 1, 1), 0.1, 9),
    ((1000, 1, 1), 0.01, 10),
    ((1000, 1, 1), 0.1, 99),
    ((4, 2, 3), 0.4, 9),
    ((4, 2, 3), 0.25, 6),
    ((4, 2, 3), 3, 6),
    ((4, 2, 3), 7, 7),
    ((4, 2, 3), 24, 24),
    ((4, 2, 3), 500, 24),
    ((4, 2, 3), Budget(2, per="crop"), 8),
    ((4, 2, 3), Budget(2, per="joint"), 6),
    ((4, 2, 3), {"video": 8}, 8),
    ((4, 2, 3), [8, 1.0], 8),
    ((1, 2, 3), 0.1, 6),
    ((1, 2, 3), 1, 6),
])  # fmt: skip
def test_counts(grid, keep, count):
    reducer = EVS(keep=keep)
    tokens = video_tokens(reducer, [grid])
    (span,) = reducer.select(tokens)
    span.check()
    assert len(span) == count
    assert reducer.keeps_all(tokens.spans) == (count == math.prod(grid))


@pytest.mark.parametrize("frames", [1, 7, 10, 100, 1000])
def test_a_ratio_counts_as_the_published_rate(frames):
    (span,) = video_tokens(EVS(keep=1), [(frames, 1, 1)]).spans
    for percent in range(100):
        rate = percent / 100
        for keep in (1 - rate, (100 - percent) / 100):
            assert EVS(keep=keep).count(span) == count_of(frames, 1, rate)


def test_images_are_never_touched():
    reducer = EVS(keep=0.25)
    tokens = visual_tokens(reducer, [(0, [(4, 4)] * 3), (1, [(4, 4)])])
    assert reducer.keeps_all(tokens.spans)
    assert [len(span) for span in reducer.select(tokens)] == [48, 16]
    video = visual_tokens(reducer, [(0, [(4, 4)] * 3)], kind="video")
    assert not reducer.keeps_all((*tokens.spans, *video.spans))
    assert EVS(keep={"video": 0.5}).keeps_all(tokens.spans)  # needs no budget for images


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.data(), st.sampled_from([torch.float32, torch.float16])
)
def test_equals_the_reference(frames, height, width, data, dtype):
    seed = data.draw(st.integers(0, 10_000))
    count = data.draw(st.integers(height * width, frames * height * width))
    # Few distinct vectors, so that there are ties and static tokens; they are apart by more than the rounding.
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-3, 4, (4, 5), generator=generator)
    video = words[torch.randint(0, 4, (frames, height * width), generator=generator)]
    assert pick(video[None], count, dtype) == [reference(video.tolist(), count)[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_its_values_in_single(dtype):
    videos = torch.randn(3, 5, 12, 16).cumsum(1).to(dtype)
    assert pick(videos, 25, dtype) == pick(videos.float(), 25)


def test_edge_cases():
    still = torch.randn(1, 4, 6).expand(1, 4, 6).reshape(1, 1, 4, 6).expand(1, 5, 4, 6)
    assert pick(still, 11) == [list(range(11))]  # all static: the earliest
    zeros = torch.zeros(1, 3, 4, 6)
    assert pick(zeros, 7) == [list(range(7))]
    broken = torch.randn(1, 3, 4, 6)
    broken[0, 1, 2] = torch.nan
    assert 6 not in pick(broken, 10)[0]  # no news can be told from it
    assert pick(broken * torch.nan, 5) == [list(range(5))]
    assert pick(torch.randn(1, 4, 1, 6), 1) == [[0]]


def test_noise_below_the_rounding_does_not_decide():
    x = torch.randn(1, 1, 40, 32).repeat(1, 6, 1, 1)
    assert pick(x * torch.rand(1, 6, 40, 1).add(0.5), 100) == [list(range(100))]  # scaling is no news


def test_batch_equals_each_video_alone():
    reducer, shapes = EVS(keep=0.4), [(4, 3, 3), (4, 3, 3), (6, 2, 4), (1, 3, 3), (4, 3, 3)]
    tokens = video_tokens(reducer, shapes)
    together, first = reducer.select(tokens), 0
    for shape, span, chosen in zip(shapes, tokens.spans, together, strict=True):
        alone = video_tokens(reducer, [shape])
        alone.planes[Embeddings()][:] = tokens.planes[Embeddings()][first : first + shape[0]]
        first += shape[0]
        assert reducer.select(alone)[0].kept.tolist() == chosen.kept.tolist()
        flat, video = places(span), torch.stack(alone.planes[Embeddings()]).tolist()
        assert chosen.kept.tolist() == [flat[i] for i in reference(video, len(chosen))[0]]
    assert [span.sample for span in together] == [0, 1, 2, 3, 4]


def test_rows_of_the_encoders_cls_are_counted():
    tokens = foveate.core.tokens.replace(video_tokens(EVS(keep=0.5), [(4, 2, 3)]), cls=True)
    assert EVS(keep=0.5).select(tokens)[0].extra == 4


def test_what_cannot_be_compared_is_refused():
    chain = Chain(Random(keep=0.5), EVS(keep=0.2))
    with pytest.raises(InputError, match="first in the chain"):
        chain.select(video_tokens(chain, [(4, 2, 3)]))
    uneven = visual_tokens(EVS(keep=0.5), [(0, [(2, 3), (2, 4)])], kind="video")
    with pytest.raises(InputError, match="equal grids"):
        EVS(keep=0.5).select(uneven)
    with pytest.raises(BudgetError, match="known before"):
        EVS(keep=Budget.coverage(0.9))


@pytest.mark.parametrize("then", [VisPruner(keep=0.5), VisPruner(keep=7), FasterVLM(keep=Budget(3, per="crop")),
                                  VisPruner(keep=Budget(9, per="joint")), Random(keep=0.3)], ids=repr)  # fmt: skip
def test_a_spatial_method_thins_out_what_is_left(then):
    chain = Chain(EVS(keep=0.3), then)
    tokens = video_tokens(chain, [(6, 4, 4), (6, 4, 4), (3, 4, 4)])
    # One frame that only repeats the one before is left empty.
    rows = tokens.planes[Embeddings()]
    rows[2] = rows[1].clone()
    first, both = EVS(keep=0.3).select(tokens), chain.select(tokens)
    left = tokens.after(first).spans
    assert len(left[0].crops[2]) == 0
    assert left[0].crops[0].grid == (4, 4)
    for a, b, span in zip(first, both, left, strict=True):
        assert set(b.kept.tolist()) <= set(a.kept.tolist())
        assert len(b) == sum(span.budget(then.keep))
        assert 0 < len(b) < len(a)


def test_chain_keeps_all_only_if_both_do():
    images = visual_tokens(EVS(keep=0.25), [(0, [(4, 4)])]).spans
    assert Chain(EVS(keep=0.25), VisPruner(keep=16)).keeps_all(images)
    assert not Chain(EVS(keep=0.25), VisPruner(keep=8)).keeps_all(images)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_models_of_images_run_unchanged(family):
    inputs = collate(samples(family))
    reduced = foveate.reduce(model(family), inputs, EVS(keep=0.25))
    assert dict(reduced) == inputs
    assert all(span.is_identity for span in reduced.selection)


@pytest.mark.parametrize("keep", [0.7, 100])
def test_video_llava(keep):
    net, inputs = model("video_llava"), collate(samples("video_llava"))
    reduced = foveate.reduce(net, inputs, EVS(keep=keep))
    with torch.no_grad():
        features = net.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    videos = [span for span in reduced.selection if span.kind == "video"]
    assert len(videos) == 3
    count = keep if isinstance(keep, int) else count_of(FRAMES, SIDE**2, 1 - keep)
    for span, x in zip(videos, features.reshape(3, FRAMES, SIDE**2 + 1, -1), strict=True):
        kept, _ = reference(x[:, 1:].tolist(), count)
        assert span.kept.tolist() == [i + i // SIDE**2 + 1 for i in kept]
    assert all(span.is_identity for span in reduced.selection if span.kind == "image")


def test_video_llava_in_a_chain():
    net, inputs = model("video_llava"), collate([sample(4, VISUALS["video_llava"][0], 5, seed=1)])
    with foveate.attach(net, Chain(EVS(keep=0.7), VisPruner(keep=20))) as handle:
        net.generate(**inputs, max_new_tokens=2, do_sample=False)
    ((span,),) = handle.selections
    assert len(span) == 20
