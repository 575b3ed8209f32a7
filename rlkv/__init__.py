"""RLKV: find the KV heads a reasoning model needs, keep full KV for those, sink + recent tokens for the rest.

    gates = rlkv.HeadGates.load("gates/llama-8b-r1")
    mask = gates.mask(sparsity=0.5)
    mask.kv_bytes(length=32_768)

Names are imported on first use, so that ``import rlkv`` itself takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "HeadGates": "rlkv.gates",
    "HeadMask": "rlkv.mask",
    "HeadwiseCache": "rlkv.cache",
    "Mixed": "rlkv.attention",
    "RLKVError": "rlkv.errors",
    "Sampler": "rlkv.sampler",
    "Window": "rlkv.window",
}
__all__ = ["HeadGates", "HeadMask", "HeadwiseCache", "Mixed", "RLKVError", "Sampler", "Window", "__version__"]

if TYPE_CHECKING:
    from rlkv.attention import Mixed
    from rlkv.cache import HeadwiseCache
    from rlkv.errors import RLKVError
    from rlkv.gates import HeadGates
    from rlkv.mask import HeadMask
    from rlkv.sampler import Sampler
    from rlkv.window import Window


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
