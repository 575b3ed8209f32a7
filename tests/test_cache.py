"""HeadwiseCache: bytes really held, nothing read that was not written, and what it refuses."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny
from transformers import LlamaConfig, MistralConfig

from rlkv.attention import Mixed, enable
from rlkv.cache import HeadwiseCache
from rlkv.cache_full import FullHeads
from rlkv.cache_layer import HeadwiseLayer
from rlkv.cache_local import LocalHeads
from rlkv.cache_rows import Forward, Rows
from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.window import Window

WINDOW = Window(3, 9)
SOME = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()


def ready(kind: str = "llama", **overrides: Any) -> Any:
    model = tiny(kind, **overrides)
    enable(model)
    return model


def test_another_window_than_the_masks_is_warned_of() -> None:
    config, mask = ready().config, HeadMask(SOME, WINDOW)
    with pytest.warns(UserWarning, match=r"made for window 3\+9 is used with 2\+4") as caught:
        HeadwiseCache(config, mask, Window(2, 4))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HeadwiseCache(config, mask)
        HeadwiseCache(config, mask, WINDOW)
        HeadwiseCache(config, HeadMask(SOME), Window(2, 4))
        HeadwiseCache(config, HeadMask(torch.ones_like(SOME), WINDOW), Window(2, 4))  # no head is local


def bytes_between(cache: HeadwiseCache, lengths: list[int], block: int) -> None:
    """Storage is what the mask says, plus at most a block at each end of a row's full heads."""
    held = cache.mask.kv_bytes(lengths, bytes_per_value=4)
    slack = 2 * block * len(lengths) * int(cache.mask.full.sum()) * cache.shape.head_dim * 4 * 2
    assert held <= cache.nbytes() <= held + slack


@pytest.mark.parametrize("policy", ["full", "local"])
def test_bytes_of_a_long_ragged_batch(policy):
    model = ready(num_hidden_layers=3, max_position_embeddings=9000, head_dim=4)
    lengths = [8192, 6001, 3000, 517]
    ids, mask, _ = prompts(lengths)
    full = HeadMask(SOME, Window(16, 64), enable(model))
    cache = HeadwiseCache(model.config, full, prefill=policy)
    new = 4
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
    lengths = [length + new - 1 for length in lengths]  # the last token was not fed
    bytes_between(cache, lengths, 64)
    assert cache.nbytes() < 0.5 * full.full_bytes(lengths, bytes_per_value=4)


def test_bytes_grow_by_blocks_while_decoding():
    model = ready()
    ids, mask, _ = prompts([21, 20, 6])
    cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW, enable(model)), block=32)
    sizes = set()
    for new in range(1, 140):
        tokens = mask.shape[1] - cache.get_seq_length()
        model(ids[:, -tokens:], attention_mask=mask, past_key_values=cache)
        if new > 6:  # the ring is allocated whole
            bytes_between(cache, [20 + new, 19 + new, 5 + new], 32)
        sizes.add(cache.nbytes())
        ids, mask = torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert len(sizes) == 5  # 32, 64, 96, 128 and 160 columns


@pytest.mark.parametrize(
    "kept", [SOME, torch.ones_like(SOME), torch.zeros_like(SOME)], ids=["some", "all", "no"]
)
def test_a_prompt_leaves_nothing_behind_but_its_final_storage(monkeypatch, kept):
    """Layer by layer the storage only rises to its final size, and a layer's whole keys are let go."""
    model, sizes, alive = ready(), [], []
    attend = HeadwiseLayer.attend

    def watch(self: HeadwiseLayer, key: Any, value: Any, *rest: Any) -> Any:
        assert all(reference() is None for reference in alive)
        output = attend(self, key, value, *rest)
        alive[:] = [weakref.ref(key), weakref.ref(value)]
        sizes.append(self._cache.nbytes())
        return output

    monkeypatch.setattr(HeadwiseLayer, "attend", watch)
    ids, mask, _ = prompts([200, 120])
    cache = HeadwiseCache(model.config, HeadMask(kept, WINDOW))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert sizes == sorted(sizes) and sizes[-1] == cache.nbytes()
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize(
    "lengths, poison", [([40, 40], torch.nan), ([40, 30, 3], 1e4)], ids=["even", "ragged"]
)
@pytest.mark.parametrize("policy", ["full", "local"])
def test_poison_never_reaches_the_output(monkeypatch, lengths, poison, policy):
    """Freed buffers become NaN; unwritten places too, or a large number where a weight of 0 meets them."""
    model = ready()
    ids, mask, _ = prompts(lengths)
    options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
    full = HeadMask(SOME, WINDOW)

    def run() -> torch.Tensor:
        return model.generate(
            ids, past_key_values=HeadwiseCache(model.config, full, prefill=policy, block=16), **options
        )

    clean, poisoned = run(), []
    store, cut = FullHeads.store, LocalHeads._cut

    def poison_store(self: FullHeads, key: Any, value: Any, forward: Forward) -> None:
        before = [self.keys, self.values]
        store(self, key, value, forward)
        assert self.keys is not None and self.values is not None
        unwritten = (forward.tensors.column >= forward.stop).flatten() | forward.tensors.padding.flatten()
        for old, new in zip(before, (self.keys, self.values), strict=True):
            if old is not None and old is not new:
                old.fill_(torch.nan)
                poisoned.append("freed")
            new[:, unwritten] = poison
            poisoned.append("unwritten")

    def poison_cut(self: LocalHeads, key: Any, value: Any, *rest: Any) -> None:
        before = [self.keys, self.values]
        cut(self, key, value, *rest)
        for old in (*before, key, value):
            if old is not None:
                old.fill_(torch.nan)
                poisoned.append("cut")

    monkeypatch.setattr(FullHeads, "store", poison_store)
    if policy == "full":  # by then everything has been attended
        monkeypatch.setattr(LocalHeads, "_cut", poison_cut)
    assert torch.equal(run(), clean)
    assert {"freed", "unwritten"} <= set(poisoned)


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    more=st.integers(1, 60),
    sink=st.integers(0, 5),
    recent=st.integers(1, 12),
    block=st.sampled_from([1, 4, 16]),
)
def test_places_and_rings_against_writing_tokens_one_by_one(first, more, sink, recent, block):
    window, stop = Window(sink, recent), max(first) + more
    rows = Rows(first, stop, block)
    forward = Forward(rows, stop - 1, 1, window, torch.device("cpu"))
    rings = [[-1] * window.size for _ in first]
    for row, padding in enumerate(first):
        for position in range(stop - padding):
            rings[row][int(window.slot(torch.tensor(position)))] = position
    assert forward.held(stop).tolist() == rings
    stored = {(row, column) for row, padding in enumerate(first) for column in range(padding, stop)}
    hidden = forward.blocks_hidden.flatten().tolist()
    owners = forward.tensors.owner.repeat_interleave(block).tolist()
    columns = forward.tensors.column.flatten().tolist()
    seen = [place for place, hide in zip(zip(owners, columns, strict=True), hidden, strict=True) if not hide]
    assert sorted(seen) == sorted(stored)
    for row, padding in enumerate(first):
        place = rows.place(row, padding, stop)
        assert columns[place] == list(range(padding, stop)) and set(owners[place]) == {row}
    assert rows.total <= sum(stop - padding + 2 * (block - 1) for padding in first)


def test_a_copied_prompt_cache_goes_on_by_itself():
    model = ready()
    ids, mask, _ = prompts([40, 25])
    cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW))
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    twin = copy.deepcopy(cache)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    one = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(model.generate(ids, past_key_values=twin, **options), one)


def test_decoding_strategies_refused_by_name():
    model = ready()
    ids, _, _ = prompts([20])
    assistant = tiny("llama", seed=1, num_hidden_layers=1)
    for options, words in (
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"assistant_model": assistant}, "assisted decoding"),
    ):
        for policy in ("full", "local"):
            cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW), prefill=policy)
            with pytest.raises(RLKVError, match=f"^{words}.*can't be used with a HeadwiseCache"):
                model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **options)
    cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW))
    for call in (cache.batch_select_indices, cache.batch_repeat_interleave):
        with pytest.raises(RLKVError, match="^contrastive search"):
            call(2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forgotten_attention_is_a_sentence(attention):
    model = tiny("qwen3", attention=attention)
    cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW))
    with pytest.raises(RLKVError, match=r"set_attn_implementation\('rlkv'\)"):
        model.generate(prompts([9])[0], past_key_values=cache, max_new_tokens=2)


def test_several_tokens_after_a_prompt_need_a_word():
    model = ready()
    ids, _, _ = prompts([30])

    def feed(cache: HeadwiseCache, start: int, stop: int) -> Any:
        return model(ids[:, start:stop], past_key_values=cache)

    cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW))
    feed(cache, 0, 20)
    with pytest.raises(RLKVError, match=r"chunked_prefill\(\).*new_turn\(\).*prefill='local'"):
        feed(cache, 20, 30)
    cache.new_turn()
    feed(cache, 20, 30)
    assert cache.get_seq_length() == 30
    for allowed in (
        HeadwiseCache(model.config, HeadMask(SOME, WINDOW), prefill="local"),
        HeadwiseCache(model.config, HeadMask(torch.ones_like(SOME))),  # no local heads: nothing to say
    ):
        feed(allowed, 0, 20)
        feed(allowed, 20, 30)


def test_bad_input():
    model = ready()
    config = model.config
    some = HeadMask(SOME, WINDOW)
    with pytest.raises(RLKVError, match="mask of the wrong shape: 2 layers x 3 KV heads.*3 layers x 3 KV"):
        HeadwiseCache(config, HeadMask(SOME[:2], WINDOW))
    with pytest.raises(RLKVError, match="another model"):
        HeadwiseCache(LlamaConfig(num_hidden_layers=3), HeadMask(SOME, WINDOW, enable(model)))
    with pytest.raises(RLKVError, match="mistral.*sliding window"):
        HeadwiseCache(MistralConfig(num_hidden_layers=3, num_key_value_heads=3), some)
    with pytest.raises(RLKVError, match="no window"):
        HeadwiseCache(config, HeadMask(SOME))
    with pytest.raises(RLKVError, match="prefill must be one of full, local; got 'none'"):
        HeadwiseCache(config, some, prefill="none")
    with pytest.raises(RLKVError, match="1 or more; got 0"):
        HeadwiseCache(config, some, block=0)
    long = torch.ones(1, 513, dtype=torch.long)
    with pytest.raises(RLKVError, match="prompt of 513 tokens.*context of 512"):
        model.generate(long, past_key_values=HeadwiseCache(config, some), max_new_tokens=1)
    ids, mask, _ = prompts([20, 12])
    with pytest.raises(RLKVError, match="padding on the left only"):
        model(ids, attention_mask=mask.flip(1), past_key_values=HeadwiseCache(config, some))
    cache = HeadwiseCache(config, some, prefill="local")
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(RLKVError, match="padding on the left only, and the same"):
        model(ids[:, :5], past_key_values=cache)
    with pytest.raises(RLKVError, match="has 5 columns; .* 25 columns"):
        model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    with pytest.raises(RLKVError, match="a batch of 2 and got one of 1"):
        model(ids[:1, :5], past_key_values=cache)
    with pytest.raises(RLKVError, match="exclude each other"):
        model(ids, past_key_values=HeadwiseCache(config, some), rlkv=Mixed(torch.ones(3, 3), WINDOW))
