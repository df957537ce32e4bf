"""Separators: newline vectors and frame tokens, dropped, kept, or kept where something is left."""

import pytest
import torch

import foveate
from foveate import Budget, Reducer
from foveate.core.reducer import identity
from foveate.engines.transformers.priors import priors_of
from foveate.families import family_of
from foveate.methods import FasterVLM, Pool, Random, Uniform, VisPruner
from tiny import collate, model, samples


def kept_separators(net, inputs, method, separators):
    """Return, per span, the kept positions, the kept separators, and the span."""
    spans = family_of(net).spans(net, inputs)
    reduced = foveate.reduce(net, inputs, method, separators=separators)
    results = []
    for span, chosen in zip(spans, reduced.selection, strict=True):
        chosen.check()
        results.append((set(chosen.kept.tolist()), set(chosen.kept.tolist()) & set(span.separators().tolist()), span))
    return results


@pytest.mark.parametrize("family", ["llava_next", "video_llava"])
@pytest.mark.parametrize("reducer", [Uniform(keep=9), VisPruner(keep=9), Pool(keep=9)], ids=lambda r: r.name)
def test_separators_drop_and_keep(family, reducer):
    net, inputs = model(family), collate(samples(family))
    for (dropped, none, span), (kept, all_of_them, _) in zip(
        kept_separators(net, inputs, reducer, "drop"), kept_separators(net, inputs, reducer, "keep"), strict=True
    ):
        assert none == set()
        assert all_of_them == set(span.separators().tolist())
        assert dropped | all_of_them == kept
        assert len(dropped) == 9
        assert (len(all_of_them) > 0) == (family == "llava_next" or span.kind == "video")


@pytest.mark.parametrize("reducer", [FasterVLM(keep=Budget(6, per="joint")), Pool(keep=6)], ids=lambda r: r.name)
def test_nonempty_newlines_close_a_row_with_a_token(reducer):
    net, inputs = model("llava_next"), collate(samples("llava_next"))
    some = 0
    for kept, newlines, span in kept_separators(net, inputs, reducer, "nonempty"):
        everything = span.separators().tolist()
        width = everything[1] - everything[0] - 1
        expected = {n for n in everything if kept & set(range(n - width, n))}
        assert newlines == expected
        some += 0 < len(newlines) < len(everything)
    assert some


def test_nonempty_cls_tokens_open_a_frame_with_a_token():
    class Last(Reducer):
        """Keeps three tokens of the last frame."""

        name = "last"

        def select(self, tokens):
            chosen = list(Uniform(keep=3).select(tokens))
            for i, span in enumerate(tokens.spans):
                object.__setattr__(chosen[i], "kept", span.crops[-1].index[:3])
            return foveate.Selection(tuple(chosen))

    net, inputs = model("video_llava"), collate(samples("video_llava"))
    for kept, separators, span in kept_separators(net, inputs, Last(keep=3), "nonempty"):
        last = span.crops[-1].index
        assert kept == {*last[:3].tolist(), *separators}
        assert separators == ({int(last[0]) - 1} if span.kind == "video" else set())


@pytest.mark.parametrize("family", ["llava_next", "video_llava"])
@pytest.mark.parametrize("separators", ["drop", "keep", "nonempty"])
@pytest.mark.parametrize("reducer", [Random(keep=9), Pool(keep=9)], ids=lambda r: r.name)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_separators_equal_the_oracle(family, separators, reducer, positions):
    from oracle import rebuilt

    net, inputs = model(family), collate(samples(family)[:2] if family == "llava_next" else samples(family)[::2])
    reduced = foveate.reduce(net, inputs, reducer, separators=separators, positions=positions)
    with torch.no_grad():
        logits = net(**reduced).logits
    expected = rebuilt(net, inputs, reduced.selection.by_prompt(2), positions)
    for got, row in zip(logits, expected, strict=True):
        torch.testing.assert_close(got[-len(row) :], row, atol=1e-4, rtol=1e-4)


def test_separators_outrank_whatever_a_prior_scores():
    class Thousands:
        """What `priors_of` asks of a method inside the LLM."""

        def prior(self, tokens):
            return [torch.arange(len(crop)) + 1000.0 for span in tokens.spans for crop in span.crops]

    net, inputs, method = model("llava_next"), collate(samples("llava_next")), Thousands()
    family = family_of(net)
    spans = family.spans(net, inputs)
    found = priors_of([method], family.encode(net, inputs, spans, ()), identity(spans))[method]
    assert any(len(span.separators()) for span in spans)
    for span, scores in zip(spans, found, strict=True):
        assert torch.equal((scores == torch.inf).nonzero().flatten(), span.separators())
        for crop in span.crops:
            assert torch.equal(scores[crop.index], torch.arange(len(crop)) + 1000.0)
