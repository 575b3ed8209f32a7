"""Mixed attention of training, forward and backward, beside the fastest full causal attention in PyTorch.

    python benchmarks/mixed_attention.py --json mixed.json

Correctness first (random ragged packings against float32, beside PyTorch's own bf16 error), then times in
milliseconds. "full" columns are plain causal attention; "x full" is our time over cuDNN's; "two passes" is
cuDNN's full attention plus local attention by PyTorch's fused kernel in query blocks, mixed afterwards.
"limit" is the time of our floating-point operations at the rate of a large bf16 matrix product, measured in
the same run. Parts are timed alone: the far keys by cuDNN, then our kernels. About 30 s; --flex compiles
FlexAttention too (a minute).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import card, need_cuda, print_table, relative_error, require, time_calls, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlkv.attention.chunked import mixed_chunked
from rlkv.attention.reference import mixed_attention as reference
from rlkv.kernels import mixed
from rlkv.window import Window

NAMES = ("output", "query", "key", "value", "gates")
CASES = {"8192": [8192], "4x2048": [2048] * 4, "ragged": [3000, 700, 2000, 2492], "short": [300] * 24}


def make_inputs(lengths: Sequence[int], heads: tuple[int, int], dim: int) -> list[torch.Tensor]:
    """Query [T, Hq, D], key, value [T, Hkv, D] and gates [Hkv], all wanting gradients."""
    total = sum(lengths)
    shapes = [(total, heads[0], dim), (total, heads[1], dim), (total, heads[1], dim)]
    states = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    return [part.requires_grad_() for part in [*states, torch.rand(heads[1], device="cuda")]]


def per_sequence(
    attend: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], lengths: Sequence[int]
) -> torch.Tensor:
    """``attend(query, key, value, gates)`` in transformers' layout on each sequence; [T, Hq, D]."""
    parts = [part.split(list(lengths)) for part in inputs[:3]]
    found = [
        attend(*(part.transpose(0, 1)[None] for part in row), inputs[3]) for row in zip(*parts, strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in found])


def exact(window: Window, dim: int) -> Callable[..., torch.Tensor]:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        at = torch.arange(query.shape[2], device=query.device)
        full, local = at <= at[:, None], window.sees(at[:, None], at)
        return reference(query, key, value, gates, full[None, None], local[None, None], dim**-0.5)

    return attend


def errors_of(
    lengths: Sequence[int], window: Window, heads: tuple[int, int], dim: int, tuning: Any
) -> dict[str, Any]:
    """Relative errors of output and gradients: ours, and PyTorch's fused attention for both branches."""
    inputs = make_inputs(lengths, heads, dim)
    gradient = torch.randn_like(inputs[0])
    wide = [part.detach().float().requires_grad_() for part in inputs]
    right = per_sequence(exact(window, dim), wide, lengths)
    wanted = [right, *torch.autograd.grad(right, wide, gradient.float())]
    ours = mixed.mixed_attention(*inputs, lengths, window, dim**-0.5, tuning=tuning)
    found = [ours, *torch.autograd.grad(ours, inputs, gradient)]
    theirs = per_sequence(lambda *x: mixed_chunked(*x, window, dim**-0.5), inputs, lengths)
    other = [theirs, *torch.autograd.grad(theirs, inputs, gradient)]
    result: dict[str, Any] = {}
    for name, ours_, theirs_, right_ in zip(NAMES, found, other, wanted, strict=True):
        result[name] = (relative_error(ours_, right_), relative_error(theirs_, right_))
    return result


def check(heads: tuple[int, int], dim: int, tuning: Any) -> list[dict[str, Any]]:
    rows = []
    for lengths, window in (
        ([1500], Window(128, 256)),
        ([777, 777], Window(16, 64)),
        ([900, 60, 1, 1300], Window(64, 100)),
        ([400, 300], Window(128, 256)),
    ):
        errors = errors_of(lengths, window, heads, dim, tuning)
        rows.append({"lengths": "+".join(map(str, lengths)), "window": str(window)})
        rows[-1].update({name: f"{ours:.1e}/{theirs:.1e}" for name, (ours, theirs) in errors.items()})
        for name, (ours, theirs) in errors.items():
            require(ours, min(2e-2, max(1.5 * theirs, 4e-3)), f"{lengths} {window} {name}")
    print("relative errors, ours / PyTorch's bf16:")
    print_table(rows)
    return rows


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


def measure(
    name: str, window: Window, heads: tuple[int, int], dim: int, tuning: Any, rate: float, peers: bool
) -> dict[str, Any]:
    lengths = CASES[name]
    inputs = make_inputs(lengths, heads, dim)
    gradient = torch.randn_like(inputs[0])

    def forward() -> torch.Tensor:
        return mixed.mixed_attention(*inputs, lengths, window, dim**-0.5, tuning=tuning)

    both = time_calls(lambda: torch.autograd.grad(forward(), inputs, gradient))
    row: dict[str, Any] = {"case": name, "fwd": time_calls(forward) * 1e3, "fwd+bwd": both * 1e3}
    row["limit"] = flops(lengths, heads[0], dim) / rate * 1e3
    cudnn = full_times(inputs, lengths, SDPBackend.CUDNN_ATTENTION)
    row["cudnn full fwd"], row["cudnn full"] = (seconds * 1e3 for seconds in cudnn)
    row["x full"] = both / cudnn[1]
    if peers:
        row["flash full"] = full_times(inputs, lengths, SDPBackend.FLASH_ATTENTION)[1] * 1e3

        def two_passes() -> Any:
            output = per_sequence(lambda *x: mixed_chunked(*x, window, dim**-0.5), inputs, lengths)
            return torch.autograd.grad(output, inputs, gradient)

        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            two = time_calls(two_passes, rounds=5)
        row["two passes"] = two * 1e3
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
    rate = matmul_rate()
    print(
        f"{card()}, bf16 matrix product {rate / 1e12:.0f} TFLOP/s, window {window}, heads {heads}, "
        f"dim {args.dim}"
    )
    rows, pieces = [], []
    for name in args.case:
        row = measure(name, window, heads, args.dim, tuning, rate, peers=True)
        if args.flex:
            row |= flex_times(CASES[name], window, heads, args.dim)
        rows.append(row)
        inputs = make_inputs(CASES[name], heads, args.dim)
        pieces.append({"case": name, **parts(inputs, CASES[name], window, tuning)})
    print("milliseconds:")
    print_table(rows)
    for piece in pieces:
        print({key: value if isinstance(value, str) else round(value, 3) for key, value in piece.items()})
    write_json(args.json, {**card(), "matmul": rate, "errors": errors, "rows": rows, "parts": pieces})


if __name__ == "__main__":
    main()
