"""The training kernels in Triton's interpreter, in float32, against the reference attention.

tests/gpu/test_kernels_gpu.py has them compiled: the library kernels for far keys take 16 bits alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernel_kit import DEVICE

from rlkv.attention.reference import mixed_attention as reference
from rlkv.errors import RLKVError
from rlkv.window import Window

pytest.importorskip("triton")
from rlkv.kernels import mixed, rest  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="float32: in the interpreter alone")
SMALL = mixed.Tuning(mixed.Tile(16, 16, 4, 1), mixed.Tile(16, 16, 4, 1), mixed.Tile(16, 16, 4, 1), 32)


def by_sequence(
    states: Sequence[torch.Tensor],
    gates: torch.Tensor,
    lengths: Sequence[int],
    window: Window,
    scaling: float,
) -> torch.Tensor:
    outputs = []
    for row, parts in enumerate(zip(*(part.split(list(lengths)) for part in states), strict=True)):
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        at = torch.arange(query.shape[2], device=query.device)
        full, local = at <= at[:, None], window.sees(at[:, None], at)
        gate = gates if gates.ndim == 1 else gates[row]
        found = reference(query, key, value, gate, full[None, None], local[None, None], scaling)
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def make_states(total: int, group: int, dim: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value of two KV heads, with heads before tokens in memory, and an output gradient."""
    generator = torch.Generator().manual_seed(seed)
    heads = (2 * group, 2, 2)
    states = [torch.randn(count, total, dim, generator=generator).to(DEVICE) for count in heads]
    gradient = torch.randn(total, 2 * group, dim, generator=generator).to(DEVICE)
    return [part.transpose(0, 1).requires_grad_() for part in states], gradient


@pytest.mark.parametrize(
    "lengths, window, group, per_sequence, closed",
    [
        ([70], Window(5, 12), 2, False, ()),
        ([40, 7, 61], Window(4, 16), 2, True, ()),
        ([20, 20], Window(0, 9), 4, False, ()),
        ([30, 50], Window(18, 20), 1, False, (1,)),
        ([12, 9], Window(10, 30), 2, True, ()),
        ([33, 50], Window(3, 7), 1, False, (0, 1)),
        ([45], Window(4, 9), 3, False, ()),
    ],
)
def test_output_and_gradients_match_the_reference(
    lengths: list[int], window: Window, group: int, per_sequence: bool, closed: tuple[int, ...]
) -> None:
    states, gradient = make_states(sum(lengths), group, 16)
    gates = torch.rand(len(lengths), 2, generator=torch.Generator().manual_seed(1))
    gates[:, list(closed)] = 0
    gates = (gates if per_sequence else gates[0]).to(DEVICE).requires_grad_()
    found = mixed.mixed_attention(*states, gates, lengths, window, 0.25, closed=closed, tuning=SMALL)
    wanted = by_sequence(states, gates, lengths, window, 0.25)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    inputs = [*states, gates]
    ours, theirs = (torch.autograd.grad(one, inputs, gradient) for one in (found, wanted))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_closed_and_open_gates_are_one_branch_alone(gate: float) -> None:
    states, _ = make_states(60, 2, 16)
    gates = torch.full((2,), gate, device=DEVICE)
    closed = (0, 1) if gate == 0 else ()
    with torch.no_grad():
        found = mixed.mixed_attention(*states, gates, [60], Window(4, 10), 0.25, closed=closed, tuning=SMALL)
        wanted = by_sequence(states, gates, [60], Window(4, 10), 0.25)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_closed_heads_need_no_far_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the far pass is asked for: open heads only, unless a closed gate wants its gradient."""
    asked: list[tuple[str, int]] = []
    real = {name: getattr(rest.FarPass, name) for name in ("forward", "backward")}
    for name in real:

        def spy(self: rest.FarPass, states: rest.States, *args: object, name: str = name) -> object:
            asked.append((name, states[1].shape[1]))
            return real[name](self, states, *args)

        monkeypatch.setattr(rest.FarPass, name, spy)
    states, gradient = make_states(40, 1, 16)
    for wanted in (False, True):
        gates = torch.tensor([0.0, 0.5], device=DEVICE, requires_grad=wanted)
        output = mixed.mixed_attention(*states, gates, [40], Window(2, 6), 0.25, closed=(0,), tuning=SMALL)
        output.backward(gradient)
    assert asked == [("forward", 1), ("backward", 1), ("forward", 2), ("backward", 1)]


def test_idle_stretches_fill_the_gaps_between_far_parts() -> None:
    window, lengths = Window(128, 256), [3000, 384, 100, 2000, 385, 5000]
    queries, keys = (x.tolist() for x in rest._idle_between(lengths, window))
    steps = zip(queries, keys, queries[1:], keys[1:], strict=False)
    spans = [(q, k, next_q - q, next_k - k) for q, k, next_q, next_k in steps]
    start = 0
    for length in lengths:
        if length > 384:  # queries 384.. see keys 128 .. length - 256, one to one
            spans.remove((start + 384, start + 128, length - 384, length - 384))
        start += length
    assert all(0 <= rows <= rest.GAP and 0 <= columns <= rest.GAP + 128 for _, _, rows, columns in spans)
    assert queries[-1] == sum(lengths) and keys[-1] == sum(lengths) - 256


def test_what_does_not_fit_is_refused() -> None:
    states, _ = make_states(20, 2, 16)
    gates = torch.ones(2, device=DEVICE)
    with pytest.raises(RLKVError, match="add up to 19"):
        mixed.mixed_attention(*states, gates, [19], Window(2, 6), 0.25)
    with pytest.raises(RLKVError, match="gates"):
        mixed.mixed_attention(*states, torch.ones(3, 2, device=DEVICE), [10, 10], Window(2, 6), 0.25)
    with pytest.raises(RLKVError, match="needs a token"):
        mixed.mixed_attention(*states, gates, [20, 0], Window(2, 6), 0.25)
    with pytest.raises(RLKVError, match="head dims"):
        mixed.mixed_attention(*(part[..., :12] for part in states), gates, [20], Window(2, 6), 0.25)
