from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate as library
from foveate.core.budget import parse_keep
from foveate.cost import kv_bytes
from foveate.engines.transformers.caches import cache_of
from foveate.measure.job import prepare
from foveate.measure.loading import encoder_view, load_model, open_image, prompt_for
from foveate.measure.run import run_methods
from foveate.registry import load_reducer

FAST = ("--repeats", 1, "--max-new-tokens", 4)


def test_run_reports_what_it_promises(foveate: Any, folder: Path, photo: Path) -> None:
    result = foveate("run", photo, "what is this ?", "--model", folder, "--keep", 16, "--json", *FAST)
    assert result.code == 0, result.err
    data = result.json
    assert {"answer", "answer_unpruned", "method", "tokens", "flops", "kv_bytes", "seconds", "kept", "overlay"} <= set(
        data
    )
    assert data["method"] == repr(library.VisPruner(keep=16))
    assert (data["tokens"]["before"], data["tokens"]["after"]) == (64, 16)
    assert data["tokens"]["spans"] == [{"kind": "image", "grid": [1, 8, 8], "before": 64, "after": 16}]
    assert [len(kept) for kept in data["kept"]] == [16]
    assert all(1 <= count <= 4 for count in data["answer_tokens"].values())
    assert data["flops"]["after"] < data["flops"]["before"]
    for when in ("before", "after"):
        assert data["flops_by_part"][when]["total"] == data["flops"][when]
        seconds = data["seconds"][when]
        assert seconds["total"] == pytest.approx(sum(seconds[s] for s in ("vision", "select", "prefill", "decode")))
        assert min(seconds["vision"], seconds["prefill"], seconds["decode"]) > 0
    assert data["seconds"]["after"]["select"] > data["seconds"]["before"]["select"] == 0
    assert Image.open(data["overlay"]).size > (400, 400)
    assert json.loads((Path(data["overlay"]).parent / "result.json").read_text()) == data


def test_answers_are_those_of_generate(foveate: Any, folder: Path, photo: Path) -> None:
    data = foveate("run", photo, "what is this ?", "--model", folder, "--keep", 8, "--json", *FAST).json
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(photo), text="<image>\nwhat is this ?", return_tensors="pt")
    for key, ready in (
        ("answer_unpruned", dict(inputs)),
        ("answer", library.reduce(model, inputs, "vispruner", keep=8)),
    ):
        out = model.generate(**ready, max_new_tokens=4, do_sample=False)
        assert processor.decode(out[0, ready["input_ids"].shape[1] :], skip_special_tokens=True).strip() == data[key]


def test_a_budget_above_all_tokens_is_the_identity(foveate: Any, folder: Path, photo: Path) -> None:
    data = foveate("run", photo, "what is this ?", "--model", folder, "--keep", 9999, "--json", *FAST).json
    assert data["answer"] == data["answer_unpruned"]
    assert data["flops"]["before"] == data["flops"]["after"]
    assert data["kept"] == [list(range(64))]


@pytest.mark.parametrize("method", ["tome", "flowcut", "visionzip", "prumerge+"])
def test_methods_that_merge_or_act_inside_the_encoder(foveate: Any, folder: Path, photo: Path, method: str) -> None:
    args = ("run", photo, "what is this ?", "--model", folder, "--keep", 8, "--method", method, "--json", *FAST)
    data = foveate(*args).json
    assert [len(kept) for kept in data["kept"]] == [8]
    vision = {when: parts["vision"] for when, parts in data["flops_by_part"].items()}
    two_of_three_layers = vision["after"] / vision["before"] - 2 / 3
    assert (two_of_three_layers < -0.05) == (method in ("tome", "flowcut"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(photo), text="<image>\nwhat is this ?", return_tensors="pt")
    ready = library.reduce(model, inputs, method, keep=8)
    out = model.generate(**ready, max_new_tokens=4, do_sample=False)
    assert processor.decode(out[0, ready["input_ids"].shape[1] :], skip_special_tokens=True).strip() == data["answer"]


def test_a_result_says_where_it_comes_from(foveate: Any, folder: Path, photo: Path) -> None:
    data = foveate("run", photo, "what ?", "--model", folder, "--keep", 9, "--attn", "eager", "--json", *FAST).json
    assert (data["dtype"], data["attention"]) == ("float32", "eager")
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["threads"] == torch.get_num_threads()


def test_compare_lists_the_baselines(foveate: Any, folder: Path, photo: Path) -> None:
    args = ("run", photo, "what is this ?", "--model", folder, "--keep", "0.25", "--compare", *FAST)
    rows = foveate(*args, "--json").json["compare"]
    names = [row["method"].partition("(")[0].lower() for row in rows]
    assert names == ["unpruned", "vispruner", "random", "uniform", "pool", "downsample"]
    assert [row["tokens"] for row in rows] == [64] + [16] * 5
    text = foveate(*args)
    assert text.code == 0
    assert "at the same budget" in text.out
    assert "photo-vispruner-2" in text.out.replace("\n", "")


def test_kv_bytes_are_those_of_the_cache(folder: Path, photo: Path) -> None:
    model, processor = load_model(str(folder))
    job = prepare(model, processor, open_image(photo), "what is this ?")
    (arm,) = run_methods(job, [library.VisPruner(keep=16)], repeats=1)
    reduced = library.reduce(model, job.inputs, library.VisPruner(keep=16))
    with torch.no_grad():
        layers = cache_of(model(**reduced, use_cache=True)).layers
    assert arm.kv_bytes == sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    assert arm.kv_bytes == kv_bytes(model.config.text_config, reduced["input_ids"].shape[1], 4)


@pytest.mark.parametrize("method", ["random", "uniform", "pool", "downsample", "fastervlm"])
def test_every_method_runs(foveate: Any, folder: Path, photo: Path, method: str) -> None:
    result = foveate("run", photo, "what ?", "--model", folder, "--method", method, "--keep", 9, "--json", *FAST)
    assert result.json["tokens"]["after"] == 9
    assert Path(result.json["overlay"]).parent.name == f"photo-{method}"


def test_parameters_files_templates_and_options(foveate: Any, folder: Path, chat_folder: Path, photo: Path) -> None:
    library.VisPruner(keep=7, important_ratio=0.25).save("method.json")
    common = ("run", photo, "what is this ?", "--json", *FAST, "--model")
    data = foveate(*common, folder, "--method", "method.json", "--out", "a/b").json
    assert data["tokens"]["after"] == 7
    assert data["overlay"] == "a/b/overlay.png"
    data = foveate(*common, folder, "--method", "method.json", "--keep", "5").json
    assert "keep=5, important_ratio=0.25" in data["method"]
    data = foveate(*common, folder, "--keep", 9, "--set", "important_ratio=0.3", "--set", "order=rank").json
    assert data["method"] == "VisPruner(keep=9, important_ratio=0.3, step='auto', order='rank')"
    text = data["tokens"]["text"]
    templated = foveate(*common, folder, "--prompt-template", "USER : <image> {question} ASSISTANT :").json
    assert templated["tokens"]["text"] == text + 4
    assert foveate(*common, chat_folder).json["tokens"]["text"] == text + 4
    options = ("--dtype", "bfloat16", "--attn", "eager", "--device-map", "cpu", "--positions", "original")
    bfloat = foveate(*common, folder, *options).json
    assert bfloat["kv_bytes"]["before"] == templated["kv_bytes"]["before"] * (64 + text) // (68 + text) // 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "0"], "at least 1"),
        (["--keep=-3"], "at least 1"),
        (["--keep", "1.5"], "not in (0, 1]"),
        (["--keep", "many"], "a budget is"),
        (["--keep", "64,16"], "2 budgets, but the prompt has 1 image"),
        (["--keep", "nan"], "a budget is a count"),
        (["--method", "nonsense"], "no method is called 'nonsense'"),
        (["--method", "absent.json"], "cannot read the method"),
        (["--method", "chain"], "a chain has one parameter"),
        (["--set", "important_ratio"], "--set takes name=value"),
        (["--set", "method=pool"], "give its name with --method"),
        (["--set", "colour=1"], "does not know colour"),
        (["--set", "important_ratio=7"], "a share from 0 to 1"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--model", "nobody/nothing-at-all"], "no usable model"),
        (["--dtype", "int8"], "dtype is"),
        (["--dtype", "float8_e4m3fn"], "dtype is 'auto', 'float32', 'bfloat16' or 'float16', not 'float8_e4m3fn'"),
        (["--device-map", "meta"], "device_map='meta' loads no weights"),
        (["--device-map", "meta", "--model", "nano"], "device_map='meta' loads no weights"),
        (["--device-map", "nonsense"], "cannot load"),
        (["--attn", "nonsense"], "cannot load"),
        (["--positions", "sideways"], "positions are"),
        (["--separators", "sideways"], "separators are"),
        (["--prompt-template", "{question}"], "0 <image> placeholders"),
        (["--prompt-template", "<image>"], "no place for the question"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    foveate: Any, folder: Path, photo: Path, extra: list[str], message: str
) -> None:
    model = [] if "--model" in extra else ["--model", str(folder)]
    result = foveate("run", photo, "what is this ?", *model, *extra, "--json")
    assert result.code == 2
    assert result.out == ""
    assert message in _error(result.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda(foveate: Any, folder: Path, photo: Path, device: str) -> None:
    for model in (folder, "nano"):
        result = foveate("run", photo, "what ?", "--model", model, "--device-map", device)
        assert result.code == 2
        assert f"device_map='{device}', but PyTorch finds no CUDA device" in _error(result.err)


def _error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_bad_images(foveate: Any, folder: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:150])
    (tmp_path / "empty.png").touch()
    for name in ("absent.png", "text.png", "cut.png", "empty.png", "."):
        result = foveate("run", name, "what ?", "--model", folder)
        assert result.code == 2
        assert name in _error(result.err)


def test_bad_model_folders(foveate: Any, folder: Path, photo: Path, tmp_path: Path) -> None:
    def variant(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    pickled = variant("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    unknown = variant("unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    corrupt = variant("corrupt")
    (corrupt / "model.safetensors").write_bytes(b"nonsense")
    bare = variant("bare")
    (bare / "model.safetensors").unlink()
    wanted = {pickled: "pickled weights only", unknown: "type 'bert'", corrupt: "cannot load", bare: "no weights"}
    for path, message in {**wanted, tmp_path: "no model in"}.items():
        result = foveate("run", photo, "what ?", "--model", path)
        assert result.code == 2
        assert message in _error(result.err)


def test_bad_method_files(foveate: Any, folder: Path, photo: Path, tmp_path: Path) -> None:
    library.Chain(library.VisPruner(keep=32), library.VisPruner(keep=8)).save("chain.json")
    ran = foveate("run", photo, "what ?", "--model", folder, "--method", "chain.json", "--json", *FAST)
    assert ran.json["tokens"]["after"] == 8
    contents = {"broken.json": "{", "list.json": "[1]", "bare.json": "{}", "odd.json": '{"method": ["x"]}'}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    for name in (*contents, "chain.json"):
        result = foveate("run", photo, "what ?", "--model", folder, "--method", name, "--keep", 4)
        assert result.code == 2
        _error(result.err)


def test_out_that_cannot_be_made(foveate: Any, folder: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = foveate("run", photo, "what ?", "--model", folder, "--out", "file/here", *FAST)
    assert result.code == 2
    assert "cannot make the folder" in _error(result.err)


def _images() -> dict[str, Image.Image]:
    return {
        "one.png": Image.new("RGB", (1, 1), "red"),
        "wide.png": Image.new("RGB", (4000, 30), "red"),
        "tall.png": Image.new("L", (3, 200), 9),
        "clear.png": Image.new("RGBA", (9, 9), (255, 0, 0, 0)),
        "palette.gif": Image.new("P", (20, 10)),
        "cmyk.jpg": Image.new("CMYK", (20, 10)),
        "bits.png": Image.new("1", (20, 10)),
        "deep.png": Image.new("I;16", (20, 10), 32896),
        "deep.tif": Image.new("F", (20, 10), 0.5),
    }


@pytest.mark.parametrize("name", _images())
def test_odd_images_run(foveate: Any, folder: Path, tmp_path: Path, name: str) -> None:
    _images()[name].save(tmp_path / name)
    result = foveate("run", name, "what ?", "--model", folder, "--keep", 4, "--json", *FAST)
    assert result.code == 0, result.err
    assert result.json["tokens"]["after"] == 4


def test_images_open_as_upright_rgb(tmp_path: Path) -> None:
    for name, image in _images().items():
        image.save(tmp_path / name)
    opened = {name: open_image(tmp_path / name) for name in _images()}
    assert {image.mode for image in opened.values()} == {"RGB"}
    assert opened["clear.png"].getpixel((0, 0)) == (255, 255, 255)
    assert opened["deep.png"].getpixel((0, 0)) == (128, 128, 128)
    assert opened["deep.tif"].getpixel((0, 0)) == (128, 128, 128)
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_encoder_view_is_what_the_processor_cuts_out(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    view = encoder_view(processor, image)
    assert view.size == (100, 100)
    assert view.getcolors() == [(10000, (255, 0, 0))]
    assert encoder_view(processor, Image.new("RGB", (1, 1))).size == (1, 1)
    processor.image_processor.image_grid_pinpoints = [[56, 112]]  # as LLaVA-NeXT has them
    assert encoder_view(processor, image) is image


def test_keep_is_read_as_written() -> None:
    assert [parse_keep(text) for text in ("32", "0.1", "1.0", "64,16", "0.5,8")] == [32, 0.1, 1.0, [64, 16], [0.5, 8]]
    assert isinstance(parse_keep("1.0"), float)
    coverage = library.Budget.coverage
    assert parse_keep("coverage:0.9") == coverage(0.9)
    assert parse_keep("coverage:0.9:16") == coverage(0.9, least=16)
    assert parse_keep("coverage:0.9:16:144") == coverage(0.9, least=16, most=144)
    assert parse_keep("coverage:0.5,64") == [coverage(0.5), 64]
    assert load_reducer("random", keep=parse_keep("64,16")).keep == (64, 16)


@pytest.mark.parametrize(
    "text", ["coverage", "coverage:", "coverage:x", "coverage:2", "coverage:0.9:0", "coverage:0.9:8:4",
             "coverage:0.9:1.5", "coverage:0.9:1:2:3", "cover:0.9", "0.5:3"],
)  # fmt: skip
def test_what_is_no_budget_is_one_line(foveate: Any, folder: Path, photo: Path, text: str) -> None:
    result = foveate("run", photo, "what ?", "--model", folder, "--keep", text)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1


def test_adaptive_budgets(foveate: Any, folder: Path, photo: Path) -> None:
    args = ("run", photo, "what is this ?", "--model", folder, "--json", *FAST)
    half, most = (foveate(*args, "--keep", f"coverage:{share}").json["tokens"]["after"] for share in (0.5, 0.9))
    assert 0 < half < most < 64
    assert foveate(*args, "--keep", "coverage:0.5:1:5").json["tokens"]["after"] == min(half, 5) == 5
    data = foveate(*args, "--keep", "coverage:0.5", "--compare").json
    rows = {row["method"].partition("(")[0].lower(): row["tokens"] for row in data["compare"]}
    assert rows.pop("unpruned") == 64
    assert rows.pop("downsample") <= half
    assert set(rows.values()) == {half}


def test_baselines_of_a_chain_get_what_it_keeps(foveate: Any, folder: Path, photo: Path) -> None:
    library.Chain(library.VisPruner(keep=0.5), library.VisPruner(keep=0.25)).save("chain.json")
    data = foveate("run", photo, "what ?", "--model", folder, "--method", "chain.json", "--compare", "--json", *FAST)
    assert [row["tokens"] for row in data.json["compare"]][:4] == [64, 8, 8, 8]


def test_questions_cannot_bring_placeholders(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(library.FoveateError, match="placeholder"):
        prompt_for(processor, "what is <image> ?")
    with pytest.raises(library.FoveateError, match="empty"):
        prompt_for(processor, " ")


@pytest.mark.slow
def test_standard_output_holds_json_alone(folder: Path, photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foveate", "run", str(photo), "what ?", "--model", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["tokens"]["after"] == 16
    assert "loading" in done.stderr


def test_example_runs_on_a_folder(folder: Path, photo: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "llava.py"
    command = [sys.executable, str(script), "--model", str(folder), "--image", str(photo), "--keep", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all tokens:" in done.stdout
    assert "16 of 64 tokens:" in done.stdout


@pytest.mark.parametrize("method", ["fastv", "chain"])
def test_methods_inside_the_llm(foveate: Any, folder: Path, photo: Path, tmp_path: Path, method: str) -> None:
    reducer: Any = library.methods.FastV(keep=8, layer=1)
    if method == "chain":
        reducer = library.Chain(library.VisPruner(keep=20), reducer)
    reducer.save(tmp_path / "method.json")
    args = ("run", photo, "what is this ?", "--model", folder, "--method", tmp_path / "method.json", *FAST, "--compare")
    result = foveate(*args, "--json")
    assert result.code == 0, result.err
    data = result.json
    given = 64 if method == "fastv" else 20
    assert data["layers"] == {"before": [64, 64], "after": [given, 8]}
    assert data["equivalent_tokens"] == {"before": 64.0, "after": (given + 8) / 2}
    assert data["tokens"]["after"] == len(data["kept"][0]) == 8
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text = data["tokens"]["text"]
    assert data["kv_bytes"]["after"] == kv_bytes(model.config.text_config, [text + given, text + 8], 4)
    assert data["flops_by_part"]["after"]["selection"] > 0
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(photo), text="<image>\nwhat is this ?", return_tensors="pt")
    with library.attach(model, reducer):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer == data["answer"]
    assert {round(row["equivalent_tokens"]) for row in data["compare"][2:]} <= {(given + 8) // 2, 30, 36, 12, 14}
    shown = foveate(*args)
    assert "mean over layers" in shown.out


def test_budgets_that_have_another_name(foveate: Any) -> None:
    def run(*arguments: object) -> Any:
        return foveate("cost", "--model", "llava-1.5-7b", "--json", *arguments)

    assert run("--method", "fastv", "--set", "equivalent=192").json["method"].startswith("FastV(keep=166, layer=2")
    assert "keep=0.25" in run("--method", "fastv").json["method"]
    ratios = run("--method", "vflowopt_all", "--set", "ratios=[0.5, 0.5, 0.5]").json["method"]
    assert "keep=None, ratios=(0.5, 0.5, 0.5)" in ratios
    assert run("--method", "todre_exit").json["method"].startswith("ToDREExit(keep=None")
    refused = run("--method", "todre_exit", "--keep", 8)
    assert (refused.code, refused.out) == (2, "")
    assert "leave keep=8 out" in refused.err
