"""Throughput and latency of SGLang with a head mask against stock SGLang: one arm a run, equal KV bytes.

    python benchmarks/serve_sglang.py arm=stock kv_gib=15 out=runs/serve/stock.json
    python benchmarks/serve_sglang.py arm=rlkv gates=GATES sparsity=0.5 kv_gib=15

Equal work: random prompts of one length, `ignore_eos`, a fixed number of new tokens; random weights of an 8B
Llama unless a model is named. `rate` 0 submits everything at once, else requests arrive by a Poisson process
and latencies are measured while streaming. scripts/bench_efficiency.sh runs the arms and prints the table.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
    model: str = ""  # hub id or folder (empty: a Llama of 8B with random weights)
    gates: str = ""  # of the arm rlkv
    sparsity: float = 0.5
    window: str = "16+64"
    prefill: Literal["full", "local"] = "full"
    backend: str = ""  # SGLang's attention backend, in both arms (empty: SGLang's choice, fa3 on Hopper)
    kv_gib: float = 0.0  # memory for keys and values, windows included (0: all that there is)
    prompt: int = 3584
    output: int = 1024
    requests: int = 48
    running: int = 0  # most requests at once (0: SGLang's default)
    rate: float = 0.0  # requests a second (0: all at once)
    context: int = 8192
    chunk: int = 8192  # of prefill
    graphs: str = ""  # batch sizes with a CUDA graph, by commas (empty: SGLang's)
    seed: int = 0
    prefill_graphs: bool = True  # of the stock arm; a head mask has none
    wait_for: str = ""  # a file: measure when it appears, and say READY before
    out: str = ""  # JSON
    log: str = "info"


def main() -> None:
    """Start the engine, warm it up, measure, write the figures."""
    config = load(Config, None, sys.argv[1:])
    engine = start(config)
    if config.wait_for:
        print("READY", flush=True)
        while not Path(config.wait_for).exists():
            time.sleep(0.1)
    figures = {**asdict(config), **measure(engine, config)}
    print("RESULT", json.dumps(figures), flush=True)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.out), json.dumps(figures, indent=2) + "\n")
    engine.shutdown()


def start(config: Config) -> Any:
    """The engine of an arm; the arm rlkv gets as many tokens as fit into the stock arm's bytes."""
    options: dict[str, Any] = {}
    stock_tokens = int(config.kv_gib * 2**30) // plan_of(config).stock_token_bytes if config.kv_gib else None
    if config.arm == "rlkv":
        os.environ.update(
            RLKV_GATES=config.gates,
            RLKV_SPARSITY=str(config.sparsity),
            RLKV_WINDOW=config.window,
            RLKV_PREFILL=config.prefill,
            RLKV_PROMPT_TOKENS=str(config.prompt + 1),
            RLKV_BACKEND=config.backend,
        )
        options["attention_backend"] = "rlkv"
        if stock_tokens:
            plan, running = plan_of(config), config.running
            budget = stock_tokens * plan.stock_token_bytes
            staging = config.prompt + 1 if config.prefill == "full" else 0
            running = running or plan.requests_for(budget, config.prompt + config.output // 2, staging)
            options["max_total_tokens"] = plan.capacity(budget, running, staging).tokens
            options["max_running_requests"] = running
    else:
        options["max_total_tokens"] = stock_tokens
        if config.backend:
            options["attention_backend"] = config.backend
    if config.running:
        options["max_running_requests"] = config.running
    if not config.prefill_graphs:
        options["disable_prefill_cuda_graph"] = True
    if config.graphs:
        options["cuda_graph_bs_decode"] = [int(size) for size in config.graphs.split(",")]
    import sglang

    return sglang.Engine(
        model_path=config.model or random_llama(),
        load_format="auto" if config.model else "dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        disable_radix_cache=True,
        sampling_backend="pytorch",
        grammar_backend="none",
        mem_fraction_static=0.88,
        context_length=config.context,
        chunked_prefill_size=config.chunk,
        random_seed=0,
        log_level=config.log,
        **options,
    )


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


def prompts(config: Config) -> list[list[int]]:
    """Random tokens; both arms get the same."""
    draw = random.Random(config.seed)
    return [[draw.randrange(10, 30000) for _ in range(config.prompt)] for _ in range(config.requests)]


def measure(engine: Any, config: Config) -> dict[str, Any]:
    """Tokens a second, latencies, and one request alone."""
    sampling = {"temperature": 0.0, "ignore_eos": True}
    work = prompts(config)
    engine.generate(input_ids=work[:4], sampling_params={**sampling, "max_new_tokens": 8})  # warm-up
    figures: dict[str, Any] = {"alone": alone(engine, work[0][:128], sampling)}
    sampling["max_new_tokens"] = config.output
    began = time.perf_counter()
    if config.rate:
        figures |= asyncio.get_event_loop().run_until_complete(_open_loop(engine, work, sampling, config))
    else:
        answers = engine.generate(input_ids=work, sampling_params=sampling)
        new = [answer["meta_info"]["completion_tokens"] for answer in answers]
        assert new == [config.output] * len(work), "unequal work"
    seconds = time.perf_counter() - began
    server = engine.get_server_info()
    return figures | {
        "seconds": seconds,
        "output_tokens_per_second": config.requests * config.output / seconds,
        "kv_tokens": server.get("max_total_num_tokens"),
        "kv_gib_allocated": float(server["internal_states"][0]["memory_usage"]["kvcache"]),
    }


def alone(engine: Any, prompt: list[int], sampling: dict[str, Any]) -> float:
    """Output tokens a second of one request at a time: the difference of a long and a short answer."""
    seconds = []
    for new in (16, 272):
        began = time.perf_counter()
        engine.generate(input_ids=[prompt], sampling_params={**sampling, "max_new_tokens": new})
        seconds.append(time.perf_counter() - began)
    return 256 / (seconds[1] - seconds[0])


async def _open_loop(
    engine: Any, work: list[list[int]], sampling: dict[str, Any], config: Config
) -> dict[str, Any]:
    """Poisson arrivals; time to the first token, and between tokens, as the client sees them."""
    draw = random.Random(config.seed + 1)
    first: list[float] = []
    gaps: list[float] = []

    async def one(prompt: list[int]) -> None:
        sent = last = time.perf_counter()
        seen = 0
        stream = await engine.async_generate(input_ids=prompt, sampling_params=sampling, stream=True)
        async for chunk in stream:
            now, count = time.perf_counter(), chunk["meta_info"]["completion_tokens"]
            if seen == 0:
                first.append(now - sent)
            elif count > seen:
                gaps.extend([(now - last) / (count - seen)] * (count - seen))
            seen, last = count, now

    tasks = []
    for prompt in work:
        tasks.append(asyncio.create_task(one(prompt)))
        await asyncio.sleep(draw.expovariate(config.rate))
    await asyncio.gather(*tasks)
    return {
        "ttft_ms": {"p50": _percentile(first, 50), "p99": _percentile(first, 99)},
        "itl_ms": {"p50": _percentile(gaps, 50), "p99": _percentile(gaps, 99)},
    }


def _percentile(seconds: list[float], which: int) -> float:
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[which - 1]


if __name__ == "__main__":
    main()
