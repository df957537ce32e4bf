import torch
from by_hand import check_boxes, merged, received, saliency

import foveate
from foveate.methods import Random
from tiny import IMAGE, Visual, collate, model, sample, samples

PICTURE = Visual("gemma3", "image")


def test_attention_is_averaged_over_the_pooling_window():
    net, inputs = model("gemma3", "eager"), collate(samples("gemma3"))
    patches = received(net.model.vision_tower, pixel_values=inputs["pixel_values"])
    for values, row in zip(saliency(net, inputs), patches, strict=True):
        torch.testing.assert_close(values, torch.tensor(merged(row, (16, 16), 2)))


def test_tokens_are_where_their_boxes_are():
    net, inputs = model("gemma3"), collate([sample(2, PICTURE, 3)])
    assert check_boxes(net, inputs, [(64, 64)]) == 64


def runs(types):
    """Return the lengths of the runs of ones."""
    return [len(run) for run in "".join(map(str, types)).replace("2", "0").split("0") if run]


def test_images_stay_blocks_of_their_own():
    """Text between images is never dropped, so that no two blocks of mutual attention become one."""
    net = model("gemma3")
    inputs = collate([sample(2, PICTURE, PICTURE, 3)])
    assert runs(inputs["token_type_ids"][0].tolist()) == [64, 64]
    reduced = foveate.reduce(net, inputs, Random(keep=[5, 9]))
    assert runs(reduced["token_type_ids"][0].tolist()) == [5, 9]
    assert torch.equal(reduced["token_type_ids"] == 1, reduced["input_ids"] == IMAGE)


def test_images_that_touch_are_one_block_as_in_the_full_prompt():
    net = model("gemma3")
    inputs = collate([sample(2, PICTURE, PICTURE, 3)])
    inside = ((inputs["input_ids"] != 111) & (inputs["input_ids"] != 112))[0]
    inputs |= {k: inputs[k][:, inside] for k in ("input_ids", "attention_mask", "token_type_ids")}
    assert runs(inputs["token_type_ids"][0].tolist()) == [128]
    assert runs(foveate.reduce(net, inputs, Random(keep=[5, 9]))["token_type_ids"][0].tolist()) == [14]


def test_image_embeddings_of_different_lengths():
    net, inputs = model("gemma3"), collate(samples("gemma3"))
    reduced = foveate.reduce(net, inputs, Random(keep={"image": 7}))
    assert reduced["mm_encoder_outputs"]["image"].pooler_output.shape == (28, 1, 32)
    assert [len(span) for span in reduced.selection] == [7] * 4
