"""Tokens a second of the sampler on CPU, beside the limits: matrix products alone, and KV reads alone.

PYTHONPATH=. python benchmarks/sampler_cpu.py [--threads 2] [--requests 128] [--hf]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlkv.sampler import Sampler, SamplingParams
from rlkv.window import Window

LAYERS, WIDTH, HEADS, KV_HEADS, DIM, VOCABULARY = 6, 256, 16, 8, 16, 64
NEVER = (VOCABULARY,)  # a stop id outside the vocabulary: every request runs to its length


def random_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=2048,
    )
    return Qwen3ForCausalLM(config).eval()


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def floor(model: Any, slots: int, length: int) -> tuple[float, float]:
    """Seconds of one step's bare matrix products, and of reading one step's keys and values once."""
    inputs = {
        linear: torch.randn(slots, linear.in_features)
        for linear in model.modules()
        if isinstance(linear, torch.nn.Linear)
    }
    with torch.inference_mode():
        products = seconds(lambda: [linear(x) for linear, x in inputs.items()], 20)
    states = torch.randn(LAYERS, 2, slots, KV_HEADS, length, DIM)
    return products, seconds(lambda: states.sum(), 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=400)
    parser.add_argument("--ragged", action="store_true", help="lengths between half and all of --new")
    parser.add_argument("--hf", action="store_true", help="also time transformers' generate (full attention)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = random_model()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(80, 121, (arguments.requests,), generator=generator).tolist()
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    gates = torch.rand(LAYERS, KV_HEADS, generator=generator)
    sampler = Sampler(model, Window(4, 16), slots=arguments.slots, max_length=120 + arguments.new)
    # ragged: the one stop id comes up once in VOCABULARY tokens on average
    params = SamplingParams(max_new_tokens=arguments.new, stop_ids=(0,) if arguments.ragged else NEVER)
    for name, values in (("soft gates", gates), ("full attention", None)):
        sampler.generate(prompts, params, values)
        print(f"{name:32s} {sampler.tokens_per_second:8.0f} tokens/s")
    products, reads = floor(model, arguments.slots, 100 + arguments.new // 2)
    print(f"{'matrix products alone':32s} {arguments.slots / products:8.0f} tokens/s")
    print(f"{'KV reads alone':32s} {arguments.slots / reads:8.0f} tokens/s")
    print(f"{'both':32s} {arguments.slots / (products + reads):8.0f} tokens/s")
    if arguments.hf:
        model.set_attn_implementation("sdpa")
        ids = torch.randint(0, VOCABULARY, (arguments.slots, 100), generator=generator)
        took = seconds(
            lambda: model.generate(ids, max_new_tokens=arguments.new, do_sample=True, eos_token_id=None), 1
        )
        print(f"{'transformers generate, full':32s} {arguments.slots * arguments.new / took:8.0f} tokens/s")


if __name__ == "__main__":
    main()
