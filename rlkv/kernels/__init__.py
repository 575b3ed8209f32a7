"""Triton kernels for CUDA, never imported at start-up: everything in rlkv works without them.

``decode.py`` is attention over head-split pages for one new token a request; ``mixed.py`` is mixed attention
for training. Both also run in Triton's interpreter on a CPU (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from rlkv.errors import RLKVError

HEAD_DIMS = (16, 32, 64, 128)


@cache
def available() -> bool:
    """Whether Triton is installed and has something to run on: a CUDA device, or its interpreter."""
    if find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or interpreted()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; it is decided when they are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check_device(*tensors: torch.Tensor) -> None:
    """Raise RLKVError unless a kernel can run on these tensors."""
    if not interpreted() and not all(tensor.is_cuda for tensor in tensors):
        raise RLKVError("this kernel needs tensors on a CUDA device; on a CPU set TRITON_INTERPRET=1 before")


def check_head_dim(dim: int) -> None:
    """Raise RLKVError unless the kernels have tiles for heads of ``dim`` numbers."""
    if dim not in HEAD_DIMS:
        raise RLKVError(f"the kernels take head dims {', '.join(map(str, HEAD_DIMS))}; this model has {dim}")
