"""Mixed attention against eager attention, explicit masks, finite differences and its own reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, prompts, tiny
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import rlkv.attention
from rlkv.attention import Mixed, enable
from rlkv.attention.chunked import mixed_chunked
from rlkv.attention.reference import mixed_attention
from rlkv.errors import RLKVError
from rlkv.window import Window

WINDOW = Window(3, 7)
LENGTHS = [41, 23, 8]  # above, above and below the window


def logits(model, ids, rlkv=None, **kwargs):
    extra = {} if rlkv is None else {"rlkv": rlkv}
    return model(ids, use_cache=False, **extra, **kwargs).logits


def local_bias(lengths: list[int], window: Window) -> torch.Tensor:
    """Additive mask [B, 1, T, T] of left-padded rows, written down token by token."""
    width = max(lengths)
    bias = torch.full((len(lengths), 1, width, width), torch.finfo(torch.float32).min)
    for row, length in enumerate(lengths):
        pad = width - length
        for i in range(length):
            for j in range(i + 1):
                if j < window.sink or i - j < window.recent:
                    bias[row, 0, pad + i, pad + j] = 0.0
    return bias


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_one_are_the_base_model_bit_for_bit(kind):
    model = tiny(kind)
    ids, mask, positions = prompts(LENGTHS)
    base = logits(model, ids, attention_mask=mask, position_ids=positions)
    enable(model)
    ones = torch.ones(3, 3)
    same = logits(
        model, ids, Mixed(ones, WINDOW, path="reference"), attention_mask=mask, position_ids=positions
    )
    assert torch.equal(same, base)
    plain = logits(model, ids[:1], Mixed(ones, WINDOW, path="reference"))
    model.set_attn_implementation("eager")
    assert torch.equal(plain, logits(model, ids[:1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["reference", "chunked"])
def test_gates_of_zero_are_sink_and_recent(kind, path):
    model = tiny(kind)
    ids, mask, positions = prompts(LENGTHS)
    expected = logits(model, ids, attention_mask=local_bias(LENGTHS, WINDOW), position_ids=positions)
    full = logits(model, ids, attention_mask=mask, position_ids=positions)
    enable(model)
    zeros = Mixed(torch.zeros(3, 3), WINDOW, path=path)
    actual = logits(model, ids, zeros, attention_mask=mask, position_ids=positions)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=1e-4)
    assert (full[real] - expected[real]).abs().max() > 0.1  # the window matters here


def test_soft_gates_against_loops():
    """Both paths against softmaxes over index lists, for gates within (0, 1)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 19, 5), torch.randn(1, 2, 19, 5), torch.randn(1, 2, 19, 5)
    gates, window, expected = torch.tensor([0.3, 0.8]), Window(2, 4), torch.zeros(1, 4, 19, 5)
    for head in range(4):
        for i in range(19):
            for gate, seen in (
                (gates[head // 2], list(range(i + 1))),
                (1 - gates[head // 2], [j for j in range(i + 1) if j < 2 or i - j < 4]),
            ):
                scores = torch.stack([query[0, head, i] @ key[0, head // 2, j] for j in seen]) * 0.4
                weights = torch.exp(scores) / torch.exp(scores).sum()
                expected[0, head, i] += gate * (weights @ value[0, head // 2, seen])
    chunked = mixed_chunked(query, key, value, gates, window, 0.4)
    torch.testing.assert_close(chunked, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        reference(query, key, value, gates, window, 0.4), expected, atol=1e-5, rtol=1e-4
    )


def reference(query, key, value, gates, window, scaling):
    position = torch.arange(query.shape[2])
    full = position <= position[:, None]
    local = window.sees(position[:, None], position)
    return mixed_attention(query, key, value, gates, full[None, None], local[None, None], scaling)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 150),
    sink=st.integers(0, 20),
    recent=st.integers(1, 60),
    dim=st.sampled_from([4, 8, 16, 20]),
    groups=st.sampled_from([1, 2, 4, 7]),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    per_row=st.booleans(),
    seed=st.integers(0, 999),
)
def test_chunked_equals_reference(length, sink, recent, dim, groups, heads, batch, per_row, seed):
    """In float64: a gate's gradient sums thousands of products, and float32 rounding would blur the test."""
    generator = torch.Generator().manual_seed(seed)
    window, scaling = Window(sink, recent), 1 / math.sqrt(dim)
    shapes = [(batch, heads * groups, length, dim), *[(batch, heads, length, dim)] * 2]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gates = torch.rand((batch, heads) if per_row else (heads,), generator=generator, dtype=torch.float64)
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    results = []
    for function in (reference, mixed_chunked):
        inputs = [tensor.clone().requires_grad_() for tensor in (*states, gates)]
        output = function(*inputs, window, scaling)
        (output * weights).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for expected, actual in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= 1e-10 * scale


@pytest.mark.parametrize("path", ["reference", "chunked"])
def test_gate_gradient_by_finite_differences(path):
    model = tiny("qwen3").double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # transformers' norm rounds to float32
            module.forward = partial(F.rms_norm, weight=module.weight, normalized_shape=module.weight.shape)
    enable(model)
    ids, mask, positions = prompts([26, 14])
    weights = torch.randn(2, 26, 61, dtype=torch.float64) * mask[..., None]

    def loss(gates):
        mixed = Mixed(gates, WINDOW, path=path)
        scores = logits(model, ids, mixed, attention_mask=mask, position_ids=positions)
        return (scores.log_softmax(-1) * weights).sum()

    gates = torch.rand(3, 3, dtype=torch.float64).requires_grad_()
    loss(gates).backward()
    step = 1e-6
    for layer in range(3):
        for head in range(3):
            nudge = torch.zeros(3, 3, dtype=torch.float64)
            nudge[layer, head] = step
            with torch.no_grad():
                slope = (loss(gates + nudge) - loss(gates - nudge)) / (2 * step)
            assert gates.grad[layer, head].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("path", ["reference", "chunked"])
def test_gradients_reach_every_gate_and_no_weight(path):
    model = tiny("llama")
    enable(model)
    ids, _, _ = prompts([33, 33])
    gates = torch.full((3, 3), 0.5, requires_grad=True)
    logits(model, ids, Mixed(gates, WINDOW, path=path)).log_softmax(-1)[:, -1, 5].sum().backward()
    assert (gates.grad.abs() > 1e-8).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient(monkeypatch):
    model = tiny("qwen2")
    enable(model)
    ids, _, _ = prompts([29, 29])
    calls, attend = [], Mixed.attend
    monkeypatch.setattr(Mixed, "attend", lambda *args: calls.append(1) or attend(*args))

    def gradient():
        calls.clear()
        gates = torch.full((3, 3), 0.6, requires_grad=True)
        logits(model, ids, Mixed(gates, WINDOW)).log_softmax(-1)[..., 3].sum().backward()
        return gates.grad

    plain = gradient()
    assert len(calls) == 3
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradient()
    assert len(calls) == 6  # every layer ran again in the backward pass
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("path", ["reference", "auto"])
@pytest.mark.parametrize("trainable", [False, True])
def test_padded_and_packed_batches_equal_single_sequences(path, trainable):
    model = tiny("qwen3")
    enable(model)
    ids, mask, positions = prompts(LENGTHS)
    real = mask.bool()
    gates = torch.rand(3, 3, requires_grad=trainable)
    mixed = Mixed(gates, WINDOW, path=path)
    sequences = [row[keep][None] for row, keep in zip(ids, real, strict=True)]
    expected = torch.cat([logits(model, one, mixed)[0] for one in sequences])

    left = logits(model, ids, mixed, attention_mask=mask, position_ids=positions)[real]
    flipped = mask.flip(1)
    right_ids = torch.zeros_like(ids).masked_scatter(flipped.bool(), ids[real])
    right = logits(model, right_ids, mixed, attention_mask=flipped)[flipped.bool()]
    unmasked = logits(model, right_ids, mixed)[flipped.bool()]
    packed_ids = torch.cat(sequences, 1)
    restarting = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = logits(model, packed_ids, mixed, position_ids=restarting)[0]
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    explicit = Mixed(gates, WINDOW, path=path, cu_seqlens=edges)
    told = logits(model, packed_ids, explicit, position_ids=restarting)[0]
    gapped = torch.cat([ids[:1, :20], torch.zeros(1, 4, dtype=ids.dtype), ids[:1, 20:]], 1)
    gap = torch.ones_like(gapped).index_fill(1, torch.arange(20, 24), 0)
    middle = logits(model, gapped, mixed, attention_mask=gap, position_ids=gap.cumsum(-1) - 1)[gap.bool()]
    for actual in (left, right, unmasked, packed, told):
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(middle, expected[: LENGTHS[0]], atol=3e-5, rtol=1e-4)


def test_packed_rows_in_a_batch():
    model = tiny("llama")
    enable(model)
    ids, _, _ = prompts([40, 40])
    positions = torch.stack(
        [torch.arange(40), torch.cat([torch.arange(15), torch.arange(25)])],
    )
    mixed = Mixed(torch.rand(3, 3), WINDOW)
    together = logits(model, ids, mixed, position_ids=positions)
    torch.testing.assert_close(together[0], logits(model, ids[:1], mixed)[0], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(together[1, :15], logits(model, ids[1:, :15], mixed)[0], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(together[1, 15:], logits(model, ids[1:, 15:], mixed)[0], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_gates_of_each_row(path):
    model = tiny("mistral")
    enable(model)
    ids, mask, positions = prompts(LENGTHS)
    gates = torch.rand(3, 3, 3)
    together = logits(model, ids, Mixed(gates, WINDOW, path), attention_mask=mask, position_ids=positions)
    for row, length in enumerate(LENGTHS):
        alone = logits(model, ids[row : row + 1, -length:], Mixed(gates[row], WINDOW, path))
        torch.testing.assert_close(together[row, -length:], alone[0], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gates_it_is_the_base_model(kind):
    model = tiny(kind)
    ids, mask, _ = prompts([30, 12])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    enable(model)
    actual = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=DynamicCache()
    )
    assert torch.equal(actual, expected)


def test_constant_full_gates_leave_the_local_branch_out(monkeypatch):
    model = tiny("llama")
    enable(model)
    ids, mask, positions = prompts(LENGTHS)
    base = logits(model, ids, attention_mask=mask, position_ids=positions)
    monkeypatch.setattr("rlkv.attention.chunked.local_attention", None)  # calling it would fail
    ones = logits(model, ids, Mixed(torch.ones(3, 3), WINDOW), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(ones, base)


def test_refusals():
    ids, mask, _ = prompts([12, 5])
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )
    )
    with pytest.raises(RLKVError, match="mistral.*sliding window of 4096"):
        enable(model)
    model = tiny("llama")
    enable(model)
    with pytest.raises(RLKVError, match=r"gates of shape \[2, 3\] don't fit.*3 layers x 3 KV heads"):
        logits(model, ids, Mixed(torch.ones(2, 3), WINDOW))
    with pytest.raises(RLKVError, match="batch of 2"):
        logits(model, ids, Mixed(torch.ones(4, 3, 3), WINDOW))
    with pytest.raises(RLKVError, match=r"\[layers, kv_heads\]"):
        Mixed(torch.ones(3), WINDOW)
    with pytest.raises(RLKVError, match="one of auto, reference, chunked, kernel; got 'fast'"):
        Mixed(torch.ones(3, 3), WINDOW, path="fast")
    with pytest.raises(RLKVError, match="2D attention_mask"):
        logits(model, ids, attention_mask=torch.zeros(2, 1, 12, 12))
    broken = mask.clone()
    broken[0, 4] = 0
    with pytest.raises(RLKVError, match="unbroken causal sequences"):
        logits(model, ids, Mixed(torch.ones(3, 3), WINDOW, path="chunked"), attention_mask=broken)
    for edges in ([0, 5], [0, 5, 5, 12], [1, 12], []):
        with pytest.raises(RLKVError, match="cu_seqlens must rise from 0 to the 12 tokens"):
            logits(model, ids[:1], Mixed(torch.ones(3, 3), WINDOW, cu_seqlens=edges))
    with pytest.raises(RLKVError, match="cu_seqlens.*batch of 2"):
        logits(model, ids, Mixed(torch.ones(3, 3), WINDOW, cu_seqlens=[0, 12]))
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(RLKVError, match="no dropout"):
        logits(model, ids, Mixed(torch.ones(3, 3), WINDOW))
    assert rlkv.attention.NAME == "rlkv"
