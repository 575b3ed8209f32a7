"""The settings of ``rlkv-eval run``, and which shard of the work a process does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlkv.errors import RLKVError
from rlkv.window import Window


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``; written "0/2"."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "i/n"; RLKVError unless 0 <= i < n."""
        first, _, second = text.partition("/")
        if not (first.strip().isdigit() and second.strip().isdigit() and int(first) < int(second)):
            raise RLKVError(f"a shard is i/n with i from 0 to n - 1, such as 0/2 and 1/2; got {text!r}")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        """Where its runs lie, below the output."""
        return f"shard-{self.index}-of-{self.count}"


@dataclass
class RunConfig:
    """What ``rlkv-eval run`` takes; lengths are in tokens."""

    # What
    model: str = ""  # hub id, local folder, or pocket (empty: the one that the gates were trained on)
    tasks: list[str] = field(default_factory=list)  # such as math500,aime24, or jsonl:PATH
    methods: list[str] = field(default_factory=lambda: ["full", "rlkv"])  # such as full,rlkv,random,duo,h2o
    sparsities: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8])  # of every method but full
    gates: str = ""  # gates folder or table, for the method rlkv
    options: dict[str, Any] = field(default_factory=dict)  # of methods: options.duo.gates=PATH, say
    draws: int = 4  # random masks at each sparsity, for methods that draw them
    noise_floor: bool = False  # run the full cache a second time, in another order
    output: str = "runs/benchmark"  # folder of results; unfinished runs there go on
    data_dir: str | None = None  # folder of the tasks' files (none: the hub)
    n: int = 0  # the first n problems of each task (0: all)

    # Generation
    k: int = 1  # samples a problem
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the most likely tokens of this total probability
    top_k: int = 0  # keep this many most likely tokens (0: all)
    max_new_tokens: int | None = None  # of an answer (none: the task's own limit)
    window: Window | None = None  # sink+recent of local heads (none: the one the gates are meant for)
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    slots: int = 64  # answers written at the same time

    # Calibration, for methods that score heads on development problems
    calibration: str = ""  # task or jsonl:PATH that they come from (empty: the pocket's own; none elsewhere)
    calibration_problems: int = 64  # how many

    # A server instead of a model in this process
    endpoint: str | None = None  # base URL of an OpenAI-compatible server, such as http://localhost:30000/v1
    endpoint_api: Literal["chat", "completions"] = "chat"  # completions: templates and tokens from model=
    endpoint_model: str = ""  # the name the server gives its model (empty: the first that it lists)
    concurrency: int = 64  # requests under way at the same time
    timeout: float = 3600.0  # seconds that one answer may take
    retries: int = 5  # of a request that failed, with growing pauses
    endpoint_key: str = ""  # name of the environment variable with the server's key, if it wants one
    endpoint_extra: dict[str, Any] = field(default_factory=dict)  # more fields of each request's JSON

    # Running
    shard: Shard | None = None  # part i of n of every run, as 0/2; merge them with rlkv-eval merge
    seed: int = 0  # of sampling, drawn masks and ties
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # bfloat16 or float32 (auto: bfloat16 on a GPU, float32 on a CPU)

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        for name in ("k", "slots", "draws", "concurrency", "calibration_problems"):
            if getattr(self, name) < 1:
                raise RLKVError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("n", "retries"):
            if getattr(self, name) < 0:
                raise RLKVError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RLKVError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not self.tasks or not self.methods:
            missing = "methods" if self.tasks else "tasks"
            raise RLKVError(f"no {missing} are named: give tasks=math500,aime24 methods=full,rlkv, say")
        for sparsity in self.sparsities:
            if not 0 <= sparsity <= 1:
                raise RLKVError(f"a sparsity is within [0, 1]; got {sparsity}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise RLKVError("sampling needs temperature >= 0, top_p above 0 and at most 1, top_k >= 0")
        if self.k > 1 and self.temperature == 0:
            raise RLKVError(f"k={self.k} greedy samples are all the same: give temperature=0.6, say, or k=1")
        if self.timeout <= 0:
            raise RLKVError(f"timeout must be above 0 seconds, got {self.timeout}")
        if not self.model and not self.gates and self.endpoint is None:
            raise RLKVError("no model is named: give model=pocket, model=FOLDER or model=HUB_ID")
        if self.endpoint and self.endpoint_api == "completions" and not self.model:
            raise RLKVError(
                "endpoint_api=completions needs model=, whose chat template and tokenizer it uses"
            )
