"""Batches: prompts do not disturb each other, whatever their budgets, padding and masks."""

import pytest
import torch
from oracle import (
    TOKENS,
    answer_of,
    both_positions,
    check,
    close,
    every_family,
    every_family_in_depth,
    every_position_in_depth,
    extended,
    generate,
    hidden,
    rebuilt,
    visible_columns,
    visual_features,
)

import foveate
from foveate.methods import Downsample, Pool, Random, Uniform, VisPruner
from tiny import (
    METHODS,
    TINIES,
    VIDEO_METHODS,
    VISUALS,
    collate,
    make,
    method_id,
    model,
    of_each_kind,
    sample,
    samples,
)


@every_family_in_depth
@pytest.mark.parametrize("keep", [1.0, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", of_each_kind(METHODS + VIDEO_METHODS), ids=method_id)
def test_a_budget_for_everything_is_bit_identical(family, keep, entry):
    net, inputs = model(family), collate(samples(family))
    plain = generate(net, inputs, max_new_tokens=3)
    with foveate.attach(net, make(entry, keep, family)) as handle:
        out = generate(net, inputs, max_new_tokens=3)
        assert torch.equal(net(**inputs).logits, model(family)(**inputs).logits)
    assert torch.equal(out.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    assert all(span.is_identity for row in handle.selections for span in row)
    reduced = foveate.reduce(net, inputs, make(entry, keep, family))
    assert dict(reduced) == inputs
    assert reduced.compaction is None


@every_position_in_depth
@pytest.mark.parametrize("reducer", [Random(keep=9, seed=2), Uniform(keep=0.2), Pool(keep=6)], ids=lambda r: r.name)
def test_a_batch_gives_each_prompt_what_it_gets_alone(family, positions, reducer):
    net, rows = model(family), samples(family)
    inputs = collate(rows)
    assert (inputs["attention_mask"] == 0).any()
    with foveate.attach(net, reducer, positions=positions) as handle:
        together = generate(net, inputs)
        selections = handle.selections
        for i, row in enumerate(rows):
            alone = generate(net, collate([row]))
            (own,) = handle.selections
            assert [s.kept.tolist() for s in own] == [s.kept.tolist() for s in selections[i]]
            close(torch.stack(together.logits, 1)[i], torch.stack(alone.logits, 1)[0])
            assert torch.equal(answer_of(together, inputs)[i], alone.sequences[0, -TOKENS:])


@every_position_in_depth
def test_padding_side_does_not_matter(family, positions):
    net, rows = model(family), samples(family)
    with foveate.attach(net, Uniform(keep=9), positions=positions), torch.no_grad():
        left, right = net(**collate(rows, "left")), net(**collate(rows, "right"))
        for i, row in enumerate(rows):
            alone = net(**collate([row])).logits[0]
            close(left.logits[i, -len(alone) :], alone)
            close(right.logits[i, : len(alone)], alone)


@every_position_in_depth
def test_different_budgets_in_one_batch(family, positions):
    """Spans of different lengths after reduction: shorter rows are padded anew."""
    net = model(family)
    a, b, _ = VISUALS[family]
    inputs = collate([sample(3, a, 4, seed=1), sample(2, b, 3, a, 6, seed=2)])
    with foveate.attach(net, Random(keep=(13, 5)), positions=positions) as handle:
        out = generate(net, inputs)
    assert len({len(span) for row in handle.selections for span in row}) == 2
    check(net, inputs, out, handle.selections, positions)


@every_family
def test_budgets_by_kind_and_by_image(family):
    net, inputs = model(family), collate([samples(family)[1]])
    spans = foveate.families.family_of(net).spans(net, inputs)
    assert len(spans) == 2
    tenth = [max(1, round(0.1 * sum(map(len, s.crops)))) for s in spans]
    images = [s.kind == "image" for s in spans]
    for keep, wanted in (
        (7, [7, 7]),
        ([7, 4], [7, 4]),
        ({"image": 7, "video": 0.1}, [7 if image else share for image, share in zip(images, tenth, strict=True)]),
        ({"image": 0.1, "video": 7}, [share if image else 7 for image, share in zip(images, tenth, strict=True)]),
    ):
        assert [len(s) for s in foveate.reduce(net, inputs, Random(keep=keep)).selection] == wanted


@both_positions
def test_one_image_stays_whole_beside_a_reduced_one(positions):
    for family in ("llava", "llava_next"):
        net = model(family)
        a, b, _ = VISUALS[family]
        inputs = collate([sample(2, a, 3, b, 4, seed=2)])
        for reducer in (VisPruner(keep=[1.0, 7]), Pool(keep=[1.0, 7]), Downsample(keep=[1.0, 7])):
            with foveate.attach(net, reducer, positions=positions) as handle:
                out = generate(net, inputs)
            first, second = handle.selections[0]
            assert first.is_identity
            assert len(second) == (7 if reducer.stage == "before_llm" else len(second)) < second.length
            if reducer.stage == "pixels":
                with torch.no_grad():
                    reduced = foveate.reduce(net, inputs, reducer)
                (whole, _) = reduced["mm_encoder_outputs"]["image"].pooler_output
                close(whole, visual_features(net, inputs)["image"][: first.length])
                continue
            whole = extended(inputs, answer_of(out, inputs))
            logits = torch.stack([x[-TOKENS - 1 : -1] for x in rebuilt(net, whole, handle.selections, positions)])
            close(torch.stack(out.logits, 1), logits)


@both_positions
def test_no_attention_mask(positions):
    net, inputs = model("llava"), collate([sample(4, "image", 5, "image", 3, seed=1)])
    bare = {k: x for k, x in inputs.items() if k != "attention_mask"}
    with foveate.attach(net, VisPruner(keep=9), positions=positions) as handle:
        out, logits = generate(net, bare), net(**bare).logits
    check(net, inputs, out, handle.selections, positions)
    close(logits[:, -1], out.logits[0])


@both_positions
def test_own_position_ids(positions):
    net, inputs = model("llava"), collate(samples("llava"))
    full = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with foveate.attach(net, Uniform(keep=9), positions=positions), torch.no_grad():
        if positions == "compact":
            with pytest.raises(foveate.FoveateError, match="leave them out"):
                net(**inputs, position_ids=full)
        else:
            close(net(**inputs, position_ids=full).logits[:, -1], net(**inputs).logits[:, -1])


@every_family
def test_inputs_without_an_image_pass_through(family):
    net, inputs = model(family), collate([sample(5, seed=1), sample(9, seed=2)])
    plain, logits = generate(net, inputs), net(**inputs).logits
    with foveate.attach(net, Random(keep=9)) as handle:
        out = generate(net, inputs)
        assert torch.equal(net(**inputs).logits, logits)
    assert torch.equal(out.sequences, plain.sequences)
    assert handle.selections == []


@both_positions
def test_a_prompt_without_image_in_the_batch(positions):
    net, inputs = model("llava"), collate([sample(9, seed=1), sample(3, "image", 4, seed=2), sample(80, seed=3)])
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs)
    assert [len(row) for row in handle.selections] == [0, 1, 0]
    check(net, inputs, out, handle.selections, positions)


@every_position_in_depth
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_equals_the_oracle(family, positions, side):
    net, inputs = model(family), collate(samples(family), side, labels=True)
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle, torch.no_grad():
        loss = net(**inputs).loss
    plain = {k: x for k, x in inputs.items() if k != "labels"}
    masked = positions == "original" and TINIES[family].masks
    everything = hidden(net, plain, handle.selections) if masked else None
    alone = rebuilt(net, plain, handle.selections, positions)
    losses = []
    for i, columns in enumerate(visible_columns(inputs, handle.selections)):
        logits = everything[i, columns] if masked else alone[i]
        labels = inputs["labels"][i, columns]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] >= 0])
    close(loss, torch.cat(losses).mean())
