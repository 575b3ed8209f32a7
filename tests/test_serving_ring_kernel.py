"""The Triton kernels of local heads against plain PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rlkv.window import Window

CASES = [
    (Window(4, 16), 2, 3, 16, torch.float32),
    (Window(16, 64), 4, 4, 128, torch.float32),
    (Window(0, 1), 1, 1, 32, torch.float32),
    (Window(0, 100), 2, 1, 24, torch.float32),
    (Window(3, 5), 3, 17, 16, torch.float32),
    (Window(4, 16), 2, 3, 64, torch.float16),  # the interpreter has no bfloat16
]


def compare(device: str) -> None:
    """Run in a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    from rlkv.kernels.ring import ring_decode, store_rows
    from rlkv.serving.decode import decode_local
    from rlkv.serving.slots import Slots

    for window, heads, groups, dim, dtype in CASES:
        generator = torch.Generator().manual_seed(heads)
        slots = Slots(window, 5)
        pool = [torch.full((slots.rows, heads, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        request = torch.tensor([3, 0, 5, 1, 0], device=device)
        lengths = torch.tensor([1, 1, window.sink + 1, window.size, 1], device=device)
        for step in range(4):
            length = torch.where(request > 0, lengths + 7 * step, 1)  # padding rows have length 1
            states = [
                torch.randn(5, h + 2, dim, generator=generator).to(device, dtype)[:, 1 : h + 1]
                for h in (heads * groups, heads, heads)
            ]
            query, key, value = states
            rows, filled = slots.held(request, length)
            written = slots.ring(request, length - 1)
            others = rows[filled & (rows != written[:, None])]
            for tensor in pool:  # what the request wrote before
                tensor[others] = torch.randn(len(others), heads, dim, generator=generator).to(device, dtype)
            expected_pool = [tensor.clone() for tensor in pool]
            store_rows(key[request > 0], value[request > 0], *expected_pool, written[request > 0])
            for tensor, new in zip(expected_pool, (key, value), strict=True):
                assert torch.equal(tensor[written[request > 0]], new[request > 0])
            output = torch.full((5, heads * groups + 1, dim), torch.nan, dtype=dtype, device=device)
            ring_decode(query, key, value, *pool, request, length.int(), window, dim**-0.5, output[:, 1:])
            live = request > 0
            for got, wanted in zip(pool, expected_pool, strict=True):
                torch.testing.assert_close(got[window.size :], wanted[window.size :], equal_nan=True)
            expected = decode_local(
                query[live].float(), *(p.float() for p in pool), rows[live], filled[live], dim**-0.5
            )
            tolerance = 2e-2 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(output[live, 1:].float(), expected, rtol=tolerance, atol=tolerance)
            assert output[:, 0].isnan().all()
            assert not output[:, 1:].isnan().any()


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
