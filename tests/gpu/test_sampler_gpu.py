"""The sampler on CUDA: with and without graphs, against the trainer's forward, and by its speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlkv.attention import Mixed
from rlkv.sampler import Sampler, SamplingParams
from rlkv.slots import Prefill
from rlkv.window import Window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WINDOW = Window(4, 16)
LAYERS, KV_HEADS, VOCABULARY = 6, 8, 64


def make(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        max_position_embeddings=2048,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model.to("cuda", dtype)


def make_prompts(number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (number,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("prefill", ["local", "full"])
def test_logprobs_are_the_trainers(graphs: bool, prefill: Prefill) -> None:
    model, prompts = make(), make_prompts(50)
    gates = torch.rand(LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(model, WINDOW, slots=16, max_length=300, prefill=prefill, cuda_graphs=graphs)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=90, temperature=0.9, seed=5), gates)
    if prefill == "full":  # the trainer has no such forward: compare with another batch instead
        single = Sampler(model, WINDOW, slots=1, max_length=300, prefill=prefill, cuda_graphs=False)
        for index in (0, 20, 49):
            alone = single.generate(
                [prompts[index]], SamplingParams(max_new_tokens=90, temperature=0), gates
            )[0]
            batched = sampler.generate(prompts, SamplingParams(max_new_tokens=90, temperature=0), gates)[
                index
            ]
            assert alone.tokens == batched.tokens
        return
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.tokens], device="cuda")
        with torch.no_grad():
            logits = model(ids, rlkv=Mixed(gates.cuda(), WINDOW), use_cache=False).logits[0]
        logprobs = (logits.double() / 0.9).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_graphs_change_nothing_and_follow_gates_weights_and_settings() -> None:
    model, prompts = make(), make_prompts(40)
    eager = Sampler(model, WINDOW, slots=16, max_length=300, cuda_graphs=False)
    graphs = Sampler(model, WINDOW, slots=16, max_length=300)
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        gates = torch.rand(LAYERS, KV_HEADS, generator=generator) if step != 2 else None
        eager.window = graphs.window = Window(WINDOW.sink, WINDOW.recent + step // 2)
        params = SamplingParams(max_new_tokens=60, seed=step, top_k=10 if step == 3 else 0)
        expected, found = eager.generate(prompts, params, gates), graphs.generate(prompts, params, gates)
        assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, device="cuda") * 0.05)


def test_graphs_are_faster() -> None:
    model, prompts = make(torch.bfloat16), make_prompts(256)
    gates = torch.rand(LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(max_new_tokens=256, stop_ids=(VOCABULARY,))
    speed = {}
    for graphs in (False, True):
        sampler = Sampler(model, WINDOW, slots=256, max_length=512, cuda_graphs=graphs)
        sampler.generate(prompts, params, gates)
        sampler.generate(prompts, params, gates)
        speed[graphs] = sampler.tokens_per_second
    print(f"tokens/s: eager {speed[False]:.0f}, graphs {speed[True]:.0f}")
    assert speed[True] > 1.5 * speed[False]
