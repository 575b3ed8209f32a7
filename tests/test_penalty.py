"""The adaptive penalty by its formula; the target controller on a toy with known head importance."""

from __future__ import annotations

import math

import pytest
import torch

from rlkv.errors import RLKVError
from rlkv.penalty import Penalty, gate_sparsity, reward_factor


def test_reward_factor() -> None:
    assert reward_factor(0.5, 0.5) == 0  # strictly above tau
    assert reward_factor(0.49, 0.5) == 0
    assert reward_factor(0.7, 0.5) == pytest.approx(math.exp(0.7) - 1)


@pytest.mark.parametrize("reward", [0.3, 0.7, 1.0])
def test_gradient_is_that_of_the_papers_penalty(reward: float) -> None:
    gates = torch.rand(3, 4, requires_grad=True)
    c = math.exp(reward) - 1 if reward > 0.5 else 0.0
    (1e-3 * c * gates.abs().mean()).backward()
    torch.testing.assert_close(Penalty(1e-3, 0.5).gradient(gates, reward, 0), gates.grad)


def test_target_is_the_paper_for_half_the_run_and_then_divides_by_rank() -> None:
    penalty = Penalty(1e-3, 0.5, target=0.5, steps=100)
    ones = torch.ones(2, 4)
    paper = Penalty(1e-3, 0.5).gradient(ones, 0.9, 0)
    assert penalty.gradient(ones, 0.9, 0) == pytest.approx(paper * math.exp(0.05 * 0.5))
    over = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0.1, 1]])  # 7 of 8 are closed, 4 are wanted
    assert penalty.gradient(over, 0.9, 49).gt(0).all()
    gradient = penalty.gradient(over, 0.9, 50).flatten()
    assert (gradient[:4] > 0).all() and (gradient[4:] < 0).all()


def test_equal_gates_rank_by_their_mean_so_far() -> None:
    penalty = Penalty(1e-3, 0.5, target=0.5, steps=4)
    penalty.gradient(torch.tensor([[0.0, 0.9, 0.0, 0.8]]), 0.9, 0)
    penalty.gradient(torch.zeros(1, 4), 0.9, 1)
    assert penalty.gradient(torch.zeros(1, 4), 0.9, 2).gt(0).tolist() == [[True, False, True, False]]


def test_low_reward_pauses_the_push_and_the_integral_but_not_the_pull() -> None:
    penalty = Penalty(1e-3, 0.5, target=0.5, steps=100)
    assert penalty.gradient(torch.ones(1, 4), 0.4, 0).eq(0).all() and penalty.integral == 0
    over = penalty.gradient(torch.zeros(1, 4), 0.0, 50)[0]
    assert over[:2].eq(0).all() and (over[2:] < 0).all()
    late = penalty.gradient(torch.ones(1, 4), 0.0, 90)  # the last third: the target comes first
    assert (late > 0).all()


def test_state_goes_on() -> None:
    penalty, gates = Penalty(1e-3, 0.5, 0.5, 100), torch.rand(4, 4)
    for step in range(5):
        penalty.gradient(gates, 0.9, step)
    other = Penalty(1e-3, 0.5, 0.5, 100)
    other.load_state_dict(penalty.state_dict())
    assert other.gradient(gates, 0.9, 5).equal(penalty.gradient(gates, 0.9, 5))
    other.load_state_dict({"integral": 0.5})  # as checkpoints were before gates' means were kept
    assert other.integral == 0.5 and other.mean is None


@pytest.mark.parametrize(
    ("beta", "target", "match"),
    [(-1.0, None, "beta"), (1e-3, 1.5, r"\[0, 1\], got 1.5"), (0.0, 0.5, "penalty above 0")],
)
def test_bad_settings(beta: float, target: float | None, match: str) -> None:
    with pytest.raises(RLKVError, match=match):
        Penalty(beta, 0.5, target)


class Toy:
    """Heads with known, log-normal importance; neighbours in a random order partly stand in for each other.

    ``accuracy`` is a sigmoid of what the gates leave. The policy gradient is its derivative, of the size
    measured on a small reasoning model, plus noise that is larger for heads that matter.
    """

    def __init__(self, heads: int, seed: int, middle: float = 0.55) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.importance = torch.softmax(1.5 * torch.randn(heads, generator=self.generator), 0)
        self.partner = torch.randperm(heads, generator=self.generator)
        self.middle = middle

    def accuracy(self, gates: torch.Tensor) -> torch.Tensor:
        weights, states = self.importance[self.partner], gates[self.partner]
        either = (weights[::2] + weights[1::2]) @ torch.maximum(states[::2], states[1::2])
        left = 0.7 * self.importance @ gates + 0.3 * either
        return torch.sigmoid(9 * (left - self.middle))

    def train(self, penalty: Penalty, steps: int = 150) -> tuple[torch.Tensor, list[float]]:
        """(gates, sparsity after each step), with the trainer's optimiser."""
        gates = torch.ones(len(self.importance), requires_grad=True)
        optimiser = torch.optim.AdamW([gates], lr=1e-2, weight_decay=0.017)
        history = []
        for step in range(steps):
            accuracy = self.accuracy(gates)
            reward = torch.binomial(torch.tensor(256.0), accuracy.detach(), generator=self.generator) / 256
            (slope,) = torch.autograd.grad(accuracy, gates)
            spread = (accuracy * (1 - accuracy)).sqrt().item()
            noise = torch.randn(len(gates), generator=self.generator)
            noise *= 3e-4 * (1 + len(gates) * self.importance).sqrt()
            pressure = penalty.gradient(gates.detach(), reward.item(), step)
            gates.grad = spread * (noise - 2e-2 * slope) + pressure
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            history.append(gate_sparsity(gates))
        return gates.detach(), history


def keep_top(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    mask = torch.zeros_like(scores)
    mask[scores.argsort(descending=True)[: round((1 - sparsity) * len(scores))]] = 1
    return mask


@pytest.mark.parametrize("heads", [32, 48, 256])
@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_target_is_reached_and_held_whatever_beta(heads: int, target: float) -> None:
    for seed, per_gate in enumerate([1e-4, 4e-4, 1.2e-3]):
        _, history = Toy(heads, seed).train(Penalty(per_gate * heads, 0.5, target, 150))
        assert all(abs(sparsity - target) <= 0.03 for sparsity in history[-5:]), (seed, history[-5:])


def test_ranking_stays_good() -> None:
    """The mask keeps nearly what the best mask keeps, and far more than a random one."""
    for target in (0.25, 0.5, 0.75):
        reached, best, chance = 0.0, 0.0, 0.0
        for seed in range(6):
            toy = Toy(48, seed)
            gates, _ = toy.train(Penalty(4e-4 * 48, 0.5, target, 150))
            reached += toy.accuracy(keep_top(gates, target)).item() / 6
            best += toy.accuracy(keep_top(toy.importance, target)).item() / 6
            chance += toy.accuracy(keep_top(torch.rand(48, generator=toy.generator), target)).item() / 6
        assert best - reached < 0.15 * (best - chance), (target, reached, best, chance)


def test_target_beyond_the_reward_floor_is_reached_at_the_end() -> None:
    """A target that the task does not survive: pressure pauses under tau, but the deadline brings it."""
    toy = Toy(48, 3, middle=0.95)
    gates, history = toy.train(Penalty(4e-4 * 48, 0.5, 0.75, 150))
    assert toy.accuracy(keep_top(gates, 0.75)) < 0.5
    assert history[-1] == pytest.approx(0.75, abs=0.03)


def test_changing_beta_alone_would_not_do() -> None:
    """The reason for dividing the pressure by rank: one sign for all gates misses the target."""

    class OneSign(Penalty):
        def gradient(self, gates: torch.Tensor, reward: float, step: int) -> torch.Tensor:
            assert self.target is not None
            error = self.target - ((0.75 - gates) / 0.5).clamp(0, 1).mean().item()
            self.integral = min(2.5, max(-1.0, self.integral + 0.05 * error))
            push = max(-1.0, min(1.0, error / 0.1)) * max(reward_factor(reward, self.tau), math.expm1(0.5))
            return torch.full_like(gates, self.effective_beta * push / gates.numel())

    misses = []
    for target in (0.25, 0.5, 0.75):
        _, history = Toy(48, 0).train(OneSign(4e-4 * 48, 0.5, target, 150))
        misses.append(abs(history[-1] - target))
    assert sum(misses) / 3 > 0.1, misses
