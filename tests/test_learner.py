"""One update against plain autograd by hand; the trainer's log-probabilities against the sampler's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlkv.attention import Mixed
from rlkv.errors import RLKVError
from rlkv.learner import Learner, Sample, pack
from rlkv.loading import recompute_activations
from rlkv.logprobs import chosen_logprobs
from rlkv.objective import group_advantages, policy_loss
from rlkv.penalty import Penalty
from rlkv.rewards import Verdict
from rlkv.sampler import Sampler, SamplingParams
from rlkv.settings import TrainConfig


def make_samples(config: TrainConfig, scores: list[list[float]], seed: int = 0) -> list[list[Sample]]:
    """Random prompts and answers of random lengths, with made-up sampler log-probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, 32, (count,), generator=generator).tolist()

    groups = []
    for group in scores:
        prompt = draw(2, 12)
        answers = [draw(1, 20) for _ in group]
        old = [(-3 * torch.rand(len(answer), generator=generator)).tolist() for answer in answers]
        groups.append(
            [
                Sample(prompt, answer, logprobs, Verdict(score, "wrong"))
                for answer, logprobs, score in zip(answers, old, group, strict=True)
            ]
        )
    return groups


def gradient_by_hand(
    model: Any, config: TrainConfig, gates: torch.Tensor, groups: list[list[Sample]]
) -> torch.Tensor:
    """One forward pass an answer, full logits, plain autograd; every answer counted, advantage 0 or not."""
    gates = gates.clone().requires_grad_()
    rewards = torch.tensor([[float(sample.verdict.score) for sample in group] for group in groups])
    values = group_advantages(rewards)
    total = torch.zeros(())
    count = 0
    for group, row in zip(groups, values, strict=True):
        for sample, advantage in zip(group, row, strict=True):
            ids = torch.tensor([sample.prompt + sample.response])
            logits = model(ids, rlkv=Mixed(gates, config.window), use_cache=False).logits[0].float()
            logprobs = torch.log_softmax(logits / config.temperature, -1)
            at = torch.arange(len(sample.prompt) - 1, ids.shape[1] - 1)
            new = logprobs[at, ids[0, at + 1]]
            old = torch.tensor(sample.logprobs)
            total = total + policy_loss(new, old, advantage.expand(len(new))).loss.sum()
            count += len(new)
    (total / count).backward()
    assert gates.grad is not None
    return gates.grad


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_update_follows_the_gradient_by_hand(tmp_path: Path, kind: str, recompute: bool) -> None:
    """Micro-batches, padding, chosen log-probs, skipped answers, checkpointing: none changes the gradient."""
    config = tiny_config(
        tmp_path, temperature=0.7, max_tokens_per_microbatch=60, gradient_checkpointing=recompute
    )
    model = tiny_model(kind).requires_grad_(False)
    model.set_attn_implementation("rlkv")
    gates = torch.rand(2, 2, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.3
    groups = make_samples(config, [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    expected = gradient_by_hand(model, config, gates, groups)
    if recompute:
        recompute_activations(model)
    learner = Learner(model, gates, config, Penalty(0.05, 0.2))
    values = learner.update(groups, 0)
    pressure = 0.05 * (torch.tensor(7 / 16).exp() - 1) / 4
    assert learner.gates.grad is not None
    torch.testing.assert_close(learner.gates.grad, expected + pressure, rtol=1e-4, atol=1e-6)
    assert values["penalty_grad"] == pytest.approx(pressure.item(), rel=1e-5)
    tokens = [sum(len(sample.response) for sample in group) for group in groups]
    assert values["trained_fraction"] == pytest.approx((tokens[0] + tokens[2]) / sum(tokens))
    assert not model.training and all(weight.grad is None for weight in model.parameters())


def test_update_is_adamw_then_clamp(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model = tiny_model()
    model.set_attn_implementation("rlkv")
    groups = make_samples(config, [[0, 1, 1, 0], [1, 0, 1, 1]])
    learner = Learner(model, torch.full((2, 2), 0.995), config, Penalty(0.0, 0.5))
    expected = torch.nn.Parameter(torch.full((2, 2), 0.995))
    adam = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.017)
    expected.grad = gradient_by_hand(model, config, expected.detach(), groups)
    expected.grad /= max(1.0, expected.grad.norm().item())
    adam.step()
    learner.update(groups, 0)
    torch.testing.assert_close(learner.gates.detach(), expected.detach().clamp(0, 1), rtol=1e-5, atol=1e-6)
    assert expected.max() > 1 and learner.gates.max() == 1


def test_several_updates_keep_the_first_policy_as_proximal(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, minibatches_per_batch=2)
    model = tiny_model()
    model.set_attn_implementation("rlkv")
    groups = make_samples(config, [[1, 0, 0, 1], [0, 1, 0, 0]])
    learner = Learner(model, torch.ones(2, 2) / 2, config, Penalty(0.0, 0.5))
    before = learner.logprobs([groups[1][0]], Mixed(learner.gates, config.window)).detach()
    learner.update(groups, 0)
    assert groups[1][0].prox is not None
    torch.testing.assert_close(groups[1][0].prox, before)
    assert learner.optimiser.state[learner.gates]["step"] == 2


def test_a_broken_gradient_is_not_taken(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model = tiny_model()
    model.set_attn_implementation("rlkv")
    groups = make_samples(config, [[1, 0, 0, 1]])
    groups[0][0].logprobs[0] = float("nan")
    learner = Learner(model, torch.ones(2, 2) / 2, config, Penalty(0.0, 0.5))
    assert learner.update(groups, 0)["skipped_update"] == 1
    assert learner.gates.eq(0.5).all()


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_chosen_logprobs_and_their_gradient(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("rlkv.logprobs.LOGIT_BYTES", block * 4 * 50)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden, tokens = torch.randn(20, 8, requires_grad=True), torch.randint(0, 50, (20,))
    factors = torch.randn(20)
    got = chosen_logprobs(hidden, head, tokens, 0.6)
    (got * factors).sum().backward()
    copy = hidden.detach().clone().requires_grad_()
    plain = torch.log_softmax(head(copy) / 0.6, -1)[torch.arange(20), tokens]
    (plain * factors).sum().backward()
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(hidden.grad, copy.grad)


def test_packing_keeps_the_budget_and_everything() -> None:
    samples = [Sample([0] * 5, [0] * n, [], Verdict(0, "wrong")) for n in (1, 50, 3, 9, 9, 30, 2)]
    batches = pack(samples, 40)
    assert sorted(len(sample) for batch in batches for sample in batch) == sorted(map(len, samples))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40
    wide = pack(samples, 40, lambda length: -(-length // 16) * 16)  # rows are padded to multiples of 16
    assert max(len(batch) for batch in wide) == 2


@pytest.mark.parametrize("nearly", [0.0, 8.0, 12.0])
def test_a_nearly_certain_tokens_gradient_survives_16_bits(nearly: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False).bfloat16()
    tokens = torch.arange(8)
    hidden = (torch.randn(8, 16) + nearly * head.weight[tokens].float() * 4).bfloat16()
    slopes = []
    for wide in (False, True):
        states = (hidden.float() if wide else hidden).requires_grad_()
        weight = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
        weight.weight.data = head.weight.data.float() if wide else head.weight.data
        (slope,) = torch.autograd.grad(chosen_logprobs(states, weight, tokens, 1.0).sum(), states)
        slopes.append(slope.float())
    error = (slopes[0] - slopes[1]).norm(dim=1) / slopes[1].norm(dim=1)
    assert error.max() < 0.1, error


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trainer_and_sampler_agree(tmp_path: Path, temperature: float) -> None:
    """One temperature everywhere, and one window: at soft gates, far beyond the window."""
    config = tiny_config(tmp_path, temperature=temperature, max_new_tokens=60)
    model = tiny_model()
    gates = torch.rand(2, 2, generator=torch.Generator().manual_seed(1))
    learner = Learner(model, gates, config, Penalty(0.0, 0.5))
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    sampler = Sampler(model, config.window, slots=2, max_length=100)
    params = SamplingParams(max_new_tokens=60, temperature=temperature, stop_ids=(99,))
    finished = sampler.generate(prompts, params, gates)
    samples = [
        Sample(prompt, done.tokens[: 60 - 25 * row], done.logprobs[: 60 - 25 * row], Verdict(0, "wrong"))
        for row, (prompt, done) in enumerate(zip(prompts, finished, strict=True))
    ]  # one micro-batch of 63, 55 and 12 tokens
    new = learner.logprobs(samples, Mixed(learner.gates, config.window))
    old = torch.cat([torch.tensor(sample.logprobs) for sample in samples])
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["granite", "phi"])
def test_a_model_whose_logits_are_more_than_an_embedding_is_refused(tmp_path: Path, kind: str) -> None:
    """Granite divides its logits, Phi adds a bias: the update would not see it, the sampler would."""
    more = {"logits_scaling": 8.0} if kind == "granite" else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if kind == "phi":
        model.lm_head.bias.fill_(0.5)
    with pytest.raises(RLKVError, match=f"{kind}: its logits are not a plain output embedding"):
        Learner(model, torch.ones(2, 2), tiny_config(tmp_path), Penalty(0.0, 0.5))


def test_learning_rate_falls_in_a_straight_line() -> None:
    config = TrainConfig(learning_rate=4e-2, final_learning_rate=1e-2)
    assert [config.learning_rate_at(step, 4) for step in range(4)] == pytest.approx([0.04, 0.03, 0.02, 0.01])
    assert TrainConfig(learning_rate=4e-2).learning_rate_at(3, 4) == 4e-2


@pytest.mark.parametrize(("kind", "pressed"), [("mean", True), ("worst_task", False)])
def test_penalty_can_wait_for_the_worst_task(tmp_path: Path, kind: str, pressed: bool) -> None:
    """Three prompts of a solved task, one of a failing one: the mean, .75, exceeds tau; the worst, 0, not."""
    config = tiny_config(tmp_path, penalty=1.0, tau=0.5, penalty_reward=kind, weight_decay=0.0)
    samples = make_samples(config, [[1, 1], [1, 1], [1, 1], [0, 0]])
    for group, task in zip(samples, ["easy", "easy", "easy", "hard"], strict=True):
        for sample in group:
            sample.task = task
    model = tiny_model()
    model.set_attn_implementation("rlkv")
    learner = Learner(model, torch.ones(2, 2), config, Penalty(1.0, 0.5))
    values = learner.update(samples, 0)
    assert (values["penalty_grad"] > 0) is pressed
    assert (learner.gates < 1).all().item() is pressed
