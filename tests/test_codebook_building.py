"""How a codebook is built: clustering, divergence, and the three tests of a token against plain references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.clustering import dpc_knn
from foveate.core.codebook import Codebook, projector_hash
from foveate.core.errors import FoveateError, InputError
from foveate.families import family_of
from foveate.fit.codebook import Builder, Recipe, divergence, neighbourhood, spread_ranks
from tiny import PAD, VISUALS, collate, model, sample, samples


def plain_divergence(base, other, words):
    best = sorted(range(len(base)), key=lambda i: -base[i])[:words]
    p, q = ([math.exp(x[i]) for i in best] for x in (base, other))
    p, q = ([x / math.fsum(d) for x in d] for d in (p, q))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) + b * math.log(b / m)) / 2
    return total / len(best)


def test_divergence_numbers():
    # KL((.5, .5) | (.7, .3)) = .087177, KL((.9, .1) | (.7, .3)) = .116322: half their sum, and the mean of two words.
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert float(divergence(p, q)) == pytest.approx(0.101749 / 2, abs=1e-6)
    assert float(divergence(q, p)) == float(divergence(p, q))
    assert float(divergence(p, p + 3)) == pytest.approx(0, abs=1e-12)
    apart = torch.tensor([[0.0, -80.0], [-80.0, 0.0]])
    assert float(divergence(*apart)) == pytest.approx(math.log(2) / 2)
    # Only the words that the first one likes best count, among themselves.
    wide, other = torch.tensor([1.0, 0.0, -9.0, -9.0]), torch.tensor([3.0, 2.0, 50.0, -7.0])
    assert float(divergence(wide, other, words=2)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(wide, other, words=3)) > 0.1


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_divergence_equals_the_reference(seed, words):
    generator = torch.Generator().manual_seed(seed)
    base, others = torch.randn(12, generator=generator), torch.randn(3, 12, generator=generator) * 3
    found = divergence(base[None], others, words).tolist()
    assert found == pytest.approx([plain_divergence(base.tolist(), x.tolist(), words) for x in others], abs=1e-9)
    assert all(0 <= x <= math.log(2) / words + 1e-12 for x in found)


def plain_dpc_knn(points, clusters, neighbours):
    points = [[x / math.sqrt(len(p)) for x in p] for p in points]
    size = len(points)
    if size == 1:
        return [0], [0]
    d = [[math.dist(p, q) for q in points] for p in points]
    density = []
    for i in range(size):
        near = sorted(d[i][j] for j in range(size) if j != i)[:neighbours]
        density.append(-sum(x * x for x in near) / len(near))
    order = sorted(range(size), key=lambda i: -density[i])
    gap = [max(d[i]) if i == order[0] else min(d[i][j] for j in order[: order.index(i)]) for i in range(size)]
    centres = sorted(range(size), key=lambda i: -math.exp(density[i]) * gap[i])[:clusters]
    labels = [min(range(clusters), key=lambda k: d[i][centres[k]]) for i in range(size)]
    for k, i in enumerate(centres):
        labels[i] = k
    return labels, centres


def test_clusters_of_a_toy():
    corner = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1]])
    cross = torch.tensor([[5.1, 5], [5, 5], [4.9, 5], [5, 5.1]])
    points = torch.cat([corner, cross, corner + torch.tensor([9.0, 0])])
    labels, centres = dpc_knn(points, 3, neighbours=2)
    groups = {tuple((labels == k).nonzero().flatten().tolist()) for k in range(3)}
    assert groups == {(0, 1, 2), (3, 4, 5, 6), (7, 8, 9)}
    # The point that is next to its two nearest ones in each group.
    assert set(centres.tolist()) == {0, 4, 7}
    assert labels[centres].tolist() == [0, 1, 2]
    alone, centre = dpc_knn(points[:1], 1)
    assert (alone.tolist(), centre.tolist()) == ([0], [0])


@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 10_000), st.data())
def test_clusters_equal_the_reference(size, neighbours, seed, data):
    clusters = data.draw(st.integers(1, size))
    points = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    labels, centres = dpc_knn(points, clusters, neighbours)
    assert (labels.tolist(), centres.tolist()) == plain_dpc_knn(points.tolist(), clusters, neighbours)


def test_clusters_in_chunks(monkeypatch):
    points = torch.randn(50, 4)
    whole = dpc_knn(points, 7)
    monkeypatch.setattr("foveate.core.clustering._ROWS", 8)
    for a, b in zip(whole, dpc_knn(points, 7), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clusters", [0, 4])
def test_impossible_numbers_of_clusters(clusters):
    with pytest.raises(InputError, match="3 points make 1 to 3 clusters"):
        dpc_knn(torch.randn(3, 2), clusters)


def test_identical_points_fall_into_one_cluster():
    labels, centres = dpc_knn(torch.ones(6, 3), 2)
    assert len(set(centres.tolist())) == 2
    assert labels.bincount().tolist() in ([5, 1], [1, 5])


def test_neighbourhoods():
    assert neighbourhood(6, (4, 5)) == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert neighbourhood(0, (4, 5)) == [0, 1, 5, 6]
    assert neighbourhood(19, (4, 5)) == [13, 14, 18, 19]
    assert neighbourhood(10, (4, 5)) == [5, 6, 10, 11, 15, 16]
    assert neighbourhood(2, (1, 4)) == [1, 2, 3]
    assert neighbourhood(0, (1, 1)) == [0]


def test_ranks_are_spread():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2])
    assert spread_ranks(scores, 3) == [4, 3, 0]
    assert spread_ranks(scores, 99) == [1, 4, 2, 3, 5, 0]
    assert len(set(spread_ranks(torch.zeros(577), 96))) == 96


EVERYTHING = {"confidence": 2.0, "divergence": math.inf, "largest": 1000}


def builder(net, **changes):
    return Builder(net, family_of(net), Recipe(**changes), PAD)


def answers(net, inputs, rows):
    """The plain model's logits for a prompt whose image is replaced by some rows."""
    ids, embed = inputs["input_ids"][0], net.get_input_embeddings()
    places = (ids == net.config.image_token_id).nonzero().flatten()
    before, after = embed(ids[: places[0]]), embed(ids[places[-1] + 1 :])
    with torch.no_grad():
        return net(inputs_embeds=torch.cat([before, rows, after])[None]).logits[0, -1]


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_token_is_tested_as_described(repeat, monkeypatch):
    net, inputs = model("llava"), collate([sample(4, "image", 5, seed=1)])
    seen = {}
    made = builder(net, samples=5, repeat=repeat, batch=2, **EVERYTHING)
    leave_out = made._leave_out
    monkeypatch.setattr(made, "_leave_out", lambda ask, places: seen.setdefault("effect", leave_out(ask, places)))
    monkeypatch.setattr(
        "foveate.fit.codebook._confidence", lambda logits, _: seen.setdefault("logits", logits)[:, 0].tolist()
    )
    made.add(inputs)
    with torch.no_grad():
        tower = net.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0]
        rows = net.model.multi_modal_projector(tower[1:])
        pad = net.get_input_embeddings()(torch.tensor(PAD))
    tested = spread_ranks(torch.cosine_similarity(tower[1:], tower[:1]), 5)
    effect = []
    for k, i in enumerate(tested):
        torch.testing.assert_close(seen["logits"][k], answers(net, inputs, rows[[i] * repeat]), atol=1e-4, rtol=1e-4)
        near = neighbourhood(i, (8, 8))
        without = rows[near].clone()
        without[near.index(i)] = pad
        hole = rows.clone()
        hole[near] = pad
        pairs = [(rows[near], without), (rows, hole)]
        local, whole = (divergence(answers(net, inputs, a), answers(net, inputs, b)).item() for a, b in pairs)
        effect.append(local + 16 * whole)
    assert seen["effect"] == pytest.approx(effect, rel=1e-3, abs=1e-6)
    assert made.counts == {"images": 1, "tested": 5, "unsure": 5, "without_effect": 5, "in_small_clusters": 5}


def test_confidence_is_taken_over_the_likeliest_words():
    from foveate.fit.codebook import _confidence

    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    e = math.e
    assert _confidence(logits, 2) == pytest.approx([e / (e + 1), 0.5])
    assert _confidence(logits, 50) == pytest.approx([e**2 / (e**2 + e + 2), 0.25])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_prototypes_are_tokens_of_many_images(family):
    net = model(family)
    made = builder(net, samples=12, clusters=2, spread=2, batch=7, **EVERYTHING)
    own = []
    for seed in range(3):
        inputs = collate([sample(4, VISUALS[family][0], 5, seed=seed)])
        made.add(inputs)
        features = net.get_image_features(
            inputs["pixel_values"], **({"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {})
        ).pooler_output
        own.append(torch.cat(list(features)).reshape(-1, features[0].shape[-1]).detach())
    book = made.codebook("tiny")
    assert (book.model, book.projector) == ("tiny", projector_hash(net.model.multi_modal_projector))
    nearest = [torch.cdist(book.prototypes.double(), x.double()).amin(dim=1) for x in own]
    assert torch.stack(nearest).amin(dim=0).max() < 1e-4  # each is a token as it is
    assert {int(i) for i in torch.stack(nearest).argmin(dim=0)} == {0, 1, 2}
    assert book.built["counts"]["prototypes"] == len(book.prototypes) <= 36
    assert book.built["recipe"]["samples"] == 12


def test_the_file_brings_everything_back(tmp_path):
    book = Codebook(torch.randn(4, 6), "m", "abc", {"counts": {"images": 3}})
    book.save(tmp_path / "x.safetensors")
    loaded = Codebook.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.prototypes, book.prototypes)
    assert (loaded.model, loaded.projector, loaded.built) == ("m", "abc", {"counts": {"images": 3}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confidence": 0.0}, r"say something. The lowest confidence is 0\.\d+, the limit 0: raise it"),
        ({"divergence": 0.0}, r"changes an answer when left out. The lowest divergence is \S+, the limit 0"),
        ({"largest": 1, "image_clusters": 1}, "all in clusters of more than 1 in their image"),
        ({"spread": 64}, "clusters from at most 2 images, and more than 64 are asked for"),
    ],
)
def test_errors_say_which_step_nothing_passed(changes, message):
    net = model("llava")
    made = builder(net, **{"samples": 6, "clusters": 1, "spread": 0, **EVERYTHING, **changes})
    for seed in range(2):
        made.add(collate([sample(4, "image", 5, seed=seed)]))
    with pytest.raises(FoveateError, match=message):
        made.codebook("tiny")


def test_only_single_images_are_taken():
    net = model("llava")
    for inputs in (collate(samples("llava")), collate([sample(2, "image", 3, "image", 4)])):
        with pytest.raises(InputError, match="one image"):
            builder(net).add(inputs)
