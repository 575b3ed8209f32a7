"""Where to run: on the GPU, or in Triton's interpreter, which is chosen before anything imports Triton.

So on a CPU these tests need a process of their own: tests/test_kernels.py starts it.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
    collect_ignore_glob = ["test_*.py"]
