"""What every compared method is: a dataclass that builds a generator for one sparsity, at equal KV bytes.

    method = get_method("random", {"draw": 2})
    generator = method.build(context, sparsity=0.5)
    completions = generator.generate(prompts, SamplingParams(max_new_tokens=8192, temperature=0.0))
    generator.kv_bytes(4096)                           # what a request of 4096 tokens holds at its end

Methods are imported when asked for by name, so this module takes no time and no torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from rlkv.config import build
from rlkv.errors import RLKVError

if TYPE_CHECKING:
    from rlkv.gates import HeadGates
    from rlkv.mask import HeadMask
    from rlkv.sampler import Completion, SamplingParams
    from rlkv.support import ModelShape
    from rlkv.window import Window
    from rlkv_eval.tasks.base import Item

# name -> "module:class" under rlkv_eval.methods; the order is that of tables and figures
METHODS: dict[str, str] = {
    "full": "full:Full",
    "rlkv": "rlkv:RLKV",
    "random": "random_heads:RandomHeads",
    "duo": "duo:DuoAttention",
    "kvzip": "kvzip:KVzip",
    "ablation": "ablation:Ablation",
    "h2o": "eviction.h2o:H2O",
    "rkv": "eviction.rkv:RKV",
    "streaming": "eviction.streaming:Streaming",
    "random_eviction": "eviction.random_eviction:RandomEviction",
}


@dataclass
class Context:
    """What methods may use; lengths in tokens.

    ``prefill`` "full": local heads see the whole prompt and are cut to the window after it (the paper's
    evaluation); "local": they are windowed in the prompt too. ``gates`` are those given to the run (for the
    method rlkv). ``calibration``: development problems, never those that are reported. ``work``: a folder
    where scores that took long to compute are kept.
    """

    model: Any
    tokenizer: Any
    window: Window
    prefill: Literal["full", "local"]
    slots: int
    max_length: int
    seed: int
    gates: HeadGates | None
    calibration: list[Item]
    work: Path
    shared: dict[str, Any] = field(default_factory=dict, repr=False)  # what generators of one run share

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and bytes of the model; RLKVError if its KV heads cannot be split."""
        from rlkv.support import check_model

        return check_model(self.model)


@runtime_checkable
class Generator(Protocol):
    """Writes completions with a compressed cache."""

    @property
    def name(self) -> str:
        """The method's."""

    @property
    def mask(self) -> HeadMask | None:
        """Which heads are full; None for a method that drops tokens in every head."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in prompt order; ``on_finish`` is called as each request finishes."""

    def kv_bytes(self, length: int) -> int:
        """True bytes of keys and values that a request of this many tokens holds at its end."""


@runtime_checkable
class Method(Protocol):
    """A dataclass whose fields are the method's settings. ``title`` is for tables, ``paper`` a link."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def build(self, context: Context, sparsity: float) -> Generator:
        """A generator at this sparsity; RLKVError for a sparsity outside [0, 1] or what else it lacks."""


def get_method(name: str, settings: dict[str, Any] | None = None) -> Method:
    """The method of that name with its defaults, changed by ``settings``; RLKVError for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}"
        raise RLKVError(f"unknown method {name!r}: {hint}")
    module, _, attribute = METHODS[name].partition(":")
    cls = getattr(importlib.import_module(f"rlkv_eval.methods.{module}"), attribute)
    return build(cls, settings or {}, f"{name}.")


def token_budget(length: int, sparsity: float, window: Window) -> int:
    """Tokens that one KV head holds on average after ``length`` tokens, rounded down.

    (1 - s) of the heads hold all, s of them the window: (1 - s) * t + s * min(t, W). A method that drops
    tokens gets this budget in every head, so that all methods hold the same bytes at every length.
    """
    if not 0 <= sparsity <= 1:
        raise RLKVError(f"sparsity must be within [0, 1]; got {sparsity}")
    held = window.held(length)
    return held + int((1 - sparsity) * (length - held) + 1e-9)  # 0.9 * 10 is a hair below 9
