"""A permuted checkpoint is the same model; quantised tensors dequantise to the permuted weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.serving.plan import Plan
from rlkv.serving.weights import missing, permute, permuted
from rlkv.support import ModelShape, check_model
from rlkv.window import Window

SHAPE = ModelShape(layers=1, query_heads=8, kv_heads=4, head_dim=16)  # hidden size 24 in the tests below
PLAN = Plan(HeadMask(torch.tensor([[False, True, False, True]])), SHAPE, Window(2, 3))
ORDER = [1, 3, 0, 2]


def named(module: str, kind: str) -> str:
    return f"model.layers.0.self_attn.{module}.{kind}"


def by_hand(weight: torch.Tensor, axis: int, query: bool) -> torch.Tensor:
    """The weight with its heads in ORDER, row by row."""
    rows = SHAPE.head_dim * (2 if query else 1)
    index = [head * rows + row for head in ORDER for row in range(rows)]
    return weight.index_select(axis, torch.tensor(index))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tp", [1, 2])
def test_permuted_model_has_the_originals_logits(kind: str, tp: int) -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96}
    if kind == "qwen2":
        sizes["attention_bias"] = True
    model = tiny(kind, **sizes).double()
    shape = check_model(model)
    plan = Plan(HeadMask.random(3, 6, 0.5, 1, tp=tp), shape, Window(2, 3), tp=tp)
    before = model.state_dict()
    after = dict(permuted(plan, before.items()))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj.weight" in name for name in moved) and any("o_proj.weight" in name for name in moved)
    assert all("self_attn" in name for name in moved)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    other = tiny(kind, seed=1, **sizes).double()
    other.load_state_dict(after)
    torch.testing.assert_close(other(tokens).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("module,axis", [("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)])
def test_scales_of_channels_and_blocks_follow_their_weights(module: str, axis: int) -> None:
    query = module in ("q_proj", "o_proj")
    out = 128 if query else 64
    weight = torch.randn(out, 24) if axis == 0 else torch.randn(24, out)
    expected = by_hand(weight, axis, query)
    channel = torch.rand(len(weight), 1)
    got = permute(PLAN, named(module, "weight"), weight) * permute(
        PLAN, named(module, "weight_scale"), channel
    )
    torch.testing.assert_close(got, by_hand(weight * channel, axis, query))
    block = torch.rand(weight.shape[0] // 8, weight.shape[1] // 8)
    wide = block.repeat_interleave(8, 0).repeat_interleave(8, 1)
    scale = permute(PLAN, named(module, "weight_scale_inv"), block)
    got = expected * scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(got, by_hand(weight * wide, axis, query))


def pack(nibbles: torch.Tensor, axis: int) -> torch.Tensor:
    """Eight 4-bit values a word along ``axis``."""
    words = nibbles.long().unflatten(axis, (-1, 8)).movedim(axis + 1, -1)
    return (words << (4 * torch.arange(8))).sum(-1)


def unpack(words: torch.Tensor, axis: int) -> torch.Tensor:
    return ((words[..., None] >> (4 * torch.arange(8))) & 15).movedim(-1, axis + 1).flatten(axis, axis + 1)


@pytest.mark.parametrize("packed", [1, 0], ids=["awq", "gptq"])
@pytest.mark.parametrize("module", ["q_proj", "k_proj", "o_proj"])
def test_packed_words_dequantise_to_the_permuted_weight(module: str, packed: int) -> None:
    query, size = module != "k_proj", 8
    heads = 128 if query else 64
    shape = (heads, 24) if module == "o_proj" else (24, heads)  # [in, out]
    axis = 0 if module == "o_proj" else 1  # of the heads
    nibbles = torch.randint(16, shape)
    zeros = torch.randint(16, (shape[0] // size, shape[1]))
    scales = torch.rand(shape[0] // size, shape[1])

    def dequantise(q: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        zero, scale = (x.repeat_interleave(size, 0) for x in (unpack(z, 1), s))
        return (unpack(q, packed) - zero) * scale

    stored = {"qweight": pack(nibbles, packed), "qzeros": pack(zeros, 1), "scales": scales}
    expected = by_hand(dequantise(*stored.values()), axis, query)
    got = [permute(PLAN, named(module, kind), tensor) for kind, tensor in stored.items()]
    torch.testing.assert_close(dequantise(*got), expected)


def test_wide_norms_move_and_norms_of_a_head_stay() -> None:
    wide, narrow = torch.randn(128), torch.randn(16)
    assert torch.equal(permute(PLAN, named("q_norm", "weight"), wide), by_hand(wide, 0, True))
    assert permute(PLAN, named("q_norm", "weight"), narrow) is narrow


@pytest.mark.parametrize(
    "name,tensor",
    [
        ("model.layers.0.mlp.up_proj.weight", torch.randn(64, 24)),
        ("model.layers.7.self_attn.q_proj.weight", torch.randn(128, 24)),  # beyond the model
        (named("k_proj", "weight_scale"), torch.rand(1)),
        (named("o_proj", "bias"), torch.randn(24)),
        (named("o_proj", "g_idx"), torch.arange(128) // 8),
        (named("q_proj", "g_idx"), torch.randperm(24)),
    ],
)
def test_what_has_no_heads_stays(name: str, tensor: torch.Tensor) -> None:
    assert permute(PLAN, name, tensor) is tensor


def test_what_cannot_be_permuted_is_refused() -> None:
    with pytest.raises(RLKVError, match="act-order"):
        permute(PLAN, named("o_proj", "g_idx"), torch.randperm(128))
    with pytest.raises(RLKVError, match="fused"):
        permute(PLAN, named("qkv_proj", "weight"), torch.randn(256, 24))
    with pytest.raises(RLKVError, match="straddles"):
        permute(PLAN, named("k_proj", "weight_scale_inv"), torch.rand(2, 3))


def test_an_update_that_cannot_be_permuted_whole_is_not_begun() -> None:
    weight = torch.randn(128, 24)
    update = [(named("q_proj", "weight"), weight), (named("qkv_proj", "weight"), torch.randn(256, 24))]
    with pytest.raises(RLKVError, match="fused"):
        next(permuted(PLAN, update))
    name, moved = next(permuted(PLAN, update[:1]))
    assert name == update[0][0] and torch.equal(moved, by_hand(weight, 0, True))
    names: set[str] = set()
    list(permuted(PLAN, update[:1], names))
    assert missing(PLAN, names) == [f"layers.0.self_attn.{module}_proj" for module in "kvo"]
