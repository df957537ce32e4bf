"""Benchmark messages become prompts with the images and videos that they name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from foveate import nano
from foveate.core.errors import InputError
from foveate.eval.conversations import batch_inputs, conversation, interleaved, pad_on_the_left, read_video
from foveate.measure.loading import prompt_for


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    made = AutoProcessor.from_pretrained(nano.WEIGHTS)
    pad_on_the_left(made)
    return made


def text(words):
    return {"type": "text", "text": words}


def picture(shade=0, size=(192, 192)):
    return {"type": "image", "url": Image.new("RGB", size, (shade, shade, shade))}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_one_question_about_one_image_is_what_run_asks(processor):
    talk = conversation(processor, [user(picture(), text("where is the key?"))])
    assert talk.prompt == prompt_for(processor, "where is the key?")
    assert talk.kinds == (True, False)
    assert talk.images[0].size == (192, 192)


def test_turns_and_plain_text_go_into_the_template(processor):
    turns = [user(picture(), text("is there a key?")), {"role": "assistant", "content": "yes"}, user(text("where?"))]
    talk = conversation(processor, turns)
    assert [talk.prompt.index(words) for words in ("<image>", "is there", "yes", "where?")] == sorted(
        talk.prompt.index(words) for words in ("<image>", "is there", "yes", "where?")
    )
    assert len(talk.images) == 1


def test_images_stand_where_the_text_names_them():
    first, second = picture(1), picture(2)
    parts = interleaved([first, second, text("left <image> or right<image>?")])
    assert parts == [text("left "), first, text(" or right"), second, text("?")]
    assert interleaved([first, text("no place named")]) == [first, text("no place named")]
    film = {"type": "video", "url": "a.mp4"}
    assert interleaved([film, first, text("<image> and this")]) == [film, first, text(" and this")]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_placeholders_must_match_the_images(images):
    with pytest.raises(InputError, match=f"{images} images, but its text says <image> 2 times"):
        interleaved([*[picture()] * images, text("<image> and <image>")])


def test_other_media_are_refused(processor):
    with pytest.raises(InputError, match="not 'audio'"):
        conversation(processor, [user({"type": "audio", "url": "a.wav"}, text("what is said?"))])


@pytest.mark.parametrize(("source", "fault"), [([1, 2], "not list"), ("missing.png", "no image file")])
def test_unusable_images_are_named(processor, source, fault):
    with pytest.raises(InputError, match=fault):
        conversation(processor, [user({"type": "image", "url": source}, text("what?"))])


def test_without_a_chat_template_images_go_before_the_text(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    talk = conversation(processor, [user(picture(), text("where is the key?"))])
    assert talk.prompt == "<image>\nwhere is the key?" == prompt_for(processor, "where is the key?")


def test_pictures_are_made_rgb_and_files_are_read(processor, tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (20, 30), 7).save(path)
    grey = {"type": "image", "url": Image.new("L", (10, 10), 7)}
    talk = conversation(processor, [user(grey, {"type": "image", "url": str(path)}, text("same?"))])
    assert [image.mode for image in talk.images] == ["RGB", "RGB"]
    assert talk.images[1].size == (20, 30)


def test_a_batch_is_padded_on_the_left_and_begins_once(processor):
    short = conversation(processor, [user(picture(), text("where is the key?"))])
    long = conversation(processor, [user(picture(9), picture(5), text("what number is on the blue sign?"))])
    inputs = batch_inputs(processor, [short, long], frames=4)
    ids, bos = inputs["input_ids"], processor.tokenizer.bos_token_id
    assert inputs["pixel_values"].shape[0] == 3
    assert (ids == processor.image_token_id).sum(dim=1).tolist() == [256, 512]
    assert (ids == bos).sum(dim=1).tolist() == [1, 1]
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def film(path, frames):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(frames):
            shade = np.full((32, 32, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("wanted", "shades"), [(3, [0, 80, 180]), (99, [20 * i for i in range(10)])])
def test_frames_are_taken_evenly_from_a_video(tmp_path, wanted, shades):
    clip, about = read_video(str(film(tmp_path / "film.mp4", 10)), wanted)
    assert clip.shape == (len(shades), 32, 32, 3)
    got = clip.mean(axis=(1, 2, 3))
    assert np.abs(got - np.array(shades)).max() < 10
    assert (np.diff(got) > 0).all()
    assert about.total_num_frames == 10


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("missing.mp4", "no video file at 'missing.mp4'"),
        ({"url": "a.mp4", "video_start": 3}, "clips out of a longer video"),
        (7, "not by int"),
    ],
)
def test_unusable_videos_are_named(source, fault):
    with pytest.raises(InputError, match=fault):
        read_video(source, 4)
