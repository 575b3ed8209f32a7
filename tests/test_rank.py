"""Choosing a sparsity: against trying every one, and with the development split only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv import HeadGates, HeadMask, RLKVError, Window
from rlkv.rank import for_budget, for_loss, format_bytes, parse_bytes
from rlkv.support import ModelShape

WINDOW = Window(4, 12)


def gates(layers: int = 4, heads: int = 4) -> HeadGates:
    shape = ModelShape(layers, 2 * heads, heads, head_dim=8)
    values = torch.linspace(0, 1, layers * heads).reshape(layers, heads)
    return HeadGates(values, window=WINDOW, model=shape)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8g", 8 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("123456", 123456),
        (77, 77),
        ("10B", 10),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1GB", "8 gigs", "8iB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(RLKVError, match="memory budget: expected a size such as 8GiB"):
        parse_bytes(text)


@given(st.integers(0, 2**45))
def test_printed_sizes_are_near(count: int) -> None:
    number, unit = format_bytes(count).split()
    assert parse_bytes(f"{number}{unit}") == pytest.approx(count, rel=6e-3, abs=0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 16 * 300 * 32 * 3), st.integers(1, 300), st.integers(1, 3), st.sampled_from([1, 2]))
def test_budget_gives_the_fewest_local_heads(budget: int, length: int, batch: int, tp: int) -> None:
    each = [gates().mask(local / 16, tp=tp) for local in range(17)]
    fitting = [mask for mask in each if mask.kv_bytes(length, batch) <= budget]
    if not fitting:
        with pytest.raises(RLKVError, match="even with every head local"):
            for_budget(gates(), budget, length, batch, tp=tp)
        return
    choice = for_budget(gates(), budget, length, batch, tp=tp)
    assert choice.mask.full.sum() == max(mask.full.sum() for mask in fitting)
    assert choice.mask.kv_bytes(length, batch) <= budget
    assert f"sparsity {choice.sparsity:.3f} is the smallest" in choice.sentence


def test_budget_with_ragged_lengths_window_and_dtype() -> None:
    lengths, window = [100, 200], Window(0, 10)
    need = gates().mask(0.5, window=window).kv_bytes(lengths, bytes_per_value=4)
    choice = for_budget(gates(), need, lengths, window=window, bytes_per_value=4)
    assert choice.sparsity == 0.5 and choice.mask.window == window
    assert for_budget(gates(), need - 1, lengths, window=window, bytes_per_value=4).sparsity == 9 / 16
    assert for_budget(gates(), "1TB", lengths).sparsity == 0


def test_budget_too_small_names_the_least() -> None:
    with pytest.raises(RLKVError, match=r"1 KiB can't hold 1 x 100 tokens: even .* takes 8 KiB; lower"):
        for_budget(gates(), "1KiB", 100)  # 16 heads x 16 tokens x 32 bytes


def measured(accuracies: dict[float, float]) -> tuple[list[float], object]:
    """An evaluation that looks accuracies up by sparsity and records what it was asked for."""
    asked: list[float] = []

    def evaluate(mask: HeadMask) -> float:
        asked.append(mask.sparsity)
        return accuracies[mask.sparsity]

    return asked, evaluate


def test_loss_gives_the_largest_sparsity_within_it() -> None:
    accuracies = {0.0: 0.95, 0.25: 0.94, 0.5: 0.92, 0.75: 0.93, 1.0: 0.1}
    asked, evaluate = measured(accuracies)
    choice = for_loss(gates(), evaluate, 0.02, grid=(0.75, 0.25, 1.0, 0.5))
    assert choice.sparsity == 0.75  # one failure at 0.5 does not end the search
    assert asked == sorted(accuracies) and choice.tried == accuracies
    assert "93.0% against 95.0% with the full cache" in choice.sentence


def test_loss_stops_early() -> None:
    asked, evaluate = measured({0.0: 0.9, 0.25: 0.5, 0.5: 0.4, 0.75: 0.9})
    choice = for_loss(gates(), evaluate, 0.02, grid=(0.25, 0.5, 0.75))
    assert asked == [0.0, 0.25, 0.5] and choice.sparsity == 0.0
    asked, evaluate = measured({0.0: 0.9, 0.25: 0.5})
    for_loss(gates(), evaluate, 0.02, grid=(0.25, 0.5), patience=1)
    assert asked == [0.0, 0.25]


def test_loss_tries_each_mask_once_and_allows_an_exact_loss() -> None:
    asked, evaluate = measured({0.0: 0.9, 0.5: 0.8})
    choice = for_loss(gates(), evaluate, 0.1, grid=(0.0, 0.49, 0.5, 0.51))
    assert asked == [0.0, 0.5] and choice.sparsity == 0.5


def test_loss_refusals() -> None:
    with pytest.raises(RLKVError, match="never on the test split"):
        for_loss(gates(), lambda mask: 1.0, 0.02, split="test")
    with pytest.raises(RLKVError, match=r"0.02 is two points\); got 2"):
        for_loss(gates(), lambda mask: 1.0, 2)
