"""Mixed attention of training, forward and backward, beside the fastest full causal attention in PyTorch.

    python benchmarks/mixed_attention.py --json mixed.json

Correctness first (random ragged packings against float32, beside PyTorch's own bf16 error), then times in
milliseconds. "full" columns are plain causal attention; "x full" is our time over cuDNN's; "two passes" is
cuDNN's full attention plus local attention by PyTorch's fused kernel in query blocks, mixed afterwards.
"limit" is the time of causal attention's floating-point operations (mixed attention needs no more) at the
rate of a large bf16 matrix product, measured in the same run; TFLOP/s counts the same operations. Parts are
timed alone: the far keys by cuDNN, then our kernels. About 40 s; --flex compiles FlexAttention too (2 min in
all).

In training every head is mixed until its gate reaches exactly 0; then its far keys are left out of the
backward pass. "half closed" has half of the gates at 0, "x open" is its time over that of none. The values of
other gates change no time, so --gates takes from its table only how many gates of each layer are 0 (authors'
tables are clipped), and "gates" is the mean time of its layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import card, need_cuda, print_table, time_calls, write_json
from mixed_check import check, make_inputs, per_sequence
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlkv.attention.chunked import mixed_chunked
from rlkv.gates import HeadGates
from rlkv.kernels import mixed
from rlkv.window import Window

CASES = {"8192": [8192], "4x2048": [2048] * 4, "ragged": [3000, 700, 2000, 2492], "short": [300] * 24}


def matmul_rate() -> float:
    """FLOP/s of a large bf16 matrix product."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / time_calls(lambda: left @ right)


def flops(lengths: Sequence[int], heads: int, dim: int) -> float:
    """Of causal attention, forward and backward (2 + 5 products); mixed attention needs no more."""
    return sum(7 * 2 * dim * heads * n * (n + 1) / 2 for n in lengths)


def full_times(
    inputs: Sequence[torch.Tensor], lengths: Sequence[int], backend: SDPBackend
) -> tuple[float, float]:
    """Seconds of plain causal attention (forward, forward + backward); NaN when lengths differ."""
    if len(set(lengths)) > 1:
        return float("nan"), float("nan")
    query, key, value = (part.unflatten(0, (len(lengths), -1)).transpose(1, 2) for part in inputs[:3])
    gradient = torch.randn_like(query)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with sdpa_kernel(backend):
        return time_calls(forward), time_calls(lambda: torch.autograd.grad(forward(), inputs[:3], gradient))


def parts(
    inputs: Sequence[torch.Tensor], lengths: Sequence[int], window: Window, tuning: Any
) -> dict[str, float]:
    """Milliseconds of each part alone."""
    states, gates = tuple(part.detach() for part in inputs[:3]), inputs[3].detach()
    heads, dim = states[1].shape[1:]
    plan = mixed.make_plan(tuple(lengths), window, states[0].shape[1] // heads, states[0].device, tuning)
    scaling, gradient = dim**-0.5, torch.randn_like(states[0])
    open_heads = mixed._open_heads(plan, heads, ())
    result: dict[str, float] = {}
    far, grads = None, None
    if open_heads:
        far = plan.far.forward(states, scaling)
        result["far fwd"] = time_calls(lambda: plan.far.forward(states, scaling)) * 1e3
    _, saved = mixed._forward(states, gates, plan, far, open_heads, scaling, True, tuning)
    near = time_calls(lambda: mixed._forward(states, gates, plan, far, open_heads, scaling, True, tuning))
    if far is not None:

        def far_backward() -> Any:
            return plan.far.backward(states, gradient, saved[0], far.context, scaling)

        grads = far_backward()
        result["far bwd"] = time_calls(far_backward) * 1e3
    back = time_calls(
        lambda: mixed._backward(states, gates, gradient, saved, plan, grads, open_heads, scaling, tuning)
    )
    return {**result, "near fwd": near * 1e3, "near bwd": back * 1e3}


def our_seconds(
    inputs: Sequence[torch.Tensor], lengths: Sequence[int], window: Window, tuning: Any, closed: int = 0
) -> tuple[float, float]:
    """Seconds of the forward pass and of both, with the first ``closed`` gates exactly 0."""
    query, key, value, gates = inputs
    gates = gates.detach().clone()
    gates[:closed] = 0
    states, gradient = (query, key, value, gates.requires_grad_()), torch.randn_like(query)
    scaling, heads = query.shape[-1] ** -0.5, tuple(range(closed))

    def forward() -> torch.Tensor:
        return mixed.mixed_attention(*states, lengths, window, scaling, closed=heads, tuning=tuning)

    return time_calls(forward), time_calls(lambda: torch.autograd.grad(forward(), states, gradient))


def measure(
    name: str, window: Window, heads: tuple[int, int], dim: int, tuning: Any, rate: float, closed: list[int]
) -> dict[str, Any]:
    """Of one case, in milliseconds; ``closed``: how many gates of each layer of a table are 0, or nothing."""
    lengths = CASES[name]
    inputs = make_inputs(lengths, heads, dim)
    alone, both = our_seconds(inputs, lengths, window, tuning)
    work = flops(lengths, heads[0], dim)
    row: dict[str, Any] = {"case": name, "fwd": alone * 1e3, "fwd+bwd": both * 1e3}
    row |= {"limit": work / rate * 1e3, "TFLOP/s": work / both / 1e12, "% limit": 100 * work / both / rate}
    half = our_seconds(inputs, lengths, window, tuning, heads[1] // 2)[1]
    row["half closed"], row["x open"] = half * 1e3, half / both
    if closed:
        times = {count: our_seconds(inputs, lengths, window, tuning, count)[1] for count in set(closed)}
        row["gates"] = 1e3 * sum(times[count] for count in closed) / len(closed)
    cudnn = full_times(inputs, lengths, SDPBackend.CUDNN_ATTENTION)
    row["cudnn full fwd"], row["cudnn full"] = (seconds * 1e3 for seconds in cudnn)
    row["x full"] = both / cudnn[1]
    row["flash full"] = full_times(inputs, lengths, SDPBackend.FLASH_ATTENTION)[1] * 1e3
    gradient = torch.randn_like(inputs[0])

    def two_passes() -> Any:
        output = per_sequence(lambda *x: mixed_chunked(*x, window, dim**-0.5), inputs, lengths)
        return torch.autograd.grad(output, inputs, gradient)

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        row["two passes"] = time_calls(two_passes, rounds=5) * 1e3
    return row


def flex_times(lengths: Sequence[int], window: Window, heads: tuple[int, int], dim: int) -> dict[str, float]:
    """Milliseconds, forward + backward, of compiled FlexAttention: full causal, and the window alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inputs = make_inputs(lengths, heads, dim)
    total = sum(lengths)
    ends = torch.tensor(list(accumulate(lengths)), device="cuda")
    doc = torch.searchsorted(ends, torch.arange(total, device="cuda"), right=True)
    start = F.pad(ends, (1, 0))[doc]

    def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (doc[query] == doc[key]) & (key <= query)

    def local(batch: Any, head: Any, query: Any, key: Any) -> Any:
        near = (key - start[query] < window.sink) | (query - key < window.recent)
        return causal(batch, head, query, key) & near

    compiled = torch.compile(flex_attention)
    states = [part.transpose(0, 1)[None] for part in inputs[:3]]
    gradient = torch.randn_like(states[0])
    result = {}
    for name, visible in (("flex full", causal), ("flex local", local)):
        blocks = create_block_mask(visible, None, None, total, total, device="cuda", _compile=True)

        def both(blocks: Any = blocks) -> Any:
            output = compiled(*states, block_mask=blocks, enable_gqa=True)
            return torch.autograd.grad(output, inputs[:3], gradient)

        result[name] = time_calls(both) * 1e3
    return result


def parse_tile(text: str) -> mixed.Tile:
    return mixed.Tile(*(int(part) for part in text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gates", help="a gates folder or table: how many gates of each layer are exactly 0")
    parser.add_argument("--window", default="128+256")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="query heads, KV heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    for name in ("forward", "queries", "keys"):
        parser.add_argument(f"--{name}", type=parse_tile, help="tile of this kernel: rows,keys,warps,stages")
    parser.add_argument("--flex", action="store_true", help="time compiled FlexAttention too")
    parser.add_argument("--json")
    args = parser.parse_args()
    need_cuda()
    torch.manual_seed(0)
    chosen = {name: getattr(args, name) for name in ("forward", "queries", "keys") if getattr(args, name)}
    tuning, heads, window = replace(mixed.DEFAULT, **chosen), tuple(args.heads), Window.parse(args.window)
    errors = check(heads, args.dim, tuning)
    closed = (HeadGates.load(args.gates).values == 0).sum(1).tolist() if args.gates else []
    rate = matmul_rate()
    print(
        f"{card()}, bf16 matrix product {rate / 1e12:.0f} TFLOP/s, window {window}, heads {heads}, "
        f"dim {args.dim}"
    )
    rows, pieces = [], []
    for name in args.case:
        row = measure(name, window, heads, args.dim, tuning, rate, closed)
        if args.flex:
            row |= flex_times(CASES[name], window, heads, args.dim)
        rows.append(row)
        inputs = make_inputs(CASES[name], heads, args.dim)
        pieces.append({"case": name, **parts(inputs, CASES[name], window, tuning)})
    print("milliseconds:")
    print_table(rows)
    for piece in pieces:
        print({key: value if isinstance(value, str) else round(value, 3) for key, value in piece.items()})
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # no NaN
    result = {"window": str(window), "heads": heads, "dim": args.dim, "matmul": rate, "errors": errors}
    result |= {"gates closed by layer": closed, "rows": rows, "parts": pieces}
    write_json(args.json, {**card(), **result})


if __name__ == "__main__":
    main()
