"""The Triton kernels of local heads against plain PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rlkv.window import Window

CASES = [  # window, full heads, local heads, queries a head, head dim
    (Window(4, 16), 3, 2, 3, 16, torch.float32),
    (Window(16, 64), 1, 4, 4, 128, torch.float32),
    (Window(0, 1), 0, 1, 1, 32, torch.float32),
    (Window(0, 100), 2, 2, 1, 24, torch.float32),
    (Window(3, 5), 1, 3, 17, 16, torch.float32),
    (Window(4, 16), 2, 0, 2, 16, torch.float32),
    (Window(4, 16), 1, 2, 3, 64, torch.float16),  # the interpreter has no bfloat16
]


def compare(device: str) -> None:
    """Run in a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    from rlkv.kernels.ring import decode_step, store_rows
    from rlkv.serving.decode import decode_local
    from rlkv.serving.slots import Slots

    for window, full, local, groups, dim, dtype in CASES:
        generator = torch.Generator().manual_seed(local)
        slots = Slots(window, 5)

        def empty(rows: int, heads: int, dim: int = dim, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.full((rows, heads, dim), torch.nan, dtype=dtype, device=device)

        ring, pool = ([empty(rows, h) for _ in "kv"] for rows, h in ((slots.rows, local), (40, full)))
        request = torch.tensor([3, 0, 5, 1, 0], device=device)
        live = request > 0
        lengths = torch.tensor([1, 1, window.sink + 1, window.size, 1], device=device)
        for step in range(4):
            length = torch.where(live, lengths + 7 * step, 1)  # padding rows have length 1 and row 0
            rows = torch.where(live, torch.arange(5, device=device) + 7 * step + 1, 0)
            states = [
                torch.randn(5, h + 2, dim, generator=generator).to(device, dtype)[:, 1 : h + 1]
                for h in ((full + local) * groups, full + local, full + local)
            ]
            query, key, value = states
            held, filled = slots.held(request, length)
            written = slots.ring(request, length - 1)
            others = held[filled & (held != written[:, None])]
            for tensor in ring:  # what the request wrote before
                tensor[others] = torch.randn(len(others), local, dim, generator=generator).to(device, dtype)
            expected_ring, expected_pool = ([tensor.clone() for tensor in both] for both in (ring, pool))
            new = (key[live], value[live])
            store_rows(*(x[:, full:] for x in new), *expected_ring, written[live])
            store_rows(*(x[:, :full] for x in new), *expected_pool, rows[live])
            for tensor, fresh in zip(expected_pool, new, strict=True):
                assert torch.equal(tensor[rows[live]], fresh[:, :full])
            output = empty(5, (full + local) * groups + 1)
            output_part, scaling = output[:, 1:], dim**-0.5
            gathered = decode_step(
                query, key, value, pool, rows, ring, request, length.int(), window, scaling, output_part
            )
            assert torch.equal(gathered.view(5, -1, dim), query[:, : full * groups])
            for got, wanted in zip(ring, expected_ring, strict=True):
                torch.testing.assert_close(got[window.size :], wanted[window.size :], equal_nan=True)
            for got, wanted in zip(pool, expected_pool, strict=True):
                torch.testing.assert_close(got[1:], wanted[1:], equal_nan=True)
            assert output[:, : full * groups + 1].isnan().all()
            if not local:
                continue
            attended = output[:, full * groups + 1 :]
            expected = decode_local(
                query[live, full * groups :].float(),
                *(p.float() for p in ring),
                held[live],
                filled[live],
                scaling,
            )
            tolerance = 2e-2 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(attended[live].float(), expected, rtol=tolerance, atol=tolerance)
            assert not attended.isnan().any()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_plain_pytorch() -> None:
    if torch.cuda.is_available():
        compare("cuda")
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    compare("cpu")
