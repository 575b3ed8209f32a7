"""Advantages and the clipped decoupled loss against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkv.errors import RLKVError
from rlkv.objective import advantages, batch_advantages, group_advantages, policy_loss


def test_group_advantage_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    got = group_advantages(rewards)
    # unbiased std of (1, 0, 0, 0) is 0.5; of (1, 1, 0, 0) it is sqrt(1/3)
    assert got[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4)
    assert got[3].tolist() == pytest.approx([math.sqrt(0.75)] * 2 + [-math.sqrt(0.75)] * 2, rel=1e-4)
    assert got[1:3].eq(0).all()


@given(st.lists(st.sampled_from([0.1, 0.7, 1 / 3]), min_size=1, max_size=1), st.integers(1, 7))
def test_equal_rewards_have_no_advantage_exactly(value: list[float], samples: int) -> None:
    """Rounding in the mean must not leave a tiny centred value that a tiny std blows up."""
    assert group_advantages(torch.full((3, samples), value[0])).eq(0).all()
    assert batch_advantages(torch.full((3, samples), value[0]), torch.ones(3, samples)).eq(0).all()


def test_batch_advantage_normalises_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (5, 4), generator=generator).float()
    lengths = torch.randint(1, 50, (5, 4), generator=generator)
    tokens = torch.cat([r.repeat(int(n)) for r, n in zip(rewards.flatten(), lengths.flatten(), strict=True)])
    expected = (rewards - tokens.mean()) / (tokens.std() + 1e-5)
    torch.testing.assert_close(batch_advantages(rewards, lengths), expected)


def test_batch_advantage_depends_on_token_share_only() -> None:
    """With a share p of tokens in right answers: sqrt((1-p)/p) and -sqrt(p/(1-p))."""
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[200, 800]])
    got = advantages("batch", rewards, lengths)[0].tolist()
    assert got == pytest.approx([2.0, -0.5], rel=1e-2)


def test_unknown_advantage() -> None:
    with pytest.raises(RLKVError, match="group or batch.*'gae'"):
        advantages("gae", torch.ones(1, 2), torch.ones(1, 2))


def loss_by_loop(new: float, old: float, prox: float, advantage: float) -> float:
    rho, w = math.exp(new - prox), math.exp(prox - old)
    w = 0.0 if w > 5 else w
    return max(-advantage * rho, -advantage * min(max(rho, 0.6), 1.4)) * w


def test_policy_loss_matches_the_formula() -> None:
    torch.manual_seed(0)
    new, old, prox = -torch.rand(3, 200) * 3
    advantage = torch.randn(200)
    got = policy_loss(new, old, advantage, prox=prox)
    rows = zip(new.tolist(), old.tolist(), prox.tolist(), advantage.tolist(), strict=True)
    assert got.loss.tolist() == pytest.approx([loss_by_loop(*row) for row in rows], rel=1e-4, abs=1e-6)
    assert (got.weight == 0).any() and got.weight.max() <= 5  # the cap was met by this sample
    torch.testing.assert_close(got.gap, (new - old).abs())


def test_clip_takes_the_gradient_away_where_it_says_so() -> None:
    new = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    got = policy_loss(new, torch.zeros(4), torch.tensor([1.0, -1, 1, -1]), prox=torch.zeros(4))
    got.loss.sum().backward()
    assert got.clipped.tolist() == [True, False, False, True]
    assert new.grad is not None and (new.grad == 0).tolist() == [True, False, False, True]


def test_first_update_needs_no_second_forward() -> None:
    """prox=None gives the loss and the gradient of prox = new, detached: -A w grad log p."""
    torch.manual_seed(1)
    old, advantage = -torch.rand(50), torch.randn(50)
    new = (old + 0.1 * torch.randn(50)).requires_grad_()
    policy_loss(new, old, advantage).loss.sum().backward()
    torch.testing.assert_close(new.grad, -advantage * torch.exp(new.detach() - old))
