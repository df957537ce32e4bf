"""Qwen-VL and its relatives: where their tokens are, and what is read of their encoders."""

import copy
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import foveate
from foveate import Budget
from foveate.core.errors import InputError
from foveate.core.probes import Attention, Embeddings, Features, Keys
from foveate.families import family_of
from foveate.families.qwen2_5_vl import window_order
from foveate.measure.job import Job
from foveate.measure.run import run_methods
from foveate.methods import VTCCLS, Downsample, FasterVLM, HiPrune, Pool, Random, Uniform, VisPruner
from tiny import Visual, collate, model, sample, samples
from tiny_families.base import spread
from tiny_families.mrope import MERGE, PATCH, films

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]
OF_VIDEOS = NAMES[:5]
every_name = pytest.mark.parametrize("name", NAMES)


def batches(name):
    both = [(samples(name), "image")]
    return both if name == "paddleocr_vl" else [*both, (films(name), "video")]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def caught_attention(net, name, monkeypatch, layer):
    """Let the eager model note the maps of one layer, ``[H, P, P]`` per picture or frame."""
    module = importlib.import_module(type(net).__module__)
    original, maps = module.eager_attention_forward, []
    stack = next(m for n, m in net.model.visual.named_modules() if n.rpartition(".")[2] in ("blocks", "layers"))
    watched = [m for n, m in stack[layer].named_children() if n in ("attn", "self_attn")]

    def noting(attention, *args, **kwargs):
        out, weights = original(attention, *args, **kwargs)
        if attention in watched:
            maps.append(weights[0])
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", noting)
    return maps


@pytest.mark.parametrize(("name", "kind"), [*((n, "image") for n in NAMES), *((n, "video") for n in OF_VIDEOS)])
def test_attention_is_that_of_the_token(name, kind, monkeypatch):
    """Each token has the mean of what its patches receive in the last layer, found by the patches' rows and columns."""
    inputs = collate(films(name) if kind == "video" else samples(name))
    net = model(name)
    family = family_of(net)
    spans = family.spans(net, inputs)
    with torch.no_grad():
        values = family.encode(net, inputs, spans, (Attention(),)).probe(Attention())

    net = model(name, "eager")
    maps = caught_attention(net, name, monkeypatch, -1)
    grids = inputs[f"{kind}_grid_thw"]
    with torch.no_grad():
        getattr(net.model, f"get_{kind}_features")(inputs["pixel_values" + "_videos" * (kind == "video")], grids)
    patches = torch.cat([x.mean(dim=(0, 1)) for x in maps])
    rows, columns = get_vision_position_ids(grids, 1 if name == "paddleocr_vl" else MERGE).T
    if name == "qwen2_5_vl":
        order, _ = get_vision_window_index(grids, MERGE, window_size=16, patch_size=PATCH)
        assert order.tolist() != sorted(order.tolist())
        rows, columns = (x.unflatten(0, (-1, MERGE**2))[order].flatten() for x in (rows, columns))
    start, crop, sizes = 0, 0, iter(grids.tolist())
    for span in spans:
        own, crop = values[crop : crop + len(span.crops)], crop + len(span.crops)
        if span.kind != kind:
            continue
        t, h, w = next(sizes)
        assert span.grid == (t, h // MERGE, w // MERGE)
        assert [c.grid for c in span.crops] == [span.grid[1:]] * t
        assert torch.cat([c.index for c in span.crops]).tolist() == list(range(len(span)))
        for got in own:
            frame = slice(start, start + h * w)
            expected = torch.zeros(h // MERGE, w // MERGE)
            places = (rows[frame] // MERGE, columns[frame] // MERGE)
            expected.index_put_(places, patches[frame] / MERGE**2, accumulate=True)
            torch.testing.assert_close(got, expected.flatten(), atol=1e-6, rtol=1e-5)
            assert got.std() > 1e-3 * got.mean()
            start += h * w
    assert start == len(patches)


def test_layers_named_by_depth_attend_to_the_whole_picture():
    """Attention within a window adds up to one there, so that it would outweigh the layers that see everything."""
    config = copy.deepcopy(model("qwen2_5_vl").config)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 8, [3, 7]
    net = spread(type(model("qwen2_5_vl"))(config)).eval()
    family, inputs = family_of(net), collate([sample(3, Visual("qwen2_5_vl", ("image", 1, 5, 7)), 4)])
    spans = family.spans(net, inputs)  # windows of 2 x 2 tokens: those at the edges are smaller
    (summed,), (middle, _) = VTCCLS(keep=9, start=0.25).needs, HiPrune(keep=9).needs
    counted = Attention(layers=(-5, -1))
    with torch.no_grad():
        tokens = family.encode(net, inputs, spans, (summed, middle, counted, Attention(layers=(-6,))))
    (expected,), (got,), (objects,) = (tokens.probe(p) for p in (counted, summed, middle))
    close(got, expected)
    close(objects, tokens.probe(counted)[0][:, 0])
    close(got.sum(dim=0), torch.ones(2) / MERGE**2)
    assert tokens.probe(Attention(layers=(-6,)))[0].sum() > 11.9 / MERGE**2
    kept = expected.sum(dim=1).topk(9).indices.sort().values
    assert foveate.reduce(net, inputs, VTCCLS(keep=9, start=0.25)).selection[0].kept.tolist() == kept.tolist()


def test_window_order_is_the_models():
    for grid in [(6, 4), (3, 8), (1, 1), (2, 2), (5, 7), (1, 9), (4, 4)]:
        for window in (1, 2, 3, 4):
            patches = torch.tensor([[1, grid[0] * 2, grid[1] * 2]])
            expected, _ = get_vision_window_index(patches, 2, window_size=window * 8, patch_size=4)
            assert window_order(grid, window).tolist() == expected.tolist()


@every_name
def test_probes_come_in_the_order_of_the_tokens(name):
    net = model(name)
    family = family_of(net)
    for inputs, kind in batches(name):
        batch = collate(inputs)
        spans = family.spans(net, batch)
        probes = (Features(), Embeddings(), Keys(), Attention(layers=(-2, -1)))
        with torch.no_grad():
            tokens = family.encode(net, batch, spans, probes)
            output = family.image_features(net, batch, kind).pooler_output
        own = [family.embeddings(x) for x, span in zip(tokens.hidden, spans, strict=True) if span.kind == kind]
        torch.testing.assert_close(torch.cat(own), torch.cat(list(output)))
        crops = [(x, c) for x, span in zip(tokens.hidden, spans, strict=True) for c in span.crops]
        for i, (hidden, crop) in enumerate(crops):
            assert torch.equal(tokens.probe(Features())[i], family.embeddings(hidden)[crop.index])
            assert torch.equal(tokens.probe(Embeddings())[i], tokens.probe(Features())[i])
            assert tokens.probe(Keys())[i].shape == (len(crop), 16)
            assert tokens.probe(probes[-1])[i].shape == (len(crop), 2)


PROCESSORS = {
    "qwen2_vl": lambda: Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=SIZE),
    "paddleocr_vl": lambda: PaddleOCRVLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=SIZE),
}
SIZE = {"shortest_edge": 64, "longest_edge": 10**6}


@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_lie_where_the_processor_put_their_patches(name):
    """A picture in which each token's square has a grey of its own comes back as a grid in raster order."""
    greys = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8
    side = PATCH * MERGE
    picture = Image.fromarray(np.kron(greys, np.ones((side, side), np.uint8))).convert("RGB")
    settings = PROCESSORS[name]()
    settings.do_normalize = False
    out = settings(picture, return_tensors="pt")
    net = model(name)
    family = family_of(net)
    assert out["image_grid_thw"].tolist() == [[1, 10, 12]]
    (layout,) = family.layouts(net, out, "image")
    assert layout.grid == (1, 5, 6)
    values = out["pixel_values"].flatten(1).mean(dim=1)[None]
    close(family.to_tokens(net, out, "image", values) * 255, torch.tensor(greys).flatten().float(), 1e-2)


@every_name
def test_encoding_at_the_same_grid_changes_nothing(name):
    net = model(name)
    family = family_of(net)
    for rows, _ in batches(name):
        inputs = collate(rows)
        spans = family.spans(net, inputs)
        with torch.no_grad():
            hidden = family.encode(net, inputs, spans, ()).hidden
            same = family.encode_at(net, inputs, spans, [[c.grid for c in s.crops] for s in spans])
        for x, parts in zip(hidden, same, strict=True):
            close(torch.cat(parts), x)


def patches_of(picture, grid, raster):
    """Cut a picture ``[F, 3, H, W]`` of F equal frames into patches, square by square."""
    h, w = grid
    cells = [(r, c) for r in range(h) for c in range(w)]
    if not raster:
        cells.sort(key=lambda p: (p[0] // MERGE, p[1] // MERGE, p[0] % MERGE, p[1] % MERGE))
    parts = []
    for r, c in cells:
        patch = picture[:, :, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
        parts.append(patch[0] if raster else patch.transpose(0, 1).flatten())  # channel, frame, row, column
    return torch.stack(parts)


@every_name
def test_downsample_equals_a_smaller_picture(name):
    net, raster = model(name), name == "paddleocr_vl"
    row = sample(4, Visual(name, ("image", 1, 5, 6)), 3, seed=1)
    picture = torch.randn(1 if raster else 2, 3, 5 * 8, 6 * 8)
    row["pixel_values"] = [patches_of(picture, (10, 12), raster)]
    inputs = collate([row])
    reduced = foveate.reduce(net, inputs, Downsample(keep=12))
    assert len(reduced.selection[0]) == 12
    small = torch.nn.functional.interpolate(picture, (3 * 8, 4 * 8), mode="bicubic", antialias=True)
    with torch.no_grad():
        grid = torch.tensor([[1, 6, 8]])
        expected = net.model.get_image_features(patches_of(small, (6, 8), raster), grid).pooler_output
        (embeds,) = reduced["mm_encoder_outputs"]["image"].pooler_output
        close(embeds, expected[0])
        assert net(**reduced).logits.isfinite().all()


@pytest.mark.parametrize("reducer", [Random(keep=7), Pool(keep=6)], ids=lambda r: r.name)
def test_deepstack_planes_are_pruned_along(reducer):
    net, inputs = model("qwen3_vl"), collate(samples("qwen3_vl"))
    reduced = foveate.reduce(net, inputs, reducer)
    for kind, suffix in (("image", ""), ("video", "_videos")):
        with torch.no_grad():
            plain = getattr(net.model, f"get_{kind}_features")(
                inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"]
            )
        got = reduced["mm_encoder_outputs"][kind]
        chosen = [s for s in reduced.selection if s.kind == kind]
        assert len(plain.deepstack_features) == len(got.deepstack_features) == 2
        for before, after in zip(
            [plain.pooler_output, *plain.deepstack_features], [got.pooler_output, *got.deepstack_features], strict=True
        ):
            for span, x, y in zip(chosen, before, after, strict=True):
                close(y, span.apply(x))


@pytest.mark.parametrize("name", OF_VIDEOS)
def test_budgets_of_clips_and_frames(name):
    net, inputs = model(name), collate([sample(3, Visual(name, ("video", 3, 2, 4)), 4)])
    for keep, counts in [(6, [2, 2, 2]), (Budget(3, per="crop"), [3, 3, 3]), (0.5, [4, 4, 4])]:
        reduced = foveate.reduce(net, inputs, FasterVLM(keep=keep))
        kept = reduced.selection[0].kept
        assert [int((kept // 8 == t).sum()) for t in range(3)] == counts
    joint = foveate.reduce(net, inputs, FasterVLM(keep=Budget(6, per="joint"))).selection[0].kept
    family = family_of(net)
    with torch.no_grad():
        tokens = family.encode(net, inputs, family.spans(net, inputs), (Attention(),))
    top = torch.cat(tokens.probe(Attention())).topk(6).indices.sort().values
    assert joint.tolist() == top.tolist()


@every_name
def test_ids_alone_say_what_is_visual(name):
    net, inputs = model(name), collate(samples(name))
    bare = {k: x for k, x in inputs.items() if k != "mm_token_type_ids"}
    reduced, same = (foveate.reduce(net, x, VisPruner(keep=9)) for x in (inputs, bare))
    assert torch.equal(net(**reduced).logits, net(**same).logits)


@every_name
def test_runs_are_measured(name):
    net, inputs = model(name), collate([sample(3, Visual(name, ("image", 1, 4, 6)), 4)])
    family = family_of(net)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    job = Job(net, SimpleNamespace(tokenizer=tokenizer), family, inputs, family.spans(net, inputs), 5)
    reducers = [VisPruner(keep=9), Pool(keep=9), Downsample(keep=9)]
    stock, *pruned = run_methods(job, [None, *reducers], repeats=0)
    plain = net.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert stock.answer == " ".join(map(str, plain[0, inputs["input_ids"].shape[1] :].tolist()))
    for reducer, arm in zip(reducers, pruned, strict=True):
        ready = foveate.reduce(net, inputs, reducer)
        out = net.generate(**ready, max_new_tokens=5, do_sample=False)
        assert arm.answer == " ".join(map(str, out[0, ready["input_ids"].shape[1] :].tolist()))
        assert arm.cost.prefill < stock.cost.prefill
        assert arm.kv_bytes < stock.kv_bytes


def test_grids_that_do_not_fit_the_placeholders():
    net, inputs = model("qwen2_vl"), collate(samples("qwen2_vl"))
    with pytest.raises(InputError, match="image placeholder tokens, but the 3 image"):
        foveate.reduce(net, {**inputs, "image_grid_thw": inputs["image_grid_thw"] + 2}, Uniform(keep=9))
