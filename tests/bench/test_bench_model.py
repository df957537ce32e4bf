"""The bench of whole models: shapes with random weights, arms, memory, and what is made of the times."""

import functools
import json
import time

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaNextConfig

import foveate
import tiny
from foveate.bench import arms, random_models
from foveate.bench.memory import MemoryMeter
from foveate.bench.model import arms_of, break_even, cache_bytes, comparisons, run_arms
from foveate.bench.tables import markdown, write_report
from foveate.core.errors import InputError, UnknownNameError, UnsupportedModelError
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attached
from foveate.engines.transformers.caches import cache_of
from foveate.families import family_of
from foveate.measure.job import Job
from foveate.measure.timing import STAGES, Clock, FirstToken, median_p90, threads
from foveate.methods import VisPruner
from tiny_families.base import clip_config

TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def llava():
    return LlavaConfig(vision_config=clip_config(), text_config=LlamaConfig(**TEXT), image_token_id=120)


def llava_next():
    config = clip_config()
    side = config.image_size
    points = [[2 * side, 2 * side], [side, 2 * side], [2 * side, side]]
    text = LlamaConfig(**TEXT)
    return LlavaNextConfig(vision_config=config, text_config=text, image_token_id=120, image_grid_pinpoints=points)


@functools.cache
def job():
    torch.manual_seed(0)
    return random_models.random_job(random_models.random_model(llava(), layers=3, dtype="float32"), 9, 4)


def settings(method="vispruner", **config):
    return Settings.make(foveate.load_reducer(method, **config), family=job().family)


@pytest.mark.parametrize("config", [llava, llava_next])
def test_a_tied_model_is_the_whole_model_with_equal_layers(config):
    torch.manual_seed(1)
    tied = random_models.random_model(config(), layers=3, dtype="float32")
    whole = random_models.random_model(config(), layers=3, tied=False, dtype="float32")
    stack = tied.get_decoder().layers
    assert len({p.data_ptr() for layer in stack for p in layer.parameters()}) == len(list(stack[0].parameters()))
    weights = whole.state_dict()
    weights.update(tied.state_dict())
    whole.load_state_dict(weights)
    prompt = random_models.random_job(tied, 7, 4)
    with torch.no_grad():
        a, b = (model(**prompt.inputs) for model in (tied, whole))
        shallow = random_models.random_model(config(), layers=1, dtype="float32")
        shallow.load_state_dict(tied.state_dict(), strict=False)
        c = shallow(**prompt.inputs)
    torch.testing.assert_close(a.logits, b.logits)
    assert not torch.allclose(a.logits, c.logits)
    assert cache_bytes(cache_of(a)) == cache_bytes(cache_of(b)) == 3 * cache_bytes(cache_of(c))
    tokens, width = prompt.inputs["input_ids"].shape[1], 2 * 8
    assert cache_bytes(cache_of(a)) == 2 * 3 * tokens * width * 4


def test_jobs_hold_the_pictures_that_fill_the_tower():
    assert (job().visual_tokens, job().text_tokens) == (64, 9)
    tiled = random_models.random_job(random_models.random_model(llava_next(), layers=1, dtype="float32"), 5, 1)
    assert (tiled.visual_tokens, tiled.text_tokens) == (64 + 16 * 17, 5)
    assert len(tiled.spans[0].crops) == 5


def test_shapes_are_those_of_the_models():
    config, _ = random_models.load_shape("llava-1.5-13b")
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (40, 5120)
    vision = config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size) == (24, 1024, 336)


def test_unusable_shapes_are_refused():
    with pytest.raises(UnknownNameError, match=r"no shape is called 'llava-9', or|llava-1.5-7b"):
        random_models.random_model("llava-9")
    with pytest.raises(InputError, match="at least one layer"):
        random_models.random_model(llava(), layers=0)
    with pytest.raises(InputError, match="not 'int8'"):
        random_models.random_model(llava(), dtype="int8")
    with pytest.raises(InputError, match="at least two text tokens"):
        random_models.random_job(job().model, text_tokens=1)


def test_noise_takes_the_place_of_no_pictures_that_a_processor_cuts():
    with pytest.raises(InputError, match="where no processor cuts or scales them"):
        random_models.random_job(tiny.model("idefics3"))


def clock():
    return Clock(torch.device("cpu"))


def test_arms_answer_as_the_library_does():
    found = {arm.name: arm for arm in arms_of(job(), settings(keep=9, important_ratio=1.0))}
    assert list(found) == ["unpruned", "ratio 1", "method", "oracle", "naive"]
    assert [arm.tokens for arm in found.values()] == [64, 64, 9, 9, 9]
    out = {name: arm.run(clock)[1].sequences[0, -4:].tolist() for name, arm in found.items()}
    model, inputs = job().model, job().inputs
    answer = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert out["unpruned"] == out["ratio 1"] == model.generate(**inputs, **answer)[0, -4:].tolist()
    with torch.no_grad():
        reduced = foveate.reduce(model, inputs, VisPruner(keep=9, important_ratio=1.0))
    assert out["method"] == out["naive"] == model.generate(**reduced, **answer)[0, -4:].tolist()


def test_arms_leave_the_model_as_it_was():
    model = job().model
    for arm in arms_of(job(), settings(keep=9)):
        meter, out = arm.run(clock)
        assert out.sequences.shape[1] == {64: 73, 9: 18}[arm.tokens if arm.name != "ratio 1" else 64] + 4
        assert all(meter.seconds[stage] > 0 for stage in ("vision", "prefill", "decode")), arm.name
        assert (meter.seconds["select"] > 0) == (arm.name in ("method", "naive"))
        assert attached(model) is None
        assert "get_image_features" not in vars(model.model)
        assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_the_oracle_neither_probes_nor_decides(monkeypatch):
    own = settings("random", keep=9)
    _, selection = arms.method(job(), own)
    free = arms.oracle(job(), own, selection)

    def fail(*_, **__):
        raise AssertionError("the oracle got its tokens for free")

    monkeypatch.setattr("foveate.bench.arms.reduce_with", fail)
    monkeypatch.setattr("foveate.bench.arms.apply", fail)
    monkeypatch.setattr("foveate.engines.pipeline.look", fail)
    monkeypatch.setattr(type(own.reducer), "select", fail)
    seen = []
    encode = type(job().family).encode
    monkeypatch.setattr(
        type(job().family), "encode", lambda self, m, i, s, probes: seen.append(probes) or encode(self, m, i, s, probes)
    )
    _, out = free.run(clock)
    assert seen == [()]
    assert out.sequences.shape[1] == 9 + 9 + 4


def test_other_methods_have_no_naive_way():
    assert [arm.name for arm in arms_of(job(), settings("divprune", keep=9))][-1] == "oracle"
    with pytest.raises(UnsupportedModelError, match="not that of divprune on llava"):
        arms.naive(job(), settings("divprune", keep=9), 9)


@pytest.mark.parametrize("name", ["llava_next", "vipllava", "paligemma", "internvl"])
def test_other_models_than_llava_with_clip_have_no_naive_way(name):
    net, inputs = tiny.model(name), tiny.collate([tiny.sample(3, tiny.VISUALS[name][0], 4)])
    family = family_of(net)
    there = Job(net, None, family, inputs, family.spans(net, inputs), 4)
    assert not arms.naive_runs(there, VisPruner(keep=9))
    assert arms.naive_runs(job(), VisPruner(keep=9))


@pytest.mark.parametrize("method", ["downsample", "tome", "pool", "visionzip"])
def test_methods_of_every_stage_are_measured(method):
    names = [arm.run(clock)[0] and arm.name for arm in arms_of(job(), settings(method, keep=16))]
    assert names == ["unpruned", "ratio 1", "method", "oracle"]


def test_a_chain_is_controlled_at_ratio_1():
    chain = foveate.Chain(VisPruner(keep=0.5), foveate.load_reducer("random", keep=9))
    arm = arms.control(job(), settings(chain))
    assert [reducer.keep for reducer in arm.reducer.reducers] == [1.0, 1.0]
    assert arm.run(clock)[1].sequences.shape[1] == 73 + 4


def test_attached_arms_are_measured_beside_an_attached_oracle():
    """As methods inside the LLM are; here one before it, of which vision and prefill cannot be told apart."""
    found = [arms.unpruned(job())]
    for name, method in (("method", "vispruner"), ("oracle", "random")):
        found.append(arms.attached(name, job(), settings(method, keep=9), (9,) * 3))
    result = run_arms(found, 2)
    assert [row["kv_bytes"] for row in result["arms"]] == [2 * 3 * (n + 3) * 16 * 4 for n in (73, 18, 18)]
    assert set(result["comparisons"]) == {"first_token_of_oracle", "first_token", "total"}
    assert attached(job().model) is None


def test_methods_inside_the_llm_have_an_oracle_at_their_layers():
    found = arms_of(job(), settings("fastv", keep=10, layer=1))
    assert [(arm.name, arm.received) for arm in found] == [
        ("unpruned", (64,) * 3), ("ratio 1", (64,) * 3), ("method", (64, 10, 10)), ("oracle", (64, 10, 10))
    ]  # fmt: skip
    result = run_arms(found, 2)
    rows = {row["arm"]: row for row in result["arms"]}
    held = (73 + 3) + 2 * (19 + 3)
    assert rows["method"]["kv_bytes"] == rows["oracle"]["kv_bytes"] == 2 * held * 16 * 4
    assert rows["method"]["tokens"] == 28.0
    assert rows["ratio 1"]["kv_bytes"] == rows["unpruned"]["kv_bytes"]
    whole, cut = (rows[name]["prefill_flops"] for name in ("unpruned", "method"))
    assert 0 < cut < whole
    assert "prefill_beyond_oracle" in result["comparisons"]
    assert "naive" not in result["comparisons"]


def test_the_oracle_inside_the_llm_reads_nothing():
    (_, _, _, free) = arms_of(job(), settings("fastv", keep=10, layer=1))
    assert free.reducer.needs == ()
    with foveate.attach(job().model, free.reducer) as handle:
        job().model.generate(**job().inputs, max_new_tokens=2)
        (kept,) = handle.selections[0]
    assert len(kept) == 10


def test_chains_and_adaptive_methods_inside_the_llm_have_no_oracle():
    chain = foveate.Chain(VisPruner(keep=0.5), foveate.load_reducer("fastv", keep=9, layer=1))
    with pytest.raises(UnsupportedModelError, match="chain has no oracle"):
        arms_of(job(), settings(chain))


def test_memory_is_the_peak_of_each_stage():
    meter = MemoryMeter(torch.device("cpu"))
    first = torch.empty(1000, 1000)
    second = torch.empty(1000, 500)
    del first
    meter.stop("vision")
    meter.stop("select")
    third = torch.empty(1000, 250)
    meter.stop("prefill")
    del second, third
    meter.stop("decode")
    peaks = meter.peaks()
    assert peaks == {
        "vision": 6_000_000, "select": 2_000_000, "prefill": 3_000_000, "decode": 3_000_000, "total": 6_000_000
    }  # fmt: skip


def test_a_run_that_fails_leaves_no_profiler_behind():
    with pytest.raises(InputError, match="scores from elsewhere"):
        run_arms(arms_of(job(), settings("sgl", keep=9, layer=1)), 1)
    assert not torch.autograd._profiler_enabled()


def test_the_result_says_what_was_measured():
    said = []
    result = run_arms(arms_of(job(), settings(keep=9)), 2, say=said.append)
    assert said[-1] == "turn 2 of 2"
    assert result["config"] == {
        "visual_tokens": 64, "text_tokens": 9, "answer_tokens": 4, "layers": 3, "dtype": "float32",
        "attention": "sdpa", "turns": 2, "clock": "wall",
    }  # fmt: skip
    rows = {row["arm"]: row for row in result["arms"]}
    assert rows["unpruned"]["kv_bytes"] == 2 * 3 * (73 + 3) * 16 * 4
    assert rows["method"]["kv_bytes"] == 2 * 3 * (18 + 3) * 16 * 4
    assert rows["method"]["method"].startswith("VisPruner(keep=9")
    assert rows["method"]["prefill_flops"] < rows["unpruned"]["prefill_flops"]
    assert rows["naive"]["peak_bytes"]["vision"] > rows["method"]["peak_bytes"]["vision"]
    for row in rows.values():
        assert row["time"]["first_token"]["median_ms"] <= row["time"]["total"]["median_ms"]
        assert row["peak_bytes"]["total"] == max(row["peak_bytes"][stage] for stage in STAGES)
    assert set(result["comparisons"]) == {
        "attached_at_ratio_1", "probes", "vision", "first_token_of_oracle", "first_token", "total", "prefill",
        "prefill_beyond_oracle", "break_even", "naive",
    }  # fmt: skip


def turns(*rows):
    return [dict(zip(STAGES, row, strict=True)) for row in rows]


TIMES = {
    "unpruned": turns((1.0, 0.0, 10.0, 7.0), (2.0, 0.0, 20.0, 14.0), (1.0, 0.0, 10.0, 7.0)),
    "ratio 1": turns((1.1, 0.0, 10.0, 7.0), (2.2, 0.0, 20.0, 14.0), (1.1, 0.0, 10.0, 7.0)),
    "method": turns((1.0, 0.5, 2.0, 3.5), (2.0, 1.0, 4.0, 7.0), (1.0, 0.5, 2.0, 3.5)),
    "oracle": turns((0.8, 0.0, 2.0, 3.5), (1.6, 0.0, 4.0, 7.0), (0.8, 0.0, 2.0, 3.5)),
    "naive": turns((2.0, 1.0, 2.0, 3.5), (4.0, 2.0, 4.0, 7.0), (2.0, 1.0, 2.0, 3.5)),
}
ROWS = [
    {"arm": name, "tokens": tokens, "prefill_flops": flops, "peak_bytes": {"vision": peak, "select": 3}}
    for name, tokens, flops, peak in (
        ("unpruned", 100, 1000, 5), ("ratio 1", 100, 1000, 5), ("method", 20, 100, 2), ("oracle", 20, 100, 2),
        ("naive", 20, 100, 50),
    )
]  # fmt: skip


def test_comparisons_by_hand():
    """The second turn is twice as slow in all arms, which no ratio shows."""
    assert comparisons(ROWS, TIMES, 100, 7) == {
        "attached_at_ratio_1": 1.0091, "probes": 1.25, "vision": 1.0, "first_token_of_oracle": 1.25,
        "first_token": 0.3182, "total": 0.3889, "prefill": {"saved": 0.8, "predicted": 0.9, "reached": 0.8889},
        "prefill_beyond_oracle": 0.0,
        # 0.5 s more than unpruned, 0.7 s more than the oracle; each of the 80 tokens dropped saves 0.1 s.
        "break_even": {"dropped_tokens": 5.0, "dropped_tokens_for_deciding": 7.0, "answer_tokens": 0.0},
        "naive": {"vision_and_select": 2.0, "peak_bytes": {"naive": 50, "method": 3}},
    }  # fmt: skip


def test_comparisons_of_fewer_arms():
    some = [row for row in ROWS if row["arm"] in ("unpruned", "method")]
    found = comparisons([{**row, "prefill_flops": None} for row in some], TIMES, 100, 7)
    assert found["prefill"] == {"saved": 0.8}
    assert not {"naive", "break_even", "probes", "attached_at_ratio_1"} & set(found)


def test_scoring_inside_the_llm_is_a_share_of_the_unpruned_prefill():
    times = {**TIMES, "method": turns((1.0, 0.0, 2.3, 3.5), (2.0, 0.0, 4.6, 7.0), (1.0, 0.0, 2.3, 3.5))}
    assert comparisons(ROWS, times, 100, 7)["prefill_beyond_oracle"] == 0.03


def test_break_even_of_methods_that_come_late():
    late = {**TIMES, "method": turns((3.0, 1.0, 9.0, 5.6))}
    assert break_even(late, 80, 100, 7) == {
        "dropped_tokens": None, "dropped_tokens_for_deciding": None, "answer_tokens": 10.0
    }  # fmt: skip
    never = {**TIMES, "method": turns((3.0, 1.0, 12.0, 7.0))}
    assert set(break_even(never, 80, 100, 7).values()) == {None}
    assert break_even(late, 80, 100, 0)["answer_tokens"] is None
    assert break_even({**TIMES, "method": TIMES["unpruned"]}, 0, 100, 7)["dropped_tokens"] == 0.0


def test_summaries():
    assert median_p90([0.3, 0.1, 0.2]) == {"median_ms": 200.0, "p90_ms": 300.0}
    assert median_p90([i / 1000 for i in range(1, 21)]) == {"median_ms": 10.5, "p90_ms": 19.0}


def test_processor_time_leaves_waiting_out():
    wall, own = (Clock(torch.device("cpu"), now) for now in (time.perf_counter, time.process_time))
    time.sleep(0.2)
    wall.stop("vision")
    own.stop("vision")
    assert wall.seconds["vision"] >= 0.2
    assert own.seconds["vision"] < 0.1
    with threads(2), pytest.raises(InputError, match="use 1 thread"):
        run_arms([arms.unpruned(job())], clock="cpu")
    with threads(1):
        assert run_arms([arms.unpruned(job())], 1, "cpu")["config"]["clock"] == "cpu"


def test_threads_are_restored():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_the_first_token_ends_the_prefill():
    stopped = []

    class Recorder:
        def stop(self, stage):
            stopped.append(stage)

    streamer = FirstToken(Recorder())
    for _ in range(4):
        streamer.put(torch.zeros(1))
    streamer.end()
    assert stopped == ["prefill", "decode"]


def test_a_report_says_what_holds(tmp_path):
    rows = [
        {
            **row, "kv_bytes": 2**20, "peak_bytes": {**row["peak_bytes"], "total": 2**21},
            "time": {stage: {"median_ms": 1200.0, "p90_ms": 1300.4} for stage in (*STAGES, "first_token")},
        }
        for row in ROWS
    ]  # fmt: skip
    config = {
        "visual_tokens": 100, "text_tokens": 5, "layers": 3, "dtype": "float32", "attention": "sdpa", "turns": 3,
        "clock": "wall", "answer_tokens": 8,
    }  # fmt: skip
    result = {
        "command": "foveate bench model", "config": config, "arms": rows,
        "machine": {"processor": "one", "threads": 1}, "comparisons": comparisons(ROWS, TIMES, 100, 7),
    }  # fmt: skip
    file, page = tmp_path / "bench-x.json", tmp_path / "page.md"
    file.write_text(json.dumps(result))
    page.write_text("a\n<!-- bench-x -->\nold\n<!-- /bench-x -->\nb\n")
    write_report([file], page)
    text = page.read_text()
    assert text == f"a\n<!-- bench-x -->\n{markdown(result)}\n<!-- /bench-x -->\nb\n"
    assert "| naive | 20 | 1,200 | 1,200 | 1,200 | 1,200 | 1,200 (1,300) | 50 B, 2 MiB | 1 MiB |" in text
    judged = [line for line in text.splitlines() if line.endswith(("holds |", "missed |"))]
    held = {line.split(" | ")[0].strip("| "): line for line in judged}
    assert len(held) == 7
    assert held["vision with the probe / same layers without"].endswith("at most 1.02 | 1.250 | missed |")
    assert held["vision with the probe / unpruned"].endswith("at most 1.0 | 1.000 | holds |")
    assert held["prefill time saved / predicted by FLOPs"].endswith("at least 0.9 | 0.889 | missed |")
    assert held["vision and selection, naive way / method"].endswith("at least 1.12 | 2.000 | holds |")
    assert "prefill 80.0% shorter, where FLOPs predict 90.0%" in text
    assert "5 dropped tokens against the unpruned model, 7 to pay" in text
    page.write_text("nothing")
    with pytest.raises(foveate.FoveateError, match="no place for 'bench-x'"):
        write_report([file], page)
