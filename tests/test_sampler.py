"""The sampler against the trainer's forward, stock generation, and loops written without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlkv.attention import Mixed
from rlkv.sampler import Completion, Sampler, SamplingParams
from rlkv.schedule import Pace
from rlkv.slots import Prefill
from rlkv.window import Window

LAYERS, HEADS, KV_HEADS, VOCABULARY = 3, 8, 4, 41
WINDOW = Window(3, 9)
NEVER = (VOCABULARY,)
KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def make(kind: str = "qwen3", seed: int = 0) -> Any:
    config_class, model_class, more = KINDS[kind]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
        **more,
    )
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # sharper attention and logits than at initialisation
    return model


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


RAGGED = [1, 5, 60, 2, 11, 12, 13, 33, 90, 3]  # below, at and far above the window of 12


def random_gates(*shape: int) -> torch.Tensor:
    gates = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    gates.view(-1)[::5] = 0.0
    gates.view(-1)[1::5] = 1.0
    return gates


@torch.no_grad()
def trainer_logprobs(
    model: Any, prompt: list[int], tokens: list[int], gates: torch.Tensor, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([prompt + tokens])
    logits = model(ids, rlkv=Mixed(gates, WINDOW), use_cache=False).logits[0].double() / temperature
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def check_against_trainer(
    model: Any,
    prompts: list[list[int]],
    completions: list[Completion],
    gates: torch.Tensor,
    temperature: float,
) -> None:
    assert [completion.index for completion in completions] == list(range(len(prompts)))
    for prompt, completion in zip(prompts, completions, strict=True):
        own = gates if gates.dim() == 2 else gates[completion.index]
        expected = trainer_logprobs(model, prompt, completion.tokens, own, temperature)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_logprobs_are_the_trainers(kind: str, slots: int) -> None:
    model, prompts, gates = make(kind), make_prompts(RAGGED), random_gates(LAYERS, KV_HEADS)
    sampler = Sampler(model, WINDOW, slots=slots, max_length=130)
    params = SamplingParams(max_new_tokens=50, temperature=0.8, seed=4)
    completions = sampler.generate(prompts, params, gates)
    check_against_trainer(model, prompts, completions, gates, 0.8)
    assert len({len(completion.tokens) for completion in completions}) > 3  # slots were refilled at odd times
    assert sampler.tokens_per_second > 0


def test_gates_of_each_prompt_are_its_own() -> None:
    model, prompts = make(), make_prompts([7, 20, 45, 20])
    prompts[3] = prompts[1]  # the same prompt under other gates must not share its cache
    gates = random_gates(len(prompts), LAYERS, KV_HEADS)
    sampler = Sampler(model, WINDOW, slots=4, max_length=100)
    params = SamplingParams(max_new_tokens=40, temperature=0)
    together = sampler.generate(prompts, params, gates)
    check_against_trainer(model, prompts, together, gates, 1.0)
    for prompt, own, completion in zip(prompts, gates, together, strict=True):
        assert sampler.generate([prompt], params, own)[0].tokens == completion.tokens


def test_equal_prompts_are_processed_once_and_agree() -> None:
    model, gates = make(), random_gates(LAYERS, KV_HEADS)
    prompts = [prompt for prompt in make_prompts([30, 1, 18]) for _ in range(4)]
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: calls.append(output.shape[:2]))
    completions = Sampler(model, WINDOW, slots=12, max_length=80).generate(
        prompts, SamplingParams(max_new_tokens=30, stop_ids=NEVER), gates
    )
    handle.remove()
    assert calls[0] == (2, 29) and all(length == 1 for _, length in calls[1:])
    check_against_trainer(model, prompts, completions, gates, 1.0)
    assert completions[0].tokens != completions[1].tokens  # each sample has its own random stream


@pytest.mark.parametrize("kind", KINDS)
def test_full_gates_are_stock_greedy_generation(kind: str) -> None:
    model, prompts = make(kind), make_prompts(RAGGED)
    expected = []
    model.set_attn_implementation("eager")
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    sampler = Sampler(model, WINDOW, slots=4, max_length=140)
    for gates in (None, torch.ones(LAYERS, KV_HEADS)):
        completions = sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0), gates)
        assert [completion.tokens for completion in completions] == expected
    for completion in completions:
        assert completion.finish == ("stop" if completion.tokens[-1] == 1 else "length")


@torch.no_grad()
def masked_greedy(model: Any, prompt: list[int], full: torch.Tensor, prefill: str, new: int) -> list[int]:
    """Greedy decoding that recomputes everything each step, with an additive mask a layer and head."""
    inner, tokens = model.model, list(prompt)
    for _ in range(new):
        length = len(tokens)
        position = torch.arange(length)
        i, j = position[:, None], position[None, :]
        causal = j <= i
        local = causal & ((j < WINDOW.sink) | (j > i - WINDOW.recent))
        if prefill == "full":
            local = torch.where(i < len(prompt), causal, local)
        hidden = inner.embed_tokens(torch.tensor([tokens]))
        rotary = inner.rotary_emb(hidden, position[None])
        for index, layer in enumerate(inner.layers):
            visible = torch.stack([causal if keep else local for keep in full[index].tolist()])
            mask = torch.zeros(visible.shape).masked_fill(~visible, -1e30)
            mask = mask.repeat_interleave(HEADS // KV_HEADS, 0)[None]
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position[None]
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        tokens.append(int(model.lm_head(inner.norm(hidden))[0, -1].argmax()))
        if tokens[-1] == 1:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prefill", ["local", "full"])
def test_masks_are_an_independent_masked_loop(prefill: Prefill) -> None:
    model, prompts = make("llama"), make_prompts([1, 9, 14, 40])
    full = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    model.set_attn_implementation("eager")
    expected = [masked_greedy(model, prompt, full, prefill, 30) for prompt in prompts]
    sampler = Sampler(model, WINDOW, slots=3, max_length=90, prefill=prefill)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=30, temperature=0), full.float())
    assert [completion.tokens for completion in completions] == expected


class Launches:
    """Stands in for CUDA graphs: runs each step, and counts the different ones."""

    def __init__(self) -> None:
        self.keys: dict[Any, int] = {}

    def refresh(self, *tensors: torch.Tensor) -> None:
        self.keys.clear()

    def run(self, key: Any, step: Callable[[], None]) -> None:
        self.keys[key] = self.keys.get(key, 0) + 1
        step()


@pytest.mark.parametrize("prefill", ["local", "full"])
def test_the_gpu_schedule_gives_the_same_completions(prefill: Prefill) -> None:
    model, prompts, gates = make(), make_prompts(RAGGED * 2), random_gates(LAYERS, KV_HEADS)
    params = SamplingParams(max_new_tokens=35, seed=6)
    expected = Sampler(model, WINDOW, slots=1, max_length=120, prefill=prefill).generate(
        prompts, params, gates
    )
    sampler = Sampler(model, WINDOW, slots=8, max_length=120, prefill=prefill)
    launches = Launches()
    sampler._graphs = launches  # type: ignore[assignment]
    sampler._pace = replace(Pace.on_cuda(8, graphs=True), round_columns=64, refill=3)
    completions = sampler.generate(prompts, params, gates)
    assert [(c.tokens, c.finish) for c in completions] == [(c.tokens, c.finish) for c in expected]
    spans = [span for key in launches.keys for span in key[0]]
    assert all(len(key[0]) == 1 for key in launches.keys)
    assert {stop for _, stop, _ in spans} <= {1, 2, 4, 8} and {columns for *_, columns in spans} <= {64, 120}
    few = sampler.generate(prompts[:1], params, gates)
    assert few[0].tokens == expected[0].tokens


def test_prefill_policies_differ() -> None:
    model, prompts = make("llama"), make_prompts([50])
    tokens: dict[Prefill, list[float]] = {}
    for prefill in get_args(Prefill):
        sampler = Sampler(model, WINDOW, slots=1, max_length=90, prefill=prefill)
        params = SamplingParams(max_new_tokens=20, temperature=0, stop_ids=NEVER)
        tokens[prefill] = sampler.generate(prompts, params, torch.zeros(LAYERS, KV_HEADS))[0].logprobs
    assert tokens["local"] != tokens["full"]


def test_slots_and_order_do_not_matter() -> None:
    model, prompts, gates = make("qwen2"), make_prompts(RAGGED), random_gates(LAYERS, KV_HEADS)
    params = SamplingParams(max_new_tokens=30, temperature=1.3, top_p=0.9, top_k=20, seed=9)
    runs = [
        Sampler(model, WINDOW, slots=slots, max_length=130).generate(prompts, params, gates)
        for slots in (1, 3, 10)
    ]
    assert len({tuple(map(tuple, (c.tokens for c in run))) for run in runs}) == 1
    other = Sampler(model, WINDOW, slots=10, max_length=130).generate(
        prompts, SamplingParams(max_new_tokens=30, temperature=1.3, top_p=0.9, top_k=20, seed=10), gates
    )
    assert [c.tokens for c in other] != [c.tokens for c in runs[0]]


def test_stale_and_foreign_cells_never_reach_output() -> None:
    model, prompts, gates = make(), make_prompts(RAGGED), random_gates(LAYERS, KV_HEADS)
    params = SamplingParams(max_new_tokens=30, seed=2)
    sampler = Sampler(model, WINDOW, slots=4, max_length=130)
    clean = sampler.generate(prompts, params, gates)
    for states in (*sampler._cache.keys, *sampler._cache.values):
        states.fill_(torch.nan)
    poisoned = sampler.generate(prompts, params, gates)
    assert [c.tokens for c in poisoned] == [c.tokens for c in clean]
    assert [c.logprobs for c in poisoned] == [c.logprobs for c in clean]


def test_the_weights_are_the_trainers_own() -> None:
    model, prompts = make(), make_prompts([6])
    held = {parameter.data_ptr() for parameter in model.parameters()}
    sampler = Sampler(model, WINDOW, slots=2, max_length=60)
    params = SamplingParams(max_new_tokens=30, temperature=0, stop_ids=NEVER)
    before = sampler.generate(prompts, params)[0]
    assert {parameter.data_ptr() for parameter in sampler.model.parameters()} == held
    with torch.no_grad():
        model.lm_head.weight[before.tokens[0]] = 0.0
        model.lm_head.weight[7] = model.lm_head.weight[7] + 1.0
    after = sampler.generate(prompts, params)[0]
    assert after.tokens != before.tokens
    ones = torch.ones(LAYERS, KV_HEADS)
    check_against_trainer(model, prompts, [after], ones, 1.0)


def test_training_mode_with_checkpointing_is_left_as_it_was() -> None:
    model, prompts, gates = make("llama"), make_prompts([20, 4]), random_gates(LAYERS, KV_HEADS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    completions = Sampler(model, WINDOW, slots=2, max_length=60).generate(
        prompts, SamplingParams(max_new_tokens=30), gates
    )
    assert model.training
    check_against_trainer(model.eval(), prompts, completions, gates, 1.0)


def test_limits_stops_and_callback() -> None:
    model, prompts = make(), make_prompts([10, 28, 3])
    sampler = Sampler(model, WINDOW, slots=2, max_length=30)
    seen: list[Completion] = []
    params = SamplingParams(max_new_tokens=12, stop_ids=NEVER)
    completions = sampler.generate(prompts, params, on_finish=seen.append)
    assert [len(completion.tokens) for completion in completions] == [
        12,
        2,
        12,
    ]  # the second meets max_length
    assert all(completion.finish == "length" for completion in completions)
    assert [completion.index for completion in seen] == [1, 0, 2]
    free = sampler.generate(prompts, SamplingParams(max_new_tokens=12, seed=3, stop_ids=NEVER))[0].tokens
    stop = (free[4], free[7])
    stopped = sampler.generate(prompts, SamplingParams(max_new_tokens=12, seed=3, stop_ids=stop))[0]
    first = min(free.index(token) for token in stop)
    assert stopped.tokens == free[: first + 1] and stopped.finish == "stop"
    assert len(stopped.logprobs) == first + 1
    assert sampler.generate([], params) == []


def test_bfloat16_follows_the_trainer() -> None:
    model, prompts, gates = make().to(torch.bfloat16), make_prompts([25]), random_gates(LAYERS, KV_HEADS)
    params = SamplingParams(max_new_tokens=40, stop_ids=NEVER)
    completion = Sampler(model, WINDOW, slots=1, max_length=70).generate(prompts, params, gates)[0]
    expected = trainer_logprobs(model, prompts[0], completion.tokens, gates, 1.0)
    difference = (torch.tensor(completion.logprobs) - expected).abs()
    assert difference.mean() < 0.1 and difference.max() < 0.5  # bfloat16 keeps 8 bits
