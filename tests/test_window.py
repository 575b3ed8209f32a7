"""The one definition of what a local head sees, against a token-by-token simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkv import RLKVError, Window

windows = st.builds(Window, st.integers(0, 6), st.integers(1, 7))


def simulate(window: Window, length: int) -> list[list[int]]:
    """Positions kept while tokens arrive one by one: the first ``sink`` and the newest ``recent``."""
    first, newest, seen = [], [], []
    for position in range(length):
        if len(first) < window.sink:
            first.append(position)
        newest = [*newest, position][-window.recent :]
        seen.append(sorted({*first, *newest}))
    return seen


@given(windows, st.integers(1, 40))
def test_sees_is_what_a_streaming_head_keeps(window: Window, length: int) -> None:
    positions = torch.arange(length)
    visible = window.sees(positions[:, None], positions[None, :])
    assert [row.nonzero().flatten().tolist() for row in visible] == simulate(window, length)


@given(windows, st.integers(0, 40))
def test_held_bounds_what_a_head_keeps(window: Window, length: int) -> None:
    assert window.held(length) == min(length, window.sink + window.recent) <= window.size
    if length:
        assert len(simulate(window, length)[-1]) <= window.held(length)


def test_recent_counts_the_query_itself() -> None:
    position = torch.arange(200)
    assert int(Window(16, 64).sees(torch.tensor(199), position).sum()) == 80
    assert Window(0, 1).sees(torch.tensor(7), position).nonzero().tolist() == [[7]]


@given(windows, st.integers(1, 60))
def test_ring_slots_hold_exactly_the_visible_tokens(window: Window, length: int) -> None:
    ring = [-1] * window.size
    for position, slot in enumerate(window.slot(torch.arange(length)).tolist()):
        ring[slot] = position
        stored = torch.tensor([entry for entry in ring if entry >= 0])
        visible = stored[window.sees(torch.tensor(position), stored)]
        assert sorted(visible.tolist()) == simulate(window, length)[position]
        assert window.held_positions(torch.tensor([position])).tolist() == ring
    assert (window.held_positions(torch.tensor([[-1], [-5]])) == -1).all()  # nothing yet, and padding


@given(windows)
def test_text_round_trip(window: Window) -> None:
    assert Window.parse(str(window)) == window


@pytest.mark.parametrize("text", ["16", "16+", "a+b", "1+2+3", ""])
def test_bad_text(text: str) -> None:
    with pytest.raises(RLKVError, match="SINK\\+RECENT"):
        Window.parse(text)


def test_bad_sizes() -> None:
    with pytest.raises(RLKVError, match="recent must be 1 or more, got 0"):
        Window(4, 0)
    with pytest.raises(RLKVError, match="sink must be 0 or more, got -1"):
        Window(-1, 4)
    assert Window(0, 3).size == 3
