import copy
import math
import threading

import pytest
import torch
from transformers import AttentionInterface, CLIPVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import foveate.core.probes
import foveate.families.taps
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Attention, Features, attention_received, cls_row
from foveate.families.layer_runs import layer_outputs
from foveate.families.merged import mean_of_blocks
from foveate.families.taps import Taps, tap
from foveate.families.tower import encoder_layers, run_tower
from tiny_families.base import clip_config, spread

PIXELS = 32

PROBES = (
    Attention("cls"),
    Attention("received"),
    Attention("cls", layers=(-2, -1)),
    Attention("received", layers=(-1, -2)),
    Features(),
)


def tower(attention="sdpa"):
    built = spread(CLIPVisionModel(clip_config()))
    built.set_attn_implementation(attention)
    return built


def pictures(seed=0, n=2):
    return torch.randn(n, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def expected(pixels):
    """Attention maps of the two layers that are read and the features, from the eager tower."""
    with torch.no_grad():
        out = tower("eager")(pixels, output_attentions=True, output_hidden_states=True)
    first, second = out.attentions[:2]

    def from_cls(a):
        return a[:, :, 0, 1:].mean(1)

    def on_average(a):
        return a.mean(1).mean(1)[:, 1:]

    return out.hidden_states[-2], {
        PROBES[0]: from_cls(second),
        PROBES[1]: on_average(second),
        PROBES[2]: torch.stack([from_cls(first), from_cls(second)], -1),
        PROBES[3]: torch.stack([on_average(second), on_average(first)], -1),
    }


def flash_like(module, query, key, value, attention_mask, **kwargs):
    flash_like.calls += 1
    assert module.config._attn_implementation == "lightning_attention"  # flash attention finds its kernel by it
    assert not module.training
    kwargs.pop("output_attentions", None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("lightning_attention", flash_like)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "lightning_attention"])
def test_attention_equals_the_eager_maps(attention):
    encoder, pixels = tower(attention), pictures()
    flash_like.calls = 0
    with torch.no_grad():
        features, values = run_tower(encoder, pixels, [-2], True, PROBES)
    hidden, maps = expected(pixels)
    torch.testing.assert_close(features, hidden, atol=1e-5, rtol=1e-5)
    assert set(values) == set(maps)
    for probe, value in maps.items():
        torch.testing.assert_close(values[probe], value, atol=1e-6, rtol=1e-5)
    # The maps are not flat, else any values would do.
    assert values[PROBES[0]].std() > 1e-3
    assert flash_like.calls == (2 if attention == "lightning_attention" else 0)
    assert encoder.config._attn_implementation == attention


def test_auto_reads_the_cls_row_where_there_is_one():
    with torch.no_grad():
        _, values = run_tower(tower(), pictures(), [-2], True, [Attention(), Attention("cls"), Attention("received")])
        assert torch.equal(values[Attention()], values[Attention("cls")])
        _, plain = run_tower(tower(), pictures(), [-2], False, [Attention()])
    assert plain[Attention()].shape[1] == values[Attention("received")].shape[1] + 1
    torch.testing.assert_close(plain[Attention()].sum(-1), torch.ones(2))
    with pytest.raises(UnsupportedModelError, match="received"):
        run_tower(tower(), pictures(), [-2], False, [Attention("cls")])


def test_output_of_the_tower_is_that_of_the_plain_tower():
    encoder, pixels = tower(), pictures()
    with torch.no_grad():
        plain = encoder(pixels, output_hidden_states=True).hidden_states
        for index in (-1, -2, 1):
            features, _ = run_tower(encoder, pixels, [index], True, [Attention()])
            assert torch.equal(features, plain[index])
        both, _ = run_tower(encoder, pixels, [1, -1], True, [])
    assert torch.equal(both, torch.cat([plain[1], plain[-1]], dim=-1))


def test_layers_after_the_last_one_read_do_not_run():
    encoder, ran = tower(), []
    for i, layer in enumerate(encoder_layers(encoder)):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    run_tower(encoder, pictures(), [-2], True, [Attention()])
    assert ran == [0, 1]
    ran.clear()
    run_tower(encoder, pictures(), [-3], True, [])
    assert ran == [0]


def test_a_managed_encoder_runs_to_its_end():
    encoder, ran = tower(), []
    layers = encoder_layers(encoder)
    layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    layers[0]._hf_hook = object()
    (out,) = layer_outputs(encoder, [layers[1]], pictures())
    assert ran == [2]
    assert torch.equal(out, tower()(pictures(), output_hidden_states=True).hidden_states[-2])


def wave(n, c, f):
    return torch.tensor([[[[f(h, i, j) for j in range(c)] for i in range(n)] for h in range(2)]], dtype=torch.float64)


def test_received_check_values():
    query = wave(16, 4, lambda h, i, c: math.sin(0.7 * (i + 1) + 1.1 * (h + 1) * (c + 1)))
    key = wave(16, 4, lambda h, i, c: 1.5 * math.cos(0.703 * (i + 1) * (c + 1) + 0.6 * (h + 1)))
    values = attention_received(query, key, 0.5)
    published = [0.059091, 0.068178, 0.075789, 0.065843, 0.056212, 0.059994, 0.059977, 0.055996,
                 0.051159, 0.058784, 0.069677, 0.074087, 0.064927, 0.058036, 0.061830, 0.060417]  # fmt: skip
    torch.testing.assert_close(values[0], torch.tensor(published), atol=1e-6, rtol=0)


def test_received_in_chunks_equals_the_whole_map(monkeypatch):
    query, key = torch.randn(2, 3, 21, 4), torch.randn(2, 3, 21, 4)
    whole = (query @ key.mT * 0.5).softmax(-1).mean(1).mean(1)
    for chunk in (1, 5, 21, 256):
        monkeypatch.setattr(foveate.core.probes, "_QUERY_CHUNK", chunk)
        torch.testing.assert_close(attention_received(query, key, 0.5), whole)
        torch.testing.assert_close(attention_received(query, key, 0.5, skip=1), whole[:, 1:])


def test_half_precision_is_read_in_single():
    query, key = torch.randn(2, 3, 9, 4).half(), torch.randn(2, 3, 9, 4).half()
    for reader in (attention_received, cls_row):
        assert reader(query, key, 0.5).dtype == torch.float32
        assert torch.equal(reader(query, key, 0.5), reader(query.float(), key.float(), 0.5))


class BrokenError(RuntimeError):
    pass


def fail(*_):
    raise BrokenError


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_exception_leaves_no_trace(attention):
    encoder, before = tower(attention), tower(attention)
    hook = encoder_layers(encoder)[1].register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        run_tower(encoder, pictures(), [-2], True, PROBES)
    hook.remove()
    assert encoder.config._attn_implementation == attention
    assert not foveate.families.taps._tapped
    assert foveate.families.taps._active.get() is None
    assert not any(module._forward_hooks for module in encoder.modules())
    with torch.no_grad():
        after = encoder(pictures()).last_hidden_state
        assert torch.equal(after, before(pictures()).last_hidden_state)


def test_a_layer_too_far_back_is_refused():
    with pytest.raises(UnsupportedModelError, match="has 3 layers, of which"):
        run_tower(tower(), pictures(), [-2], True, [Attention(layers=(-3,))])
    with pytest.raises(UnsupportedModelError, match="hidden state 0"):
        run_tower(tower(), pictures(), [0], True, [])


def test_layer_zero_is_the_one_behind_if_there_is_one():
    behind, own = Attention(layers=(0,)), Attention()
    with torch.no_grad():
        _, values = run_tower(tower(), pictures(), [-2], True, [behind, own])
        _, last = run_tower(tower(), pictures(), [-1], True, [behind, own])
    assert torch.equal(values[behind], last[own])
    assert torch.equal(last[behind], last[own])
    assert (values[behind] - values[own]).abs().max() > 1e-4


def test_attention_outside_the_interface_is_reported():
    encoder = tower()
    with (
        pytest.raises(UnsupportedModelError, match="'uniform' or 'random'"),
        tap(encoder, {torch.nn.Linear(1, 1): [Attention()]}, 1),
    ):
        encoder(pictures())
    assert encoder.config._attn_implementation == "sdpa"


def test_threads_do_not_disturb_each_other():
    encoder = tower()
    pixels = [pictures(seed) for seed in range(3)]
    with torch.no_grad():
        alone = [run_tower(encoder, x, [-2], True, PROBES)[1] for x in pixels[:2]]
        plain = encoder(pixels[2]).last_hidden_state
    barrier, faults = threading.Barrier(3), []

    def probe(i):
        with torch.no_grad():
            for _ in range(15):
                barrier.wait(timeout=60)
                _, values = run_tower(encoder, pixels[i], [-2], True, PROBES)
                faults.extend(p for p, x in alone[i].items() if not torch.equal(values[p], x))

    def use():
        with torch.no_grad():
            for _ in range(15):
                barrier.wait(timeout=60)
                if not torch.equal(encoder(pixels[2]).last_hidden_state, plain):
                    faults.append("plain")

    threads = [threading.Thread(target=probe, args=(i,)) for i in (0, 1)] + [threading.Thread(target=use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert not barrier.broken
    assert encoder.config._attn_implementation == "sdpa"
    assert not foveate.families.taps._tapped


def test_towers_that_share_a_configuration():
    config = copy.deepcopy(clip_config())
    first, second = (spread(CLIPVisionModel(config), seed) for seed in (0, 1))
    second.config = first.config
    for encoder in (first, second, first):
        run_tower(encoder, pictures(), [-2], True, [Attention()])
    assert first.config._attn_implementation == "sdpa"


def padded(n, shown):
    """Return queries and keys of two sequences padded to n, and which tokens are content."""
    mask = torch.arange(n) < torch.tensor(shown)[:, None]
    return torch.randn(2, 3, n, 4), torch.randn(2, 3, n, 4), mask


@pytest.mark.parametrize("chunk", [2, 256])
def test_padding_neither_gives_nor_gets_attention(monkeypatch, chunk):
    monkeypatch.setattr(foveate.core.probes, "_QUERY_CHUNK", chunk)
    query, key, mask = padded(7, (5, 7))
    values, row = (
        attention_received(query, key, 0.5, 0, mask[:, None, None]),
        cls_row(query, key, 0.5, mask[:, None, None]),
    )
    for i, n in enumerate((5, 7)):
        alone = query[i : i + 1, :, :n], key[i : i + 1, :, :n]
        torch.testing.assert_close(values[i, :n], attention_received(*alone, 0.5)[0])
        torch.testing.assert_close(row[i, : n - 1], cls_row(*alone, 0.5)[0])
        assert not values[i, n:].any()
        assert not row[i, n - 1 :].any()


def test_sequences_told_apart_by_a_mask():
    query, key, _ = padded(7, (7, 7))
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool().expand(2, 1, -1, -1)
    values = attention_received(query, key, 0.5, 0, blocks)
    first, second = (attention_received(query[:, :, part], key[:, :, part], 0.5) for part in (slice(3), slice(3, 7)))
    torch.testing.assert_close(values, torch.cat([first * 3, second * 4], dim=1) / 7)


@pytest.mark.parametrize("kind", ["2-D", "boolean", "additive"])
def test_masks_of_every_implementation(kind):
    query, key, mask = padded(6, (4, 6))
    given = {
        "2-D": mask.long(),
        "boolean": mask[:, None, None].expand(-1, 1, 6, -1),
        "additive": torch.zeros(2, 1, 6, 6).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min),
    }[kind]
    module, probe = torch.nn.Identity(), Attention("received")
    taps = Taps({module: [probe]}, 0)
    taps.read(module, query, key, key, 0.5, None, given)
    (values,) = taps.values(module, probe)
    torch.testing.assert_close(values, attention_received(query, key, 0.5, 0, mask[:, None, None]))


class Attending(torch.nn.Linear):
    def forward(self, x):
        heads = super().forward(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Tower(torch.nn.Module):
    """Like those of timm: attention layers that call the fused kernel by themselves."""

    def __init__(self):
        super().__init__()
        self.timm_model = torch.nn.Sequential(Attending(8, 24), Attending(8, 24))

    def forward(self, x):
        return self.timm_model(x)


def test_calls_of_the_fused_kernel_are_read():
    encoder, x, probe = Tower(), torch.randn(2, 5, 8), Attention("received")
    marked = encoder.timm_model[1]
    with torch.no_grad(), tap(encoder, {marked: [probe]}, 0) as taps:
        out = encoder(x)
    assert torch.equal(out, encoder(x))
    (values,) = taps.values(marked, probe)
    query, key, _ = torch.nn.functional.linear(encoder.timm_model[0](x), marked.weight, marked.bias).reshape(
        2, 5, 3, 2, 4
    ).permute(2, 0, 3, 1, 4)  # fmt: skip
    torch.testing.assert_close(values, attention_received(query, key, 0.5))
    assert not marked._forward_hooks
    assert not marked._forward_pre_hooks


def test_passes_of_other_threads_are_not_read():
    encoder, probe = Tower(), Attention("received")
    marked, x = encoder.timm_model[1], torch.randn(2, 5, 8)
    with torch.no_grad(), tap(encoder, {marked: [probe]}, 0) as taps:
        other = threading.Thread(target=encoder, args=(torch.randn(3, 5, 8),))
        other.start()
        other.join()
        encoder(x)
    assert [len(v) for v in taps.values(marked, probe)] == [2]


def test_an_unfused_tower_is_named():
    encoder, probe = Tower(), Attention("received")
    with (
        pytest.raises(UnsupportedModelError, match=r"Tower did not call .* fused kernel"),
        tap(encoder, {encoder.timm_model[1]: [probe]}, 0),
    ):
        pass


def test_attention_received_and_its_mean_over_blocks_by_hand():
    """Sixteen tokens of two heads that formulas give, and their 4 x 4 grid merged 2 x 2 in raster order."""
    tokens, heads, width = range(1, 17), range(1, 3), range(1, 5)
    query = torch.tensor([[[[math.sin(0.7 * i + 1.1 * h * c) for c in width] for i in tokens] for h in heads]])
    key = torch.tensor([[[[1.5 * math.cos(0.703 * i * c + 0.6 * h) for c in width] for i in tokens] for h in heads]])
    got = attention_received(query, key, 0.5)
    expected = [
        0.059091, 0.068178, 0.075789, 0.065843, 0.056212, 0.059994, 0.059977, 0.055996, 0.051159, 0.058784, 0.069677,
        0.074087, 0.064927, 0.058036, 0.061830, 0.060417,
    ]  # fmt: skip
    assert got[0].tolist() == pytest.approx(expected, abs=2e-6)
    merged = mean_of_blocks(got, (4, 4), 2)
    assert merged[0].tolist() == pytest.approx([0.060869, 0.064402, 0.058227, 0.066503], abs=2e-6)
