"""One SGLang engine, stock or with a head mask, and the works that it is measured on; equal KV bytes.

    python benchmarks/serve_sglang.py arm=stock works=bound kv_gib=15 out=runs/serve/stock.json
    python benchmarks/serve_sglang.py arm=rlkv gates=GATES sparsity=0.5 works=bound kv_gib=15
    python benchmarks/serve_sglang.py arm=rlkv works=load rate=4 prompt=256 output=2048 requests=400 ...

Equal work: random prompts, `ignore_eos`, as many new tokens in every arm; random weights of an 8B Llama
unless a model is named. serve_work.py tells the works. With `listen=true` their names come from stdin, so
that serve_compare.py can take turns between engines; scripts/bench_efficiency.sh runs it, prints the table.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from serve_profile import profile
from serve_work import Work, adjusted, measure

from rlkv.config import load
from rlkv.files import write_atomically
from rlkv.serving.plan import Plan
from rlkv.support import ModelShape

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@dataclass
class Config:
    """One arm; lengths in tokens."""

    arm: Literal["stock", "rlkv"] = "stock"
    works: str = "alone,ample"  # names of serve_work.py by commas, or profile
    listen: bool = False  # take the names from stdin instead, a line each
    model: str = ""  # hub id or folder (empty: a Llama of 8B with random weights)
    gates: str = ""  # of the arm rlkv
    sparsity: float = 0.5
    window: str = "16+64"
    prefill: Literal["full", "local"] = "full"
    backend: str = ""  # SGLang's attention backend, in both arms (empty: SGLang's choice, fa3 on Hopper)
    kv_gib: float = 0.0  # memory for keys and values, windows included (0: all that there is)
    prompt: str = ""  # of all works, instead of their own; so are the next four
    output: str = ""
    requests: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    running: int = 0  # windows of the arm rlkv (0: as many as fit at the works' lengths); stock has no limit
    context: int = 16384
    chunk: int = 8192  # of prefill (-1: prompts in one piece)
    graphs: str = "1,2,4,8,16,24,32,40,48,56,64,72"  # batch sizes with a CUDA graph
    prefill_graphs: bool = True  # of the stock arm; a head mask has none
    memory: float = 0.88  # SGLang's mem_fraction_static
    out: str = ""  # JSON
    log: str = "info"

    def work(self, name: str) -> Work:
        fields = ("prompt", "output", "requests", "rate", "seconds")
        return adjusted(name, {field: getattr(self, field) for field in fields})

    @property
    def planned(self) -> list[Work]:
        return [self.work(name) for name in self.works.split(",") if name != "profile"]


def main() -> None:
    """Start the engine, warm it up, and do one work after the other."""
    config = load(Config, None, sys.argv[1:])
    engine = start(config)
    tokens = engine.get_server_info()["max_total_num_tokens"]
    warm = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 8}
    engine.generate(input_ids=[[11] * 16] * 4, sampling_params=warm)
    print("READY", flush=True)
    results: list[dict[str, Any]] = []
    for name in heard() if config.listen else config.works.split(","):
        found = profile(engine) if name == "profile" else measure(engine, config.work(name), tokens)
        results.append({"work": name, **found})
        print("RESULT", json.dumps(results[-1]), flush=True)
        if config.out:
            figures = {"config": asdict(config), **surroundings(engine), "results": results}
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(config.out), json.dumps(figures, indent=2) + "\n")
    engine.shutdown()


def heard() -> Iterator[str]:
    """Works asked for on stdin, until it ends."""
    while line := sys.stdin.readline():
        yield line.strip()


def surroundings(engine: Any) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    server = engine.get_server_info()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("sglang", "torch")},
        "backend": server.get("attention_backend"),
        "kv_tokens": server["max_total_num_tokens"],
        "kv_gib_allocated": float(server["internal_states"][0]["memory_usage"]["kvcache"]),
    }


def start(config: Config) -> Any:
    """The engine of an arm; the arm rlkv gets as many tokens as fit into the stock arm's bytes."""
    options: dict[str, Any] = {}
    stock_tokens = int(config.kv_gib * 2**30) // plan_of(config).stock_token_bytes if config.kv_gib else None
    if config.arm == "rlkv":
        longest = max(work.longest_prompt for work in config.planned)
        os.environ.update(
            RLKV_GATES=config.gates,
            RLKV_SPARSITY=str(config.sparsity),
            RLKV_WINDOW=config.window,
            RLKV_PREFILL=config.prefill,
            RLKV_PROMPT_TOKENS=str(longest + 1),
            RLKV_BACKEND=config.backend,
        )
        options["attention_backend"] = "rlkv"
        plan = plan_of(config)
        if stock_tokens and plan.compresses:
            budget = stock_tokens * plan.stock_token_bytes
            staging = longest + 1 if config.prefill == "full" and config.chunk > 0 else 0
            length = int(min(work.resident for work in config.planned))
            running = config.running or plan.requests_for(budget, length, staging)
            options["max_total_tokens"] = plan.capacity(budget, running, staging).tokens
            options["max_running_requests"] = running
        else:
            options["max_total_tokens"] = stock_tokens
    else:
        options["max_total_tokens"] = stock_tokens
        if config.backend:
            options["attention_backend"] = config.backend
    if not config.prefill_graphs:
        options["disable_prefill_cuda_graph"] = True
    if config.graphs:
        options["cuda_graph_bs_decode"] = [int(size) for size in config.graphs.split(",")]
    if not torch_has_cuda():  # for trying this script out
        options |= {"device": "cpu"}
    import sglang

    return sglang.Engine(
        model_path=config.model or random_llama(),
        load_format="auto" if config.model else "dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        disable_radix_cache=True,
        sampling_backend="pytorch",
        grammar_backend="none",
        mem_fraction_static=config.memory,
        context_length=config.context,
        chunked_prefill_size=config.chunk,
        random_seed=0,
        log_level=config.log,
        **options,
    )


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def plan_of(config: Config) -> Plan:
    """The plan of the arm rlkv, for its byte counts."""
    from rlkv_sglang.settings import Settings

    shape = ModelShape(32, 32, 8, 128, "llama", context_length=config.context)
    if config.model:
        from rlkv.loading import load_shape

        shape = load_shape(config.model)
    if config.arm == "stock" and not config.gates:
        from rlkv.mask import HeadMask

        return Plan(HeadMask.random(shape.layers, shape.kv_heads, 0.0), shape, _window(config))
    environment = {"RLKV_GATES": config.gates, "RLKV_SPARSITY": str(config.sparsity)}
    return Settings.read({**environment, "RLKV_WINDOW": config.window}).plan(shape)


def _window(config: Config) -> Any:
    from rlkv.window import Window

    return Window.parse(config.window)


def random_llama() -> str:
    """A folder with a Llama's config and no weights."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / "rlkv-random-llama-8b"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(LLAMA_8B))
    return str(folder)


if __name__ == "__main__":
    main()
