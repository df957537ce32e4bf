"""The embedded model under lmms-eval, on tasks made from scenes, against foveate's own evaluation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: the extra foveate[eval]")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

import foveate
from foveate import Chain, VisPruner, nano
from foveate.core.errors import FoveateError, InputError, UnknownNameError
from foveate.eval import lmms
from foveate.eval.lmms_model import ChatFoveate, SimpleFoveate
from foveate.methods.fastv import FastV
from foveate.nano.evaluate import Tally, evaluate
from foveate.nano.runner import Condition, Runner

TASKS = Path(__file__).resolve().parents[2] / "examples/lmms-eval"
SCENES, BATCH = 4, 8
REDUCERS = {"unpruned": None, "vispruner": VisPruner(keep=32)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with scenes, where the tasks look for them."""
    from foveate.cli import app

    folder = tmp_path_factory.mktemp("lmms")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        assert CliRunner().invoke(app, ["scenes", "--n", str(SCENES)]).exit_code == 0
        yield folder


@pytest.fixture(scope="module")
def outcomes(place):
    """Results and samples of lmms-eval by arm."""
    found = {}
    for name, reducer in REDUCERS.items():
        files = {"out": place / f"{name}.json", "samples": place / f"{name}.jsonl"}
        run = lmms.run("nano", ["nano_scenes"], reducer, batch_size=BATCH, include_path=TASKS, **files)
        assert json.loads(files["out"].read_text()) == run
        found[name] = run, [json.loads(line) for line in files["samples"].read_text().splitlines()]
    return found


@pytest.fixture(scope="module")
def scenes():
    return list(nano.scenes(n=SCENES))


@pytest.mark.parametrize("arm", REDUCERS)
def test_answers_and_accuracy_are_those_of_foveates_own_evaluation(outcomes, scenes, arm):
    result, samples = outcomes[arm]
    model, processor = nano.load()
    condition = Condition("own", REDUCERS[arm], positions=result["foveate"]["positions"] or "original")
    runner = Runner(model, processor)
    with torch.inference_mode():
        expected = []
        for scene in scenes:
            inputs, tokens = runner.look(scene.image, [] if condition.reducer is None else [condition.reducer])
            expected += runner.answer(*runner.prefix(inputs, tokens, condition), scene.questions)
    assert [sample["filtered_resps"] for sample in samples] == [[word] for word in expected]
    tally: Tally = evaluate(model, processor, scenes, [condition])["own"]
    share = tally.share()
    assert share["questions"] == len(samples) > 40
    reached = 100 * result["results"]["nano_scenes"]["accuracy,none"]
    assert round(reached, 2) == share["accuracy"]
    assert reached > 80


def test_kept_tokens_are_logged_with_every_sample(outcomes):
    for name, kept in (("unpruned", 256), ("vispruner", 32)):
        result, samples = outcomes[name]
        task = result["foveate"]["tasks"]["nano_scenes"]
        assert task["samples"] == len(samples)
        assert task["kept_per_sample"] == [kept] * len(samples)
        assert (task["visual_tokens"], task["kept_tokens"]) == (256, kept)
        assert 0 < task["model_seconds"] < result["foveate"]["seconds"]
        for sample in samples:
            (counts,) = sample["token_counts"]
            words = len(sample["doc"]["text"].replace("?", "").split())
            assert counts["input_tokens"] == 1 + 256 + words
            assert counts["equivalent_tokens"] == counts["kept_tokens"] == kept
            assert counts["output_tokens"] == 2  # the word, and the end


def test_the_result_says_how_it_was_made(outcomes):
    said = outcomes["vispruner"][0]["foveate"]
    assert said["configuration"] == repr(VisPruner(keep=32))
    assert foveate.load_reducer(said["method"].pop("method"), **said["method"]) == VisPruner(keep=32)
    assert {"foveate", "commit", "torch", "transformers", "lmms_eval"} <= set(said["versions"])
    assert (said["family"], said["dtype"], said["attention"], said["processes"]) == ("llava", "float32", "sdpa", 1)
    assert outcomes["unpruned"][0]["foveate"]["configuration"] == "unpruned"


def test_answers_do_not_depend_on_the_batch(outcomes, place):
    args = ["nano", ["nano_scenes"], "vispruner", "32"]
    lmms.run(*args, batch_size=3, limit=20, include_path=TASKS, samples=place / "small.jsonl")
    small = [json.loads(line)["filtered_resps"] for line in (place / "small.jsonl").read_text().splitlines()]
    assert small == [sample["filtered_resps"] for sample in outcomes["vispruner"][1][:20]]


def test_given_answers_can_be_scored(place, outcomes):
    result = lmms.run("nano", ["nano_scenes_choice"], "vispruner", 32, batch_size=6, simple=True, include_path=TASKS)
    right = {"yes": [], "no": []}
    for sample in outcomes["vispruner"][1]:
        if sample["target"] in right:
            right[sample["target"]].append(sample["accuracy"])
    answers = [*right["yes"], *right["no"]]
    assert result["results"]["nano_scenes_choice"]["acc,none"] == pytest.approx(sum(answers) / len(answers))
    assert result["foveate"]["tasks"]["nano_scenes_choice"]["kept_per_sample"] == [32] * len(answers)


def request(kind, task, doc_id, *arguments):
    meta = {"task": task, "doc_id": doc_id, "repeats": 1, "split": "test"}
    return Instance(request_type=kind, arguments=(*arguments, doc_id, task, "test"), idx=0, metadata=meta)


INSIDE = [(FastV(layer=2, keep=16), 256), (Chain(VisPruner(keep=64), FastV(layer=2, keep=16)), 64)]


@pytest.mark.parametrize(("reducer", "before"), INSIDE, ids=["inside", "chain"])
def test_tokens_of_methods_inside_the_llm_are_counted_by_layer(scenes, reducer, before):
    adapter = SimpleFoveate("nano", reducer, batch_size=2)
    adapter.task_dict["t"] = {"test": [scene.image for scene in scenes]}
    asked = [
        request("generate_until", "t", i, words, {"max_new_tokens": 2}, lambda doc: [doc])
        for i, words in enumerate(["where is the key?", "is there a cup?"])
    ]
    for found in adapter.generate_until(asked):
        counts = found.token_counts
        assert (counts.visual_tokens, counts.kept_tokens) == (256, 16)
        assert counts.equivalent_tokens == (before * 2 + 16 * 2) / 4


def test_scores_do_not_depend_on_the_batch_inside_the_llm(scenes):
    words = ["where is the key?", "is there a cup?", "is the red star left of the cup?"]
    scores = []
    for size in (1, 3):
        adapter = SimpleFoveate("nano", INSIDE[1][0], batch_size=size)
        adapter.task_dict["t"] = {"test": [scene.image for scene in scenes]}
        asked = [request("loglikelihood", "t", i, w, "a red star", lambda doc: [doc]) for i, w in enumerate(words)]
        scores.append([found.text for found in adapter.loglikelihood(asked)])
    for (loss, greedy), (other, same) in zip(*scores, strict=True):
        assert loss == pytest.approx(other, abs=1e-3)
        assert greedy == same


@pytest.mark.parametrize("arm", REDUCERS)
def test_scores_are_those_of_prompt_and_answer_in_one_pass(scenes, arm):
    adapter = SimpleFoveate("nano", REDUCERS[arm], batch_size=4)
    adapter.task_dict["t"] = {"test": [scene.image for scene in scenes]}
    asked = [
        (i, words, answer)
        for i, words in ((0, "where is the key?"), (1, "is the red star left of the cup?"))
        for answer in ("yes", "a red star", "top-left")
    ]
    requests = [request("loglikelihood", "t", i, words, answer, lambda doc: [doc]) for i, words, answer in asked]
    model, processor = nano.load()
    with torch.no_grad():
        for (i, words, answer), found in zip(asked, adapter.loglikelihood(requests), strict=True):
            prompt = f"<image> {words} {answer}"
            inputs = processor(images=scenes[i].image, text=prompt, return_tensors="pt")
            if REDUCERS[arm] is not None:
                inputs = foveate.reduce(model, inputs, REDUCERS[arm])
            logits, n = model(**inputs).logits[0], len(processor.tokenizer(answer, add_special_tokens=False).input_ids)
            target = inputs["input_ids"][0, -n:]
            rows = logits[-n - 1 : -1].log_softmax(-1)
            loss, greedy = found.text
            assert loss == pytest.approx(-rows[torch.arange(n), target].mean().item(), abs=1e-4)
            assert greedy == bool((rows.argmax(-1) == target).all())
            assert found.token_counts.kept_tokens == (256 if REDUCERS[arm] is None else 32)


def test_prompts_may_hold_several_images_or_none(scenes):
    adapter = ChatFoveate("nano", "vispruner", 16, batch_size=4)
    talks = [
        [{"type": "image", "url": s.image} for s in scenes[:count]] + [{"type": "text", "text": "where is the key?"}]
        for count in (2, 0, 1, 3)
    ]
    adapter.task_dict["t"] = {"test": talks}
    ask = lambda doc: [{"role": "user", "content": doc}]  # noqa: E731
    found = adapter.generate_until(
        [request("generate_until", "t", i, "", ask, {"max_new_tokens": 3}) for i in range(len(talks))]
    )
    assert [answer.token_counts.kept_tokens for answer in found] == [32, 0, 16, 48]
    assert [answer.token_counts.visual_tokens for answer in found] == [512, 0, 256, 768]
    assert all(answer.text for answer in found)


def test_generation_arguments_are_kept_apart_and_followed(scenes):
    adapter = SimpleFoveate("nano", batch_size=4)
    adapter.task_dict["t"] = {"test": [scenes[0].image]}
    arguments = [{"max_new_tokens": 2}, {"max_new_tokens": 1, "temperature": 0, "top_p": 1.0}, {"max_new_tokens": 2}]
    questions = [
        request("generate_until", "t", 0, "is there a key?", given, lambda doc: [doc])
        for given in (*arguments, {"max_new_tokens": 2, "until": ["e", "s", "o"]})
    ]
    found = adapter.generate_until(questions)
    assert [answer.token_counts.output_tokens for answer in found] == [2, 1, 2, 2]
    word = found[0].text
    assert word in ("yes", "no")
    assert [answer.text for answer in found[1:3]] == [word, word]
    assert found[3].text == word[:1]  # cut before the first stop text


def test_arguments_unknown_to_generate_are_named(monkeypatch):
    from foveate.eval import lmms_model

    said = []
    monkeypatch.setattr(lmms_model.logger, "warning", said.append)
    adapter = SimpleFoveate("nano")
    _, options = adapter._options({"image_aspect_ratio": "pad", "num_beams": 2, "temperature": 0.5, "top_p": 0.9})
    assert options["num_beams"] == 2
    assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 0.5, 0.9)
    assert len(said) == 1
    assert "image_aspect_ratio" in said[0]


def test_the_model_is_let_go(scenes):
    adapter = ChatFoveate("nano", "vispruner", 16)
    model = adapter._model
    adapter.clean()
    assert "generate" not in vars(model)
    assert not model._forward_hooks
    assert adapter._model is None


@pytest.mark.parametrize(
    ("change", "kind", "fault"),
    [
        ({"tasks": ["no_such_task"]}, UnknownNameError, "no task called no_such_task"),
        ({"tasks": []}, InputError, "no task is named"),
        ({"include_path": "nowhere"}, InputError, "no folder with tasks at 'nowhere'"),
        ({"tasks": ["nano_scenes_choice"]}, FoveateError, "simple=True"),
        ({"model": "nonsense"}, UnknownNameError, "no model 'nonsense'"),
        ({"method": "vispruner"}, FoveateError, "lacks keep"),
    ],
)
def test_wrong_input_is_named(place, change, kind, fault):
    given = {"model": "nano", "tasks": ["nano_scenes"], "include_path": TASKS, **change}
    with pytest.raises(kind, match=fault):
        lmms.run(**given)


@pytest.mark.parametrize("size", ["auto", 0, "many"])
def test_a_batch_size_is_a_number(size):
    with pytest.raises(InputError, match="batch size"):
        SimpleFoveate("nano", batch_size=size)


def test_what_a_family_cannot_do_is_named():
    adapter = ChatFoveate("nano")
    with pytest.raises(FoveateError, match="several rounds"):
        adapter.generate_until_multi_round([])
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": "what?"}]}]
    adapter.task_dict["t"] = {"test": [film]}
    with pytest.raises(InputError, match="'llava' takes no videos"):
        adapter.generate_until([request("generate_until", "t", 0, "", lambda doc: doc, {})])


def test_lmms_eval_finds_both_forms():
    registry = ModelRegistryV2()
    registry.register_manifest(lmms.manifest())
    assert registry.get_model_class("foveate") is ChatFoveate
    assert registry.get_model_class("foveate", force_simple=True) is SimpleFoveate


@pytest.mark.slow
def test_lmms_evals_own_command_in_two_processes(place, outcomes):
    points = importlib.metadata.entry_points(group="lmms_eval.models")
    if "foveate" not in points.names:
        pytest.skip("this foveate is not installed, so lmms-eval has no entry point to find it by")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29611", "-m", "lmms_eval"]
    command = [
        sys.executable, *launch, "--model", "foveate", "--model_args", "pretrained=nano,method=vispruner,keep=32",
        "--tasks", "nano_scenes", "--include_path", str(TASKS), "--batch_size", str(BATCH), "--limit", "21",
        "--log_samples", "--output_path", "logs",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=place)
    (listed,) = place.glob("logs/*/*samples_nano_scenes.jsonl")
    rows = sorted(map(json.loads, listed.read_text().splitlines()), key=lambda row: row["doc_id"])
    expected = [sample["filtered_resps"][0] for sample in outcomes["vispruner"][1][:21]]
    assert [row["filtered_resps"] for row in rows] == expected, done.stderr[-2000:]
    assert {row["token_counts"][0]["kept_tokens"] for row in rows} == {32}
