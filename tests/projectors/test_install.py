"""A compressor in a stock model: placeholders, methods behind it, batches, saving and loading."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

import foveate
import foveate.nano as nano
from foveate.core.errors import FoveateError, InputError, UnsupportedModelError
from foveate.families import family_of
from foveate.families.tower import encoder_layers
from foveate.projectors import M3, AveragePool, CAbstractor, LdpV2, Mqt, PixelShuffle, Resampler, TokenPacker, WiCo
from foveate.projectors.base import pooled
from foveate.projectors.install import follow
from tiny import PAD, model

SIDE = 8  # patches along a side of the tiny models' pictures
POOLING = [
    AveragePool(tokens=16), M3(tokens=16), LdpV2(tokens=16), PixelShuffle(), WiCo(),
    CAbstractor(tokens=16, depth=1, hidden=8),
    TokenPacker(scale=2, heads=2, multi_layers=(1, 2)),
]  # fmt: skip
PAPER = [*POOLING, Mqt(queries=16, heads=2), Resampler(tokens=16, depth=1, hidden=16, heads=2)]


def fresh(family="llava"):
    net = copy.deepcopy(model(family))
    vision = net.config.vision_config
    assert vision.image_size // vision.patch_size == SIDE
    return net


def prompt(net, *counts, seed=0, text=5):
    """Return left-padded prompts with so many placeholders each, and a picture for each."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[*torch.randint(3, 110, (i + 2,), generator=generator).tolist(), *[net.config.image_token_id] * n,
             *torch.randint(3, 110, (text,), generator=generator).tolist()] for i, n in enumerate(counts)]  # fmt: skip
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    side = net.config.vision_config.image_size
    pixels = torch.randn(len(rows), 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("family", ["llava", "vipllava"])
@pytest.mark.parametrize("projector", POOLING, ids=repr)
@torch.no_grad()
def test_it_starts_at_the_average_of_the_stock_tokens(family, projector):
    net = fresh(family)
    inputs = prompt(net, 16)
    patches = torch.stack(list(net.get_image_features(inputs["pixel_values"]).pooler_output))
    maps = patches.reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
    foveate.install_projector(net, projector)
    tokens = torch.stack(list(net.get_image_features(inputs["pixel_values"]).pooler_output))
    torch.testing.assert_close(tokens, pooled(maps, (4, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projector", PAPER, ids=repr)
def test_generation_in_a_batch_equals_each_prompt_alone(projector):
    torch.manual_seed(0)
    net = fresh()
    foveate.install_projector(net, projector, start="paper")
    net.eval()
    inputs = prompt(net, 16, 16)
    together = net.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    for i in range(2):
        start = int((inputs["attention_mask"][i] == 0).sum())
        alone = {"input_ids": inputs["input_ids"][i : i + 1, start:], "pixel_values": inputs["pixel_values"][i : i + 1]}
        assert torch.equal(net.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:], together[i])


@pytest.mark.parametrize("method", [foveate.load_reducer("fastv", keep=4, layer=1),
                                    foveate.load_reducer("pyramiddrop", keep=0.5, layers=(1,))])  # fmt: skip
@torch.no_grad()
def test_methods_inside_the_llm_act_behind_it(method):
    net = fresh()
    foveate.install_projector(net, AveragePool(tokens=16))
    inputs = prompt(net, 16, 16)
    plain = net(**inputs).logits
    with foveate.attach(net, method) as handle:
        out = net(**inputs)
        assert [received[0] for received in handle.received] == [16, 16]
        assert all(received[-1] < 16 for received in handle.received)
    assert out.logits.shape == plain.shape
    assert torch.equal(net(**inputs).logits, plain)


@pytest.mark.parametrize("method", [
    "vispruner", "divprune", "pool", "downsample", "tome", "visiondrop_all",
    foveate.Chain(foveate.load_reducer("divprune", keep=6), foveate.load_reducer("fastv", keep=4, layer=1)),
], ids=str)  # fmt: skip
def test_methods_that_choose_among_patches_are_refused(method):
    net = fresh()
    foveate.install_projector(net, AveragePool(tokens=16))
    keep = {"keep": 4} if isinstance(method, str) else {}
    with pytest.raises(UnsupportedModelError, match="average_pool compresses into 16 tokens"):
        foveate.attach(net, method, **keep)
    assert "forward" not in vars(net)
    assert "patches" in family_of(net).lacks(foveate.VisPruner(keep=3))


@pytest.mark.parametrize("family", ["llava", "vipllava"])
@pytest.mark.parametrize(
    ("projector", "start"),
    [*((p, "paper") for p in PAPER), (TokenPacker(scale=4, heads=2, multi_layers=(1, 2)), "pool")],
    ids=str,
)
@torch.no_grad()
def test_saved_and_loaded(tmp_path, family, projector, start):
    torch.manual_seed(0)
    net = fresh(family)
    stock = {key: value.clone() for key, value in net.state_dict().items()}
    layers = copy.deepcopy(net.config.to_dict())
    module = foveate.install_projector(net, projector, start)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    net.eval()
    net.save_pretrained(tmp_path)
    back = foveate.from_pretrained(tmp_path).eval()
    assert back.model.multi_modal_projector.installed.projector == projector
    inputs = prompt(net, module.installed.tokens)
    assert torch.equal(back(**inputs).logits, net(**inputs).logits)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), back.state_dict().values(), strict=True))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(value, stock[key]) for key, value in plain.state_dict().items())
    key = "vision_feature_layer" if "vision_feature_layer" in layers else "vision_feature_layers"
    assert plain.config.to_dict()[key] == layers[key]
    with pytest.raises(ValueError, match="tokens"):
        plain(**inputs)
    about = json.loads((tmp_path / "projector.json").read_text(encoding="utf-8"))
    assert about["paper"] == projector.paper
    assert about["start"] == start


@pytest.mark.parametrize("tuned", [True, False])
def test_wico_tunes_a_copy_of_the_last_layer(tuned):
    torch.manual_seed(0)
    net = fresh()
    module = foveate.install_projector(net, WiCo(tuned=tuned), start="paper")
    assert len(module.self_att) == tuned
    pixels = prompt(net, 16)["pixel_values"]
    net.model.vision_tower.requires_grad_(False)
    torch.stack(list(net.get_image_features(pixels).pooler_output)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.window_proj.parameters())
    if tuned:
        last, states = encoder_layers(net.model.vision_tower)[-1], torch.randn(1, 64, 32)
        assert torch.equal(module.self_att[0](states, attention_mask=None), last(states, attention_mask=None))
        assert any(p.grad is not None and p.grad.any() for p in module.self_att.parameters())
        assert not {*module.self_att.parameters()} & {*last.parameters()}


def test_folders_that_hold_no_compressor(tmp_path):
    with pytest.raises(InputError, match=r"projector\.json"):
        foveate.from_pretrained(tmp_path)
    net = fresh()
    foveate.install_projector(net, AveragePool(tokens=16))
    net.save_pretrained(tmp_path)
    about = tmp_path / "projector.json"
    for text in ("[]", "{", '{"projector": "average_pool"}'):
        about.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"projector\.json"):
            foveate.from_pretrained(tmp_path)
    about.write_text('{"projector": "ldp_v2", "tokens": 16, "start": "pool"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"do not fit the compressor: .*peg"):
        foveate.from_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot read"):
        foveate.from_pretrained(tmp_path)


def test_what_cannot_be_installed():
    for family in ("llava_next", "qwen2_vl", "internvl"):
        with pytest.raises(UnsupportedModelError, match=family):
            foveate.install_projector(model(family), AveragePool(tokens=16))
    net = fresh()
    with pytest.raises(InputError, match="10 tokens"):
        foveate.install_projector(net, AveragePool(tokens=10))
    with pytest.raises(InputError, match="on no grid"):
        foveate.install_projector(net, Mqt(queries=16, heads=2))
    with pytest.raises(InputError, match="'zero'"):
        foveate.install_projector(net, AveragePool(tokens=16), start="zero")
    assert "save_pretrained" not in vars(net)
    foveate.install_projector(net, AveragePool(tokens=16))
    with pytest.raises(FoveateError, match="has a compressor already"):
        foveate.install_projector(net, AveragePool(tokens=16))


@pytest.mark.parametrize(
    "projector", [AveragePool(tokens=16), TokenPacker(scale=4), Mqt(queries=36, tokens=7, heads=6)], ids=repr
)
def test_the_stock_processor_follows(tmp_path, projector):
    net, processor = nano.load()
    net, processor = copy.deepcopy(net), copy.deepcopy(processor)
    start = "paper" if projector.name == "mqt" else "pool"
    module = foveate.install_projector(net, projector, start, processor)
    shown = nano.sample()
    processor.save_pretrained(tmp_path)
    for one in (processor, type(processor).from_pretrained(tmp_path)):
        inputs = one(images=[shown.image] * 2, text=[f"<image>{shown.question}"] * 2, return_tensors="pt")
        assert (inputs["input_ids"] == net.config.image_token_id).sum(dim=1).tolist() == [module.installed.tokens] * 2
        assert net(**inputs).logits.isfinite().all()
    with pytest.raises(InputError, match="no processor of LLaVA"):
        follow(SimpleNamespace(), module)
