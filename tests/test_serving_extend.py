"""Attention of local heads over rings and staging, against one dense mask over the whole request."""

from __future__ import annotations

import pytest
import torch

from rlkv.errors import RLKVError
from rlkv.serving.decode import decode_local
from rlkv.serving.extend import Chunk, Extend
from rlkv.serving.slots import Slots, Staging
from rlkv.window import Window

HEADS, GROUPS, DIM = 2, 3, 4


class Requests:
    """Random states of a few requests, and what dense attention makes of them."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.states = [
            [
                torch.randn(n, heads, DIM, dtype=torch.float64, generator=generator)
                for heads in (HEADS * GROUPS, HEADS, HEADS)
            ]
            for n in lengths
        ]

    def dense(self, index: int, window: Window, exempt: int) -> torch.Tensor:
        query, key, value = self.states[index]
        i, j = torch.arange(len(query))[:, None], torch.arange(len(query))
        visible = window.sees(i, j) | ((i < exempt) & (j <= i))
        key, value = (x.repeat_interleave(GROUPS, 1).transpose(0, 1) for x in (key, value))
        scores = (query.transpose(0, 1) @ key.transpose(1, 2)).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1)


def extend(
    slots: Slots, staging: Staging, pool: list[torch.Tensor], requests: Requests, chunks: list[Chunk]
) -> list[torch.Tensor]:
    states = [
        torch.cat([requests.states[c.slot - 1][kind][c.start : c.stop] for c in chunks]) for kind in range(3)
    ]
    output = torch.full_like(states[0], torch.nan)
    Extend(slots, staging, chunks, "cpu").attend(*states, *pool, 1.0, output)
    return list(output.split([c.stop - c.start for c in chunks]))


def empty_pool(slots: Slots) -> list[torch.Tensor]:
    return [torch.full((slots.rows, HEADS, DIM), torch.nan, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("window", [Window(2, 3), Window(0, 1), Window(0, 5), Window(4, 1), Window(3, 200)])
@pytest.mark.parametrize("prefill", ["full", "local"])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_then_steps_equal_dense_attention(window: Window, prefill: str, seed: int) -> None:
    """Prompts in chunks of random sizes, a repeated part after them, and single steps at the end."""
    draw = torch.Generator().manual_seed(100 + seed)
    lengths = torch.randint(2, 300, (3,), generator=draw).tolist()
    requests = Requests(lengths, seed)
    slots, staging = Slots(window, 3, staging=300), Staging(300)
    pool = empty_pool(slots)
    prompts = [max(1, n // 2) if prefill == "full" else 0 for n in lengths]
    done = [0, 0, 0]
    got: list[list[torch.Tensor]] = [[], [], []]
    waiting = [0, 1, 2]
    extended = [max(1, int(n * 0.8)) for n in lengths]  # the rest comes token by token
    while waiting:
        whole = waiting[1:] if int(torch.randint(2, (1,), generator=draw)) else []
        size = int(torch.randint(1, 150, (1,), generator=draw))
        chunks = []
        for index in [*whole, waiting[0]]:  # only the last is cut
            stop = extended[index]
            if index == waiting[0]:
                stop = min(stop, done[index] + size)
            chunks.append(Chunk(f"r{index}", index + 1, done[index], stop, prompts[index]))
        for chunk, output in zip(chunks, extend(slots, staging, pool, requests, chunks), strict=True):
            got[chunk.slot - 1].append(output)
            done[chunk.slot - 1] = chunk.stop
        waiting = [index for index in waiting if done[index] < extended[index]]
    while live := [index for index in range(3) if done[index] < lengths[index]]:
        slot = torch.tensor([index + 1 for index in live] + [0])  # and a padding row
        position = torch.tensor([done[index] for index in live] + [0])
        states = [
            torch.stack([requests.states[index][kind][done[index]] for index in live] + [torch.zeros(h, DIM)])
            for kind, h in enumerate((HEADS * GROUPS, HEADS, HEADS))
        ]
        for tensor, new in zip(pool, states[1:], strict=True):
            tensor[slots.ring(slot, position)] = new
        output = decode_local(states[0], *pool, *slots.held(slot, position + 1), 1.0)
        for row, index in enumerate(live):
            got[index].append(output[row : row + 1])
            done[index] += 1
    for index in range(3):
        expected = requests.dense(index, window, prompts[index])
        torch.testing.assert_close(torch.cat(got[index]), expected, rtol=1e-9, atol=1e-9)


def test_a_chunk_longer_than_the_window_keeps_what_came_before() -> None:
    """The first queries of a chunk see the window of the chunk before, which the same forward overwrites."""
    window = Window(1, 4)
    requests = Requests([20], 0)
    slots, staging = Slots(window, 1), Staging(0)
    pool = empty_pool(slots)
    got = [extend(slots, staging, pool, requests, [Chunk(0, 1, a, a + 10)])[0] for a in (0, 10)]
    torch.testing.assert_close(torch.cat(got), requests.dense(0, window, 0), rtol=1e-9, atol=1e-9)


def test_a_second_prompt_in_chunks_is_refused() -> None:
    slots, staging = Slots(Window(1, 2), 2, staging=50), Staging(50)
    Extend(slots, staging, [Chunk("a", 1, 0, 10, exempt=30)], "cpu")
    Extend(slots, staging, [Chunk("b", 2, 0, 10, exempt=30)], "cpu")  # takes the area over, as after an abort
    with pytest.raises(RLKVError, match="'a' goes on at token 10, but the area holds 10 tokens of 'b'"):
        Extend(slots, staging, [Chunk("a", 1, 10, 20, exempt=30)], "cpu")


def test_a_prompt_longer_than_the_area_is_refused() -> None:
    slots, staging = Slots(Window(1, 2), 1, staging=8), Staging(8)
    with pytest.raises(RLKVError, match="room for 8"):
        Extend(slots, staging, [Chunk("a", 1, 0, 9, exempt=30)], "cpu")
