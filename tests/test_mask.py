"""Masks: ranking, rounding and bytes, each against a plain recount."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlkv import HeadMask, RLKVError, Window
from rlkv.mask import rank_heads
from rlkv.support import ModelShape


@st.composite
def tables(draw: st.DrawFn) -> torch.Tensor:
    """Scores [layers, heads] with many ties."""
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    cells = st.lists(st.integers(0, 5), min_size=layers * heads, max_size=layers * heads)
    return torch.tensor(draw(cells), dtype=torch.float32).reshape(layers, heads) / 5


def shape_of(scores: torch.Tensor, bytes_per_value: int = 2) -> ModelShape:
    layers, heads = scores.shape
    return ModelShape(layers, 2 * heads, heads, head_dim=8, bytes_per_value=bytes_per_value)


@given(tables(), st.floats(0, 1), st.integers(0, 9))
@example(torch.zeros(5, 6), 0.55, 0)  # (1 - s) * 5 * 6 and (1 - s) * 30 round to different numbers
def test_keeps_the_highest(scores: torch.Tensor, sparsity: float, seed: int) -> None:
    mask = HeadMask.from_scores(scores, sparsity, seed=seed)
    kept = round((1 - sparsity) * scores.numel())
    assert int(mask.full.sum()) == kept
    assert mask.sparsity == pytest.approx(1 - kept / scores.numel())
    assert (mask.requested, mask.seed) == (sparsity, seed)
    if 0 < kept < scores.numel():
        assert scores[mask.full].min() >= scores[~mask.full].max()
    assert torch.equal(mask.full, HeadMask.from_scores(scores, sparsity, seed=seed).full)
    assert mask.per_layer() == [sum(row) for row in mask.full.tolist()]
    assert torch.equal(mask.gates(), mask.full.float())


@given(tables(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_a_head_kept_at_s_is_kept_at_smaller_s(
    scores: torch.Tensor, one: float, other: float, rounding: str
) -> None:
    few = HeadMask.from_scores(scores, max(one, other), rounding=rounding)
    many = HeadMask.from_scores(scores, min(one, other), rounding=rounding)
    assert not (few.full & ~many.full).any()


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = HeadMask.random(2, 2, 0.5).save(tmp_path / "mask.json")
    record = json.loads(path.read_text())
    for change in ({"window": 5}, {"model": 5}, {"full": "ones"}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(RLKVError, match="mask.json: not a head mask"):
            HeadMask.load(path)


def test_ends() -> None:
    scores = torch.rand(3, 4)
    assert HeadMask.from_scores(scores, 0).full.all()
    assert not HeadMask.from_scores(scores, 1).full.any()
    assert HeadMask.from_scores(scores, 1).sparsity == 1.0


def test_ties_follow_the_seed() -> None:
    tied = torch.zeros(4, 4)
    masks = [HeadMask.from_scores(tied, 0.5, seed=seed).full for seed in range(8)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
    firsts = [rank_heads(tied, seed)[0, 0].item() for seed in range(200)]
    assert 6 < sum(firsts) / len(firsts) < 9  # 7.5 if no place is preferred, standard error 0.33
    assert sorted(rank_heads(tied, 3).flatten().tolist()) == list(range(16))


def test_random_masks_are_seeded() -> None:
    one, again, other = (HeadMask.random(6, 8, 0.25, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.full, again.full) and not torch.equal(one.full, other.full)
    assert one.sparsity == 0.25


@given(tables(), st.floats(0, 1))
def test_layer_rounding(scores: torch.Tensor, sparsity: float) -> None:
    heads = scores.shape[1]
    mask = HeadMask.from_scores(scores, sparsity, rounding="layer")
    assert set(mask.per_layer()) == {round((1 - sparsity) * heads)}
    for row, full in zip(scores, mask.full, strict=True):
        if 0 < full.sum() < heads:
            assert row[full].min() >= row[~full].max()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tensor_parallel_rounding_changes_the_fewest_heads(data: st.DataObject) -> None:
    layers, tp, blocks = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(2, 3)),
        data.draw(st.integers(1, 2)),
    )
    heads, seed = tp * blocks, data.draw(st.integers(0, 99))
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    sparsity = data.draw(st.floats(0, 1))
    plain = HeadMask.from_scores(scores, sparsity).full
    mask = HeadMask.from_scores(scores, sparsity, tp=tp)
    assert all(count % tp == 0 for count in mask.per_layer())
    total = tp * round(int(plain.sum()) / tp)
    assert sum(mask.per_layer()) == total
    order = scores.argsort(dim=1, descending=True)

    def changed(counts: tuple[int, ...]) -> int:
        full = torch.zeros_like(plain)
        for layer, count in enumerate(counts):
            full[layer, order[layer, :count]] = True
        return int((full ^ plain).sum())

    choices = itertools.product(range(0, heads + 1, tp), repeat=layers)
    fewest = min(changed(counts) for counts in choices if sum(counts) == total)
    assert int((mask.full ^ plain).sum()) == fewest


def test_tensor_parallel_with_equal_layers() -> None:
    mask = HeadMask.from_scores(torch.rand(5, 8), 0.4, rounding="layer", tp=4)
    assert mask.per_layer() == [4] * 5  # 4.8 heads a layer, to a multiple of 4
    assert (mask.rounding, mask.tp) == ("layer", 4)


@settings(deadline=None)
@given(
    tables(),
    st.floats(0, 1),
    st.builds(Window, st.integers(0, 4), st.integers(1, 5)),
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_bytes_against_a_count_of_every_head_and_token(
    scores: torch.Tensor, sparsity: float, window: Window, lengths: list[int]
) -> None:
    mask = HeadMask.from_scores(scores, sparsity, window=window, model=shape_of(scores))
    held = held_full = 0
    for length, full in itertools.product(lengths, mask.full.flatten().tolist()):
        keys = torch.arange(length)
        # Once a head has let a token go it never sees it again, so what the last query sees is what is held.
        seen = length if full else int(window.sees(torch.tensor(max(length - 1, 0)), keys).sum())
        held += seen * 2 * 8 * 2
        held_full += length * 2 * 8 * 2
    assert mask.kv_bytes(lengths) == held
    assert mask.full_bytes(lengths) == held_full
    assert mask.kv_bytes(lengths, batch=3, bytes_per_value=4) == 6 * held
    assert mask.kv_bytes(lengths[0], batch=2) == mask.kv_bytes([lengths[0]] * 2)


def test_bytes_of_a_known_model() -> None:
    llama = ModelShape(layers=32, query_heads=32, kv_heads=8, head_dim=128)
    mask = HeadMask.random(32, 8, 0.5, window=Window(16, 64), model=llama)
    assert mask.full_bytes(32_768) == 4 * 2**30
    assert mask.kv_bytes(32_768) == 2 * 2**30 + 128 * 80 * 512
    assert mask.kv_bytes(32_768, window=Window(0, 1)) == 2 * 2**30 + 128 * 512


def test_bytes_need_a_window_and_a_model() -> None:
    with pytest.raises(RLKVError, match="no window recorded"):
        HeadMask.random(2, 2, 0.5).kv_bytes(10)
    with pytest.raises(RLKVError, match="head_dim is unknown"):
        HeadMask.random(2, 2, 0.5, window=Window(1, 1)).kv_bytes(10)
    all_full = HeadMask.random(2, 2, 0.0, model=ModelShape(2, 2, 2, head_dim=8))
    assert all_full.kv_bytes(10) == all_full.full_bytes(10)  # no local head, no window needed
    with pytest.raises(RLKVError, match="a length is a number of tokens, 0 or more; got -3"):
        all_full.kv_bytes([5, -3])


@settings(deadline=None, max_examples=25)
@given(scores=tables(), sparsity=st.floats(0, 1), window=st.sampled_from([None, Window(4, 16)]))
def test_file_round_trip(
    tmp_path_factory: pytest.TempPathFactory, scores: torch.Tensor, sparsity: float, window: Window | None
) -> None:
    path = tmp_path_factory.mktemp("mask") / "mask.json"
    mask = HeadMask.from_scores(scores, sparsity, seed=4, window=window, model=shape_of(scores, 4))
    loaded = HeadMask.load(mask.save(path))
    assert torch.equal(loaded.full, mask.full)
    for name in ("window", "model", "requested", "seed", "rounding", "tp", "sparsity"):
        assert getattr(loaded, name) == getattr(mask, name)
    record = json.loads(path.read_text())
    assert record["sparsity"] == mask.sparsity and record["seed"] == 4 and "randperm" in record["ties"]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="no such mask file"):
        HeadMask.load(tmp_path / "none.json")
    record = json.loads(HeadMask.random(2, 2, 0.5).save(tmp_path / "mask.json").read_text())
    for change in ({"full": [[0, 2]]}, {"full": [[0, 1], [1]]}, {"window": "wide"}):
        (tmp_path / "bad.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(RLKVError, match="bad.json: not a head mask"):
            HeadMask.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"layers": 3}')
    with pytest.raises(RLKVError, match="bad.json: not a head mask"):
        HeadMask.load(tmp_path / "bad.json")


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, float("nan")])
def test_sparsity_outside_the_range(sparsity: float) -> None:
    with pytest.raises(RLKVError, match=r"within \[0, 1\]; got"):
        HeadMask.from_scores(torch.ones(2, 2), sparsity)


def test_bad_options() -> None:
    scores = torch.ones(2, 6)
    with pytest.raises(RLKVError, match="tp=4 does not divide the 6 KV heads"):
        HeadMask.from_scores(scores, 0.5, tp=4)
    with pytest.raises(RLKVError, match="rounding must be one of global, layer; got 'row'"):
        HeadMask.from_scores(scores, 0.5, rounding="row")
    with pytest.raises(RLKVError, match="scores must be finite"):
        HeadMask.from_scores(scores / 0, 0.5)
    with pytest.raises(RLKVError, match="expected a bool table"):
        HeadMask(torch.ones(2, 6))


def test_mask_of_another_shape() -> None:
    shape = ModelShape(layers=3, query_heads=4, kv_heads=2, head_dim=8, model_type="llama")
    with pytest.raises(RLKVError, match=r"mask of the wrong shape: 2 layers x 2 KV heads.*3 layers x 2"):
        HeadMask.random(2, 2, 0.5).check(shape)
    other = ModelShape(layers=2, query_heads=8, kv_heads=2, head_dim=8, model_type="llama")
    with pytest.raises(RLKVError, match="mask made for another model"):
        HeadMask.random(3, 2, 0.5, model=shape).check(other)
