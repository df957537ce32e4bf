"""Pruned runs equal the plain model with the dropped columns hidden (original positions) or absent (compact)."""

import pytest
import torch
from oracle import (
    REDUCERS,
    answer_logits,
    answer_of,
    both_positions,
    check,
    close,
    every_family,
    every_family_in_depth,
    every_position,
    every_position_in_depth,
    generate,
    rebuilt,
    visible_columns,
    visual_features,
)

import foveate
from foveate.core.reducer import identity
from foveate.engines.pipeline import decide, look
from foveate.engines.settings import Settings
from foveate.engines.transformers.reduce import Reduced
from foveate.methods import Downsample, FasterVLM, Random, Uniform, VisPruner
from tiny import (
    FAMILIES,
    IMAGE,
    METHODS,
    TINIES,
    VIDEO_METHODS,
    Visual,
    cast,
    collate,
    embedded_rows,
    make,
    method_id,
    model,
    sample,
    samples,
)


@every_family
def test_tiny_models_answer_in_many_ways(family):
    """Random weights must not make every oracle agree with everything."""
    net, inputs = model(family), collate(samples(family))
    plain = generate(net, inputs)
    assert len(set(answer_of(plain, inputs).flatten().tolist())) > 8
    best = torch.stack(plain.logits, 1).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3
    # Pictures of zeros fill up the batches of some models.
    blind = generate(net, {k: 0.5 * (x != 0) if x.is_floating_point() else x for k, x in inputs.items()})
    assert (plain.logits[0] - blind.logits[0]).abs().max() > 0.1


@every_position_in_depth
@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)],
    ids=["sdpa", "eager", "bf16"],
)
def test_generation_equals_the_oracle(family, positions, reducer, attention, dtype):
    net, inputs = model(family, attention, dtype), cast(collate(samples(family)), dtype)
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = generate(net, inputs)
    assert [len(row) for row in handle.selections] == [1, 2, 1]
    for row in handle.selections:
        for span in row:
            span.check()
            assert len(span) < span.length
    check(net, inputs, out, handle.selections, positions, dtype)


@every_position
def test_every_family_equals_the_oracle(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs)
    check(net, inputs, out, handle.selections, positions)


@every_family
def test_every_family_keeps_what_a_budget_covers(family):
    net, inputs = model(family), collate(samples(family))
    plain = net(**inputs).logits
    with foveate.attach(net, Random(keep=1.0)):
        assert torch.equal(net(**inputs).logits, plain)


@every_position_in_depth
def test_the_oracles_tell_selections_apart(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Random(keep=9), positions=positions):
        out = generate(net, inputs)
    with foveate.attach(net, Random(keep=9, seed=1)) as other:
        generate(net, inputs)
    logits = answer_logits(net, inputs, other.selections, answer_of(out, inputs), positions)
    assert (logits - torch.stack(out.logits, 1)).abs().max() > 0.1


@every_family_in_depth
@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS, ids=method_id)
def test_prefill_of_every_method_equals_the_oracle(entry, family):
    net, inputs = model(family), collate(samples(family))
    reducer = make(entry, 13, family)
    for positions in TINIES[family].positions:
        reduced = foveate.reduce(net, inputs, reducer, positions=positions)
        with torch.no_grad():
            logits = net(**reduced).logits[:, -1]
        selections = reduced.selection.by_prompt(3)
        if reducer.stage == "pixels":
            assert logits.isfinite().all()
            continue
        given = None
        if reducer.stage == "encoder":  # what the LLM makes of the reduced features
            given = embedded_rows(reduced)
        expected = rebuilt(net, inputs, selections, positions, reducer.merges, given)
        close(logits, torch.stack([x[-1] for x in expected]))


@every_family_in_depth
def test_methods_that_share_a_pass_do_not_disturb_each_other(family):
    """Some need the `[CLS]` tokens or all embeddings, and others, or none at all, do not."""
    net, inputs = model(family), collate(samples(family))
    family_of = foveate.families.family_of(net)
    spans = family_of.spans(net, inputs)
    reducers = [make(entry, 13, family) for entry in METHODS]
    reducers = [r for r in reducers if r.stage == "before_llm" and not family_of.lacks(r)]
    with torch.no_grad():
        tokens = look(net, family_of, inputs, spans, reducers)
        whole = family_of.embed(net, tokens, identity(spans), None)
        alone = family_of.embed(net, look(net, family_of, inputs, spans, []), identity(spans), None)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a, b)
        for reducer in reducers:
            together = decide(tokens, Settings.make(reducer, "compact"))
            reduced = foveate.reduce(net, inputs, reducer)
            assert [s.kept.tolist() for s in together] == [s.kept.tolist() for s in reduced.selection]
            embeds = family_of.embed(net, tokens, together, reducer.merges)
            shared = Reduced(mm_encoder_outputs=family_of.encoder_outputs(spans, embeds))
            shared.selection = reduced.selection
            for x, given in zip(embedded_rows(shared), embedded_rows(reduced), strict=True):
                close(x, given)


@both_positions
def test_downsample_equals_smaller_pictures(positions):
    net, inputs = model("llava"), collate([sample(4, "image", 5, seed=1)])
    reduced = foveate.reduce(net, inputs, Downsample(keep=16), positions=positions)
    assert len(reduced.selection[0]) == 16
    small = torch.nn.functional.interpolate(inputs["pixel_values"], size=(16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        tower = net.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        expected = net.model.multi_modal_projector(tower.hidden_states[-2][0, 1:])
        (embeds,) = reduced["mm_encoder_outputs"]["image"].pooler_output
        torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
        ids = torch.cat([inputs["input_ids"][:, :4], torch.full((1, 16), IMAGE), inputs["input_ids"][:, -5:]], 1)
        assert torch.equal(reduced["input_ids"], ids)
        embedded = net.get_input_embeddings()(ids)
        embedded[0, 4:20] = expected
        columns = torch.tensor(visible_columns(inputs, reduced.selection.by_prompt(1)))
        at = columns if positions == "original" else torch.arange(ids.shape[1])[None]
        close(net(**reduced).logits, net(inputs_embeds=embedded, position_ids=at).logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if foveate.families.all_families()[f].resizes])
def test_downsample_through_every_tower(family):
    """Of a crop whose grid stays whole, the resized picture is the picture."""
    net, inputs = model(family), collate(samples(family))
    family_of = foveate.families.family_of(net)
    spans = family_of.spans(net, inputs)
    with torch.no_grad():
        same = family_of.encode_at(net, inputs, spans, [[c.grid for c in s.crops] for s in spans])
        tokens = family_of.encode(net, inputs, spans, ())
        for span, parts, hidden_states in zip(spans, same, tokens.hidden, strict=True):
            for crop, part in zip(span.crops, parts, strict=True):
                # Others were cut from their crop, and lose its surroundings.
                if TINIES[family].whole_grid in (None, crop.grid):
                    close(part, hidden_states[crop.index])


@every_family
def test_features_are_the_models_own(family):
    """Projected alone or together with all others, kept tokens have the embeddings of the plain model."""
    net, inputs = model(family), collate(samples(family))
    features = visual_features(net, inputs)
    reduced = foveate.reduce(net, inputs, Random(keep=9), separators="keep")
    for kind, output in reduced["mm_encoder_outputs"].items():
        spans = [s for s in reduced.selection if s.kind == kind]
        parts = features[kind].split([s.length for s in spans])
        expected = [part[span.kept] for span, part in zip(spans, parts, strict=True)]
        got = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
        torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_pixels_in_single_precision_for_a_model_in_half():
    net, inputs = model("llava", dtype=torch.bfloat16), collate(samples("llava"))
    with foveate.attach(net, Uniform(keep=9)):
        mixed = generate(net, inputs)
        same = generate(net, cast(inputs, torch.bfloat16))
    assert torch.equal(mixed.sequences, same.sequences)


def test_flat_pixels_of_llava_next():
    net = model("llava_next")
    row = sample(3, Visual("llava_next", (64, 64)), 2, Visual("llava_next", (60, 60)), 4)
    inputs = collate([row])
    flat = {**inputs, "pixel_values": torch.cat([x[0] for x in row["pixel_values"]])}
    reduced, other = (foveate.reduce(net, x, VisPruner(keep=9)) for x in (inputs, flat))
    assert [s.kept.tolist() for s in reduced.selection] == [s.kept.tolist() for s in other.selection]
    assert torch.equal(net(**reduced).logits, net(**other).logits)


@every_family
def test_attention_implementation_does_not_change_what_is_salient(family):
    inputs = collate(samples(family))
    by_sdpa, by_eager = (
        foveate.reduce(model(family, attention), inputs, FasterVLM(keep=0.2)).selection
        for attention in ("sdpa", "eager")
    )
    assert [s.kept.tolist() for s in by_sdpa] == [s.kept.tolist() for s in by_eager]
