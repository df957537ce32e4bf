"""Trained compressors against the numbers of their specifications."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.core.errors import InputError, UnknownNameError
from foveate.projectors import (
    M3,
    AveragePool,
    CAbstractor,
    LdpV2,
    Mqt,
    PixelShuffle,
    QueCC,
    Resampler,
    Retrofit,
    Sizes,
    TokenPacker,
    WiCo,
    get_projector,
    list_projectors,
    projector_from_dict,
)
from foveate.projectors.base import Mlp, heads_of, pooled, several_layers
from foveate.projectors.c_abstractor import Bottleneck
from foveate.projectors.mqt import places
from foveate.projectors.tokenpacker import attend_regions
from foveate.projectors.wico import ConcatenatedTokens

CLIP = Sizes(1024, 4096, (24, 24))
SMALL = Sizes(8, 16, (8, 8))
EACH = [
    AveragePool(tokens=16), AveragePool(tokens=16, position="before"), M3(tokens=16), PixelShuffle(), LdpV2(tokens=16),
    PixelShuffle(head="linear"), TokenPacker(heads=2), Mqt(queries=16, heads=2), QueCC(kernel=2, heads=2), WiCo(),
    Mqt(queries=16, tokens=5, heads=2, content_keys=True), CAbstractor(tokens=9, depth=1, hidden=12),
    Resampler(tokens=5, depth=2, hidden=16, heads=2, dropout=0.0),
]  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def features_of(config, sizes, batch=2, seed=0):
    wide = len(config.layers(24)) * sizes.features
    return torch.randn(batch, sizes.patches, wide, generator=torch.Generator().manual_seed(seed))


def run(module, config, given):
    """Run a module with the LLM's states of the questions, where it reads them."""
    if not config.query_aware:
        return module(given)
    states = torch.linspace(-1, 1, 16) * given[:, :1, :1].flatten()[:, None]
    return module(given, question=states)


def rows(grid, values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, grid[0] * grid[1], -1)


@pytest.mark.parametrize("config", EACH, ids=repr)
def test_shapes_and_counts(config):
    torch.manual_seed(0)
    module, given = config.build(SMALL), features_of(config, SMALL)
    before = given.clone()
    tokens = run(module, config, given)
    assert tokens.shape == (2, config.num_output_tokens(SMALL.grid), SMALL.width)
    assert config.num_output_tokens(SMALL.grid, tiles=5) == 5 * tokens.shape[1]
    assert torch.equal(given, before)
    with pytest.raises(InputError, match="64 patches"):
        run(module, config, given[:, :-1])


@pytest.mark.parametrize("config", EACH, ids=repr)
def test_a_picture_is_compressed_alike_alone_and_in_a_batch(config):
    torch.manual_seed(0)
    module, given = config.build(SMALL).eval(), features_of(config, SMALL, 3)
    together, alone = run(module, config, given), run(module, config, given[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", EACH, ids=repr)
def test_gradient_reaches_each_parameter(config):
    torch.manual_seed(0)
    module = config.build(SMALL)
    run(module, config, features_of(config, SMALL)).square().mean().backward()
    # Adding one number to all keys changes no softmax: their biases are never learned.
    idle = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    # MQT's table of places is fixed, and the resampler's queries, zeros at first, have nothing to scale.
    first = {"pos_embed", "layers.0.norm_q.weight"}
    assert {name for name in idle if not name.endswith("in_proj_bias")} <= first


@pytest.mark.parametrize("config", EACH, ids=repr)
def test_configurations_are_data(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert projector_from_dict(data) == config
    assert get_projector(config.name) is type(config)
    assert config.name in list_projectors()
    with pytest.raises(InputError, match="does not know colour"):
        projector_from_dict({**data, "colour": 1})


def test_configurations_that_are_none():
    with pytest.raises(UnknownNameError, match="tokenpackr"):
        projector_from_dict({"projector": "tokenpackr"})
    for data in (None, {}, {"projector": 3}):
        with pytest.raises(InputError, match="projector"):
            projector_from_dict(data)


@pytest.mark.parametrize(
    "config", [c for c in EACH if isinstance(c, PixelShuffle | TokenPacker | AveragePool)], ids=repr
)
def test_a_retrofit_starts_at_the_pooled_stock_projector(config):
    torch.manual_seed(0)
    given, stock = features_of(config, SMALL), Mlp(8, 16)
    each = tuple(range(len(config.layers(24))))
    module = Retrofit(SMALL, config.cells(SMALL.grid), stock, config.build(SMALL), branch_layers=each)
    start = pooled(module.maps(stock(given[..., -8:])), config.cells(SMALL.grid))
    cues = {"question": torch.ones(2, 16)} if config.query_aware else {}
    assert torch.equal(module(given, **cues), start)
    module(given, **cues).square().mean().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not torch.allclose(module(given, **cues), start)


@pytest.mark.parametrize(("config", "parameters"), [
    (TokenPacker(), 36_722_688), (TokenPacker(scale=4), 36_722_688), (AveragePool(), 20_979_712), (LdpV2(), 21_020_672),
    (PixelShuffle(), 33_570_816), (M3(), 20_979_712), (Mqt(), 8_660_992 + 262_144), (QueCC(), 41_988_096),
    (QueCC(kernel=24), 42_561_536), (QueCC(kernel=2), 41_975_808), (WiCo(), 16_781_312), (CAbstractor(), 37_398_016),
    (Resampler(), 106_142_720),
])  # fmt: skip
def test_parameters_are_those_of_the_papers(config, parameters):
    with torch.device("meta"):
        assert count(config.build(CLIP)) == parameters


def test_the_page_names_each_projector_and_its_parameters():
    page = (Path(__file__).parents[2] / "docs/projectors.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+)[^|]*\|$", page, re.MULTILINE))
    assert sorted(shown) == list_projectors()
    with torch.device("meta"):
        for name, parameters in shown.items():
            module = get_projector(name)().build(CLIP)
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            assert f"{trained:,}" == parameters.rstrip(","), name


def test_tokenpacker_for_a_wider_llm():
    with torch.device("meta"):
        assert count(TokenPacker().build(Sizes(1024, 5120, (24, 24)))) == 47_210_496


@pytest.mark.parametrize(("scale", "tokens"), [(2, 144), (3, 64), (4, 36)])
def test_tokenpacker_counts(scale, tokens):
    assert TokenPacker(scale=scale).num_output_tokens((24, 24)) == tokens
    with pytest.raises(InputError, match="1, 2, 3, 4, 6, 8, 12, 24"):
        TokenPacker(scale=5).num_output_tokens((24, 24))


def test_tokenpacker_resizes_without_antialiasing():
    for side, scale, expected in [
        (6, 2, [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5], [27.5, 29.5, 31.5]]), (6, 3, [[7, 10], [25, 28]]),
        (8, 4, [[13.5, 17.5], [45.5, 49.5]]),
    ]:  # fmt: skip
        module = TokenPacker(scale=scale, heads=1).build(Sizes(4, 4, (side, side)))
        grid = torch.arange(side * side, dtype=torch.float32)[None, :, None].expand(-1, -1, 16)
        assert module.coarse(grid)[0, :, 0].reshape(side // scale, -1).tolist() == expected


def test_tokenpacker_is_local():
    torch.manual_seed(0)
    module, given = TokenPacker(scale=3, heads=2).build(Sizes(8, 16, (6, 6))), torch.randn(1, 36, 32)
    plain = module(given)
    moved = given.clone()
    moved[0, 7, :24] += 1.0  # the centre of the first region, in the keys' layers
    assert (module(moved) != plain).any(-1)[0].tolist() == [True, False, False, False]


def test_tokenpacker_attention_by_hand():
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(2).repeat(3, 1))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(torch.eye(2))
        attention.out_proj.bias.zero_()
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    weights = torch.tensor([0.448581, 0.221181, 0.109057, 0.221181])
    found = attend_regions(attention, torch.tensor([[[1.0, 0.0]]]), keys, keys, (2, 2), (1, 1))
    torch.testing.assert_close(found[0, 0], weights @ keys[0], rtol=0, atol=1e-6)
    with torch.no_grad():
        attention.in_proj_weight[:2] = 0  # queries of zeros weigh all alike
    uniform = attend_regions(attention, torch.tensor([[[1.0, 0.0]]]), keys, keys + 1, (2, 2), (1, 1))
    torch.testing.assert_close(uniform[0, 0], torch.ones(2))


def test_layers_and_heads():
    assert several_layers(24) == (12, 16, 22, 23)
    assert several_layers(7) == (3, 4, 5, 6)
    assert (heads_of(1024), heads_of(192)) == (8, 6)
    with pytest.raises(InputError, match="heads"):
        heads_of(10)


def test_pixel_shuffle_order():
    values = [[100 + t, 200 + t] for t in range(16)]
    module = PixelShuffle().build(Sizes(2, 4, (4, 4)))
    assert module.windows(rows((4, 4), values))[0].tolist()[:2] == [
        [100, 200, 101, 201, 104, 204, 105, 205], [102, 202, 103, 203, 106, 206, 107, 207],
    ]  # fmt: skip
    early = PixelShuffle(version=1).build(Sizes(2, 4, (4, 4))).windows(rows((4, 4), values))
    late = module.windows(rows((4, 4), values))
    assert torch.equal(early[0, [0, 2, 1, 3]], late[0])
    with pytest.raises(InputError, match="27 x 27"):
        PixelShuffle().num_output_tokens((27, 27))


def test_pooling_windows():
    line = torch.tensor([[[[0.0, 3.0, 6.0, 9.0]]]])
    assert pooled(line, (1, 3))[0, :, 0].tolist() == [1.5, 4.5, 7.5]
    constant = torch.full((1, 64, 8), 0.3)
    torch.manual_seed(0)
    tokens = AveragePool(tokens=9).build(SMALL)(constant)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
    with pytest.raises(InputError, match="10 tokens"):
        AveragePool(tokens=10).num_output_tokens((24, 24))


def test_pooling_before_and_after_are_equal_for_linear_layers_alone():
    torch.manual_seed(0)
    after, before = AveragePool(tokens=4).build(SMALL), AveragePool(tokens=4, position="before").build(SMALL)
    before.load_state_dict(after.state_dict())
    given = torch.randn(1, 64, 8)
    assert not torch.allclose(after(given), before(given), atol=1e-4)
    for module in (after, before):
        module.mlp[1] = nn.Identity()
    torch.testing.assert_close(after(given), before(given))


def test_ldp_with_an_empty_convolution_is_pooling():
    torch.manual_seed(0)
    module, given = LdpV2(tokens=16).build(SMALL), torch.randn(2, 64, 8)
    nn.init.zeros_(module.peg.weight)
    nn.init.zeros_(module.peg.bias)
    torch.testing.assert_close(module(given), pooled(module.maps(module.mlp(given)), (4, 4)))


def test_m3_scales_are_nested():
    grid = torch.arange(36.0).reshape(1, 1, 6, 6)
    three = pooled(grid, (3, 3))
    assert three[0, :, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5, 27.5, 29.5, 31.5]
    assert pooled(grid, (1, 1)).item() == 17.5 == pooled(three.transpose(1, 2).unflatten(2, (3, 3)), (1, 1)).item()
    assert [M3().num_output_tokens((24, 24), budget=s) for s in (1, 9, 36, 144, 576)] == [1, 9, 36, 144, 576]
    assert M3(tokens=16, scales=(1, 4, 16, 64, 256)).num_output_tokens((16, 16)) == 16
    with pytest.raises(InputError, match="not 100"):
        M3().num_output_tokens((24, 24), budget=100)
    module, given = M3(tokens=64).build(SMALL), torch.randn(1, 64, 8)
    assert torch.equal(module(given), module.mlp(given))
    assert module(given, budget=4).shape == (1, 4, 16)


def test_a_budget_where_there_is_none():
    with pytest.raises(InputError, match="not 9"):
        TokenPacker().num_output_tokens((24, 24), budget=9)


def test_mqt_queries_are_nested():
    torch.manual_seed(0)
    module, given = Mqt(queries=16, heads=2).build(SMALL), torch.randn(2, 64, 8)
    whole = module(given)
    for count in (1, 2, 7, 15):
        torch.testing.assert_close(module(given, budget=count), whole[:, :count], rtol=1e-5, atol=1e-6)
    module(given, budget=3).sum().backward()
    assert module.query.grad[:3].any(dim=1).all()
    assert not module.query.grad[3:].any()
    assert module.pos_embed.grad is None
    for wrong in (0, 17):
        with pytest.raises(InputError, match=f"not {wrong}"):
            module(given, budget=wrong)


def test_mqt_mixes_every_picture_alike_unless_keys_hold_content():
    torch.manual_seed(0)
    for content, alike in [(False, True), (True, False)]:
        module = Mqt(queries=16, heads=2, content_keys=content).build(SMALL)
        one, other = torch.randn(2, 1, 64, 8)
        # With the same weights for each picture, tokens are linear in the normalised patches.
        values = module.ln_v(one) + module.ln_v(other)
        module.ln_v = nn.Identity()
        both = module(values) + module(torch.zeros(1, 64, 8))
        assert torch.allclose(both, module(values / 2) * 2, atol=1e-5) == alike


def test_mqt_weighs_all_alike_without_queries():
    torch.manual_seed(0)
    module, given = Mqt(queries=16, heads=2).build(SMALL), torch.randn(1, 64, 8)
    with torch.no_grad():
        module.attn.in_proj_weight[:8] = 0
    values = module.ln_v(given).mean(dim=1) @ module.attn.in_proj_weight[16:].T
    expected = module.attn.out_proj(values) @ module.proj
    torch.testing.assert_close(module(given), expected[:, None].expand(-1, 16, -1), rtol=1e-4, atol=1e-5)


def test_mqt_places():
    table = places((2, 2), 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(table[1, :4], torch.tensor([0.8415, 0.01, 0.5403, 1.0]), rtol=0, atol=1e-4)
    assert torch.equal(table[2], torch.cat([table[1, 4:], table[1, :4]]))
    with pytest.raises(InputError, match="divide by 4"):
        places((2, 2), 6)


def test_mqt_draws_even_numbers():
    drawn = [Mqt().sampled(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert drawn == [Mqt().sampled(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(m % 2 == 0 and 2 <= m <= 256 for m in drawn)
    assert min(drawn) < 12
    assert max(drawn) > 246


@pytest.mark.parametrize(("kernel", "tokens"), [(2, 144), (3, 64), (4, 36), (6, 16), (12, 4), (24, 1)])
def test_quecc_counts(kernel, tokens):
    assert QueCC(kernel=kernel).num_output_tokens((24, 24)) == tokens
    with pytest.raises(InputError, match="5 x 5"):
        QueCC(kernel=5).num_output_tokens((24, 24))


def test_quecc_reads_the_question():
    torch.manual_seed(0)
    config = QueCC(kernel=4, heads=2)
    module, given = config.build(SMALL), features_of(config, SMALL, 1)
    one, other = torch.randn(2, 1, 16)
    assert (module(given, question=one) != module(given, question=other)).any(dim=-1).all()
    nn.init.zeros_(module.text_projection[0].weight)
    assert torch.equal(module(given, question=one), module(given, question=other))
    with pytest.raises(InputError, match="question"):
        module(given)


def test_quecc_downsampling_can_be_an_average():
    module = QueCC(kernel=2, heads=1).build(Sizes(1, 2, (4, 4)))
    nn.init.constant_(module.q_downsample.weight, 0.25)
    nn.init.zeros_(module.q_downsample.bias)
    assert module.q_downsample(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_wico_order():
    module = WiCo().build(Sizes(2, 4, (4, 4)))
    values = [[100 + t, 200 + t] for t in range(16)]
    assert module.windows(rows((4, 4), values))[0, 0].tolist() == [100, 101, 104, 105, 200, 201, 204, 205]
    with torch.device("meta"):
        assert WiCo(window=3).build(CLIP).window_proj.in_features == 9216
    assert (WiCo().layers(24), WiCo(skip=True).layers(24)) == ((23,), (22,))


def test_wico_retrofit_starts_at_the_pooled_stock_projector():
    torch.manual_seed(0)
    stock, given = Mlp(8, 16), torch.randn(2, 64, 8)
    module = ConcatenatedTokens(SMALL, (4, 4), stock)
    torch.testing.assert_close(module(given), pooled(module.maps(stock(given)), (4, 4)))


def test_c_abstractor_without_blocks_is_pooling():
    torch.manual_seed(0)
    module, given = CAbstractor(tokens=9, depth=0).build(SMALL), torch.randn(2, 64, 8)
    nn.init.zeros_(module.pos_emb)
    torch.testing.assert_close(module(given), module.readout(pooled(module.maps(given), (3, 3))))


def test_c_abstractor_gate_is_half_open_at_zero():
    block = Bottleneck(8, 8)
    nn.init.zeros_(block.excite.weight)
    nn.init.zeros_(block.excite.bias)
    assert (block.gate(torch.randn(1, 8, 4, 4)) == 0.5).all()


def test_resampler_layers_add_to_normalised_queries():
    torch.manual_seed(0)
    layer = Resampler(tokens=3, depth=1, hidden=16, heads=2).build(SMALL).layers[0].eval()
    for module in (layer.attn.out_proj, layer.w2):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    queries = torch.randn(1, 3, 16) * 5 + 2
    torch.testing.assert_close(layer(queries, torch.randn(1, 9, 16)), layer.norm_q(queries))
