"""``rlkv rank``: from gates to the mask to deploy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlkv.bench import Bench, EvalConfig, require
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_shape
from rlkv.mask import HeadMask
from rlkv.rank import Choice, for_budget, for_loss, format_bytes
from rlkv.window import Window

POSITIONAL = "gates"


@dataclass
class Config:
    """What ``rlkv rank`` takes: sparsity, memory or max_loss says how many heads to make local."""

    gates: str  # gates folder or table
    output: str = ""  # mask file (empty: mask-SPARSITY.json beside the gates)
    sparsity: float | None = None  # the fraction of heads to make local
    memory: str | None = None  # or: the KV cache must fit this, such as 8GiB, with length and batch
    max_loss: float | None = None  # or: lose at most this accuracy on a development split (0.02: two points)
    rounding: Literal["global", "layer"] = "global"  # rank over all layers, or keep equally many in each
    tp: int = 1  # keep a multiple of this in each layer, for tensor-parallel serving
    window: Window | None = None  # sink+recent of local heads (none: the one the gates were trained for)
    seed: int = 0  # of the order of equal gates

    # KV bytes, and the memory budget
    length: int = 32768  # tokens of a request
    batch: int = 1  # requests at the same time
    bytes_per_value: int | None = None  # of the cache: 2 for bfloat16 (none: that of the trained model)

    model: str = ""  # hub id, local folder, or pocket (empty: the one that the gates were trained on)

    # Only for max_loss
    data: str = ""  # development problems: hub id, .jsonl path, pocket:TASKS (empty: the pocket's own)
    split: str = "dev"  # of a hub dataset or of the pocket
    n: int = 100  # problems
    prompt_column: str = "prompt"  # column of the user's message
    answer_column: str = "answer"  # column of the gold answer
    prompt_template: str = "{prompt}"  # wraps the prompt column
    reward: str = "auto"  # exact, math or module.path:function (auto: exact for the pocket, else math)
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    max_new_tokens: int = 8192  # of an answer, or what the context leaves if that is less
    slots: int = 64  # answers written at the same time
    device: str = "auto"  # auto, cpu, cuda, ...
    dtype: str = "auto"  # bfloat16 or float32 (auto: bfloat16 on a GPU, float32 on a CPU)

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        for name in ("length", "batch", "bytes_per_value"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RLKVError(f"{name} must be 1 or more, got {value}")


SHARED = [
    "gates",
    "model",
    "data",
    "split",
    "n",
    "prompt_column",
    "answer_column",
    "prompt_template",
    "reward",
]
SHARED += ["prefill", "max_new_tokens", "slots", "window", "device", "dtype", "seed"]


def run(config: Config) -> None:
    """Choose, write the mask, and say what it holds."""
    config.check()
    ways = [name for name in ("sparsity", "memory", "max_loss") if getattr(config, name) is not None]
    if len(ways) != 1:
        given = " and ".join(ways) or "none"
        raise RLKVError(f"rank: give exactly one of sparsity=…, memory=… and max_loss=…; {given} given")
    gates = HeadGates.load(config.gates)
    if config.memory is not None:
        require(config.window or gates.deployed, config.model or gates.model)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("rounding", "tp", "seed", "window")}
    if config.model and config.max_loss is None:
        gates.model = gates.check(load_shape(config.model))
    if config.max_loss is None:  # else said when the problems are answered
        for line in gates.remarks(config.window or gates.deployed):
            print(line)
    if config.sparsity is not None:
        mask = gates.mask(config.sparsity, **options)
        choice = Choice(mask, f"sparsity {mask.sparsity:.3f} (asked for {config.sparsity:g})")
    elif config.memory is not None:
        size = {"length": config.length, "batch": config.batch, "bytes_per_value": config.bytes_per_value}
        choice = for_budget(gates, config.memory, **size, **options)  # type: ignore[arg-type]
    else:
        assert config.max_loss is not None
        bench = Bench(EvalConfig(**{name: getattr(config, name) for name in SHARED}))
        gates.model = bench.shape
        choice = for_loss(gates, accuracy_of(bench), config.max_loss, split=config.split, **options)
    mask = choice.mask
    path = Path(config.output) if config.output else beside(config.gates) / f"mask-{mask.sparsity:.3f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)
    print(choice.sentence)
    print(f"full heads a layer: {' '.join(map(str, mask.per_layer()))}  (of {mask.full.shape[1]})")
    if mask.model is not None and mask.window is not None:
        held = mask.kv_bytes(config.length, config.batch, bytes_per_value=config.bytes_per_value)
        full = mask.full_bytes(config.length, config.batch, bytes_per_value=config.bytes_per_value)
        print(
            f"{config.batch} x {config.length} tokens hold {format_bytes(held)} of KV, {held / full:.1%} of "
            f"the full cache's {format_bytes(full)} (window {mask.window})"
        )
    print(f"written to {path}")


def accuracy_of(bench: Bench) -> Callable[[HeadMask], float]:
    """The mean score of a mask on the development problems."""
    from rlkv.answers import answer_masks

    config = bench.config
    prompts = bench.problems(config.data, config.split, config.n)
    sampler = bench.sampler(prompts)

    def accuracy(mask: HeadMask) -> float:
        print(f"sparsity {mask.sparsity:.3f} on {len(prompts)} problems of {config.split}")
        with tempfile.TemporaryDirectory() as folder:
            rows = answer_masks(
                Path(folder) / "rows.jsonl",
                sampler,
                bench.tokenizer,
                prompts,
                {"mask": mask.gates()},
                bench.reward,
                max_new_tokens=config.max_new_tokens,
            )["mask"]
        return sum(row.score for row in rows) / len(rows)

    return accuracy


def beside(gates: str) -> Path:
    """The folder of a gates folder or table."""
    return Path(gates) if Path(gates).is_dir() else Path(gates).parent
