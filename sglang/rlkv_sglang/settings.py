"""What to serve with: environment variables RLKV_*, or a JSON file that RLKV_CONFIG names, or both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rlkv.config import build
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.serving.plan import Plan
from rlkv.support import ModelShape
from rlkv.window import Window

PREFIX = "RLKV_"
MEAN_LENGTH = 2048


@dataclass
class Settings:
    """Each is an environment variable in capitals with RLKV_ in front, or a key of the JSON file."""

    gates: str = ""  # gates folder or table, cut at sparsity
    mask: str = ""  # a mask file of `rlkv rank`, instead of gates and sparsity
    sparsity: float = 0.5  # fraction of heads made local
    seed: int = 0  # of the order of equal gates
    window: Window | None = None  # sink+recent of local heads (none: the one of the gates or mask)
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    mode: Literal["mask", "mixed"] = "mask"  # mixed: soft gates on an ordinary cache, for RL rollouts
    backend: str = ""  # SGLang's attention for full heads: fa3, triton or torch_native (empty: by machine)
    prompt_tokens: int = 0  # longest prompt with prefill full (0: 16384, or the context if that is less)
    mean_length: int = MEAN_LENGTH  # expected tokens of a request; sizes its share if requests aren't capped
    poison: bool = False  # debugging: fill freed memory with NaN

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The JSON file's values, overridden by the environment's; RLKVError for an unknown one."""
        tree: dict[str, Any] = {}
        path = environment.get(f"{PREFIX}CONFIG")
        if path:
            try:
                tree = json.loads(Path(path).read_text())
            except (OSError, ValueError) as error:
                raise RLKVError(f"{PREFIX}CONFIG={path}: {error}") from None
            if not isinstance(tree, dict):
                raise RLKVError(f"{PREFIX}CONFIG={path}: expected a JSON object")
        for field in fields(cls):
            value = environment.get(PREFIX + field.name.upper())
            if value is not None:
                tree[field.name] = value
        settings = build(cls, tree)
        if bool(settings.gates) == bool(settings.mask):
            raise RLKVError(
                f"attention backend rlkv: set either {PREFIX}GATES (and {PREFIX}SPARSITY) or {PREFIX}MASK"
            )
        return settings

    @property
    def idle(self) -> bool:
        """Whether no head is made local, so that the engine can stay as it is."""
        if self.mode == "mixed":
            return False
        return self.sparsity == 0 if self.gates else bool(HeadMask.load(self.mask).full.all())

    def head_gates(self, shape: ModelShape) -> HeadGates:
        return HeadGates.load(self.gates, model=shape)

    def plan(self, shape: ModelShape, tp: int = 1, bytes_per_value: int = 2) -> Plan:
        """The plan for a model of ``shape`` on ``tp`` ranks; RLKVError when gates, mask, model don't fit."""
        if self.gates:
            gates = self.head_gates(shape)
            mask = gates.mask(self.sparsity, seed=self.seed, tp=tp, window=self.window or gates.deployed)
        else:
            mask = HeadMask.load(self.mask)
        window = self.window or mask.window
        if window is None:
            if not mask.full.all():
                raise RLKVError(f"the gates record no window: set {PREFIX}WINDOW=16+64, say")
            window = Window(0, 1)
        return Plan(mask, shape, window, self.prefill, tp, bytes_per_value)
