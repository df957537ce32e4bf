"""A CLIP tower in plain steps and float64, one crop at a time, for methods that act inside it."""

import copy
import math

import torch

from foveate.families import family_of


def steps(tower, x, lead, act, layers, half):
    """Run layers on ``[S, C]`` float64 while a method acts on its tokens.

    A token is a dictionary: its hidden state `x`, the `patches` in it, and what the method notes down. Of the queries,
    keys and values ``[H, S, d]``, those of the tokens are handed to ``act(layer, tokens, query, key, value)``, which
    returns the new tokens; `bias` of a token, if any, is added to the attention logits of its key.
    """
    front = x[:lead]
    tokens = [{"x": row, "patches": [i]} for i, row in enumerate(x[lead:])]
    for number, layer in enumerate(tower.encoder.layers[:layers]):
        attention = layer.self_attn
        x = torch.cat([front, *(t["x"][None] for t in tokens)])
        inner = layer.layer_norm1(x)
        query, key, value = (
            getattr(attention, name)(inner).reshape(len(x), attention.num_heads, -1).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = query @ key.mT * query.shape[-1] ** -0.5
        logits = logits + torch.tensor([0.0] * lead + [t.get("bias", 0.0) for t in tokens], dtype=x.dtype)
        x = x + attention.out_proj((logits.softmax(-1) @ value).transpose(0, 1).flatten(1))
        front, tokens = x[:lead], [{**t, "x": row} for t, row in zip(tokens, x[lead:], strict=True)]
        if half == "attention":
            tokens = act(number, tokens, query, key, value)
        x = torch.cat([front, *(t["x"][None] for t in tokens)])
        x = x + layer.mlp(layer.layer_norm2(x))
        front, tokens = x[:lead], [{**t, "x": row} for t, row in zip(tokens, x[lead:], strict=True)]
        if half == "mlp":
            tokens = act(number, tokens, query, key, value)
    return sorted(tokens, key=lambda t: min(t["patches"]))


@torch.no_grad()
def reference(net, inputs, act_for, half, count):
    """Return, per span, the kept positions, the patches of each token, and the embeddings.

    ``act_for(lead, size)`` makes the method's part for a crop of that many patches.
    """
    family, results = family_of(net), []
    for span in family.spans(net, inputs):
        (tower, pixels) = towers(net, family, inputs)[span.kind]
        tower = copy.deepcopy(tower).double()
        projector = copy.deepcopy(net.model.multi_modal_projector).double()
        kept, patches, embeds = [], [], []
        for crop, budget in zip(span.crops, span.budget(count), strict=True):
            if not budget:
                continue
            start = tower.pre_layrnorm(tower.embeddings(pixels[crop.encoder_row][None].double()))[0]
            (top, left), (h, w) = crop.offset, crop.grid
            inner = [8 * (top + r) + left + c for r in range(h) for c in range(w)]
            order = [0, *(1 + i for i in range(64) if i not in inner), *(1 + i for i in inner)]
            lead = len(order) - len(inner)
            act = act_for(lead, len(inner), budget)
            tokens = steps(tower, start[order], lead, act, len(tower.encoder.layers) - 1, half)
            kept += [int(crop.index[min(t["patches"])]) for t in tokens]
            patches += [sorted(crop.index[t["patches"]].tolist()) for t in tokens]
            embeds += [projector(t["x"]) for t in tokens]
        order = sorted(range(len(kept)), key=lambda i: kept[i])
        results.append(([kept[i] for i in order], [patches[i] for i in order], torch.stack([embeds[i] for i in order])))
    return results


def towers(net, family, inputs):
    if hasattr(family, "_towers"):
        return family._towers(net, inputs)
    return {"image": (net.model.vision_tower, family.pixels(net, inputs))}


def log_size(token):
    return math.log(len(token["patches"]))


def embeddings_of(reduced):
    """Return the embeddings of each span of reduced inputs."""
    parts = {kind: iter(output.pooler_output) for kind, output in reduced["mm_encoder_outputs"].items()}
    return [next(parts[span.kind]) for span in reduced.selection]
