"""Is the sampler that is about to be timed the right one? Its tokens, and its distance from the trainer."""

from __future__ import annotations

from typing import Any

import torch
from gpu_timing import print_table, require
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlkv.attention import Mixed
from rlkv.errors import RLKVError
from rlkv.logprobs import response_logprobs
from rlkv.paged import PagedSampler
from rlkv.sampler import Sampler, SamplingParams
from rlkv.window import Window

NOISE = 0.06  # mean |log p - float32's log p| of sampler and of trainer, in bf16


def check_tokens(device: str) -> list[dict[str, Any]]:
    """Float32: the same tokens as the slot sampler's, through refills, a short pool and shared prompts.

    A row for full heads, soft gates and a mask; raises RLKVError if they differ.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(device).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (20,), generator=generator).tolist() + [70] * 3
    prompts = [torch.randint(2, 64, (length,), generator=generator).tolist() for length in lengths]
    prompts += [prompts[-1]] * 3
    gates = torch.rand(3, 4, generator=generator)
    window, params = Window(4, 16), SamplingParams(max_new_tokens=60, seed=5)
    slow = Sampler(model, window, slots=8, max_length=220, cuda_graphs=False)
    page = 2 * 16 * 64 * 4
    fast = PagedSampler(model, window, slots=16, max_length=220, page_size=16, kv_bytes=page * 700)
    rows: list[dict[str, Any]] = []
    for name, values in (("full", None), ("soft", gates), ("mask", gates.round())):
        expected, found = slow.generate(prompts, params, values), fast.generate(prompts, params, values)
        same = sum(one.tokens == other.tokens for one, other in zip(found, expected, strict=True))
        gap = max(
            abs(p - q)
            for one, other in zip(found, expected, strict=True)
            if one.tokens == other.tokens
            for p, q in zip(one.logprobs, other.logprobs, strict=True)
        )
        rows.append({"float32": name, "completions": len(prompts), "equal": same, "logprobs within": gap,
                     "came back": fast.preemptions})  # fmt: skip
        # a draw within rounding of a boundary may go the other way, in one completion or so
        if same < len(prompts) - 2 or gap > 1e-3 or fast.pool.used:
            raise RLKVError(f"paged sampler: {name} completions differ; not timed")
    print_table(rows)
    return rows


@torch.inference_mode()
def trainer_gap(model: Any, sampler: PagedSampler, gates: torch.Tensor) -> dict[str, float]:
    """Mean |log p(sampler) - log p(trainer)| of a few bf16 completions, each way as it is used.

    Either is 0.06 from float32 on a random Llama-8B (docs/gpu.md), so two right ones are at most 0.12 apart:
    more raises RLKVError. "other gates" is what the trainer would be apart with 1 - gates.
    """
    generator = torch.Generator().manual_seed(3)
    longest = min(900, sampler.max_length - 100)
    prompts = [
        torch.randint(0, 20000, (length,), generator=generator).tolist()
        for length in (40, longest - 20, longest)
    ]
    done = sampler.generate(prompts, SamplingParams(max_new_tokens=48), gates)
    sampled = torch.tensor([logprob for one in done for logprob in one.logprobs])
    gaps: dict[str, float] = {}
    for name, own in (("gap", gates), ("gap, other gates", 1 - gates)):
        mixed = Mixed(own.to(model.device), sampler.window)
        rows = [(prompt, one.tokens) for prompt, one in zip(prompts, done, strict=True)]
        found = torch.cat([response_logprobs(model, [row], 1.0, mixed) for row in rows])
        gaps[name] = (found.cpu() - sampled).abs().mean().item()
    print(
        "bf16, mean |log p(sampler) - log p(trainer)|:", {name: round(gap, 4) for name, gap in gaps.items()}
    )
    require(gaps["gap"], 2 * NOISE, "bf16: mean |log p(sampler) - log p(trainer)|")
    return gaps
