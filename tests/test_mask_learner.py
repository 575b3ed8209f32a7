"""REINFORCE on sampled masks: the gradient against the exact one, learning, and resuming."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from training_kit import TinyTokenizer, tiny_config, tiny_model

from rlkv.errors import RLKVError
from rlkv.learner import Sample
from rlkv.mask_learner import MaskLearner
from rlkv.penalty import Penalty
from rlkv.rewards import Verdict
from rlkv.trainer import train


def needs_first_head(mask: torch.Tensor) -> float:
    """Solved if head (0, 0) is full, or both heads of layer 1."""
    return float(mask[0, 0] == 1 or mask[1].sum() == 2)


def graded(masks: torch.Tensor, samples: int) -> list[list[Sample]]:
    flat = [Sample([3], [4], [0.0], Verdict(needs_first_head(mask), "wrong"), "", mask) for mask in masks]
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def test_the_gradient_is_that_of_the_expected_reward(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, estimator="masks", penalty=0.0)
    start = torch.tensor([[0.3, 0.6], [0.7, 0.4]])
    learner = MaskLearner(start, config, Penalty(0.0, 0.5))
    logits = torch.logit(start).requires_grad_()
    gates = logits.sigmoid()
    expected = torch.zeros(())
    for bits in product((0.0, 1.0), repeat=4):
        mask = torch.tensor(bits).view(2, 2)
        chance = torch.where(mask == 1, gates, 1 - gates).prod()
        expected = expected + chance * needs_first_head(mask)
    expected.backward()
    masks = learner.draw(40_000, seed=3)
    torch.testing.assert_close(masks.mean(0), start, atol=0.02, rtol=0)
    learner.update(graded(masks, 4), 0)
    assert logits.grad is not None and learner.logits.grad is not None
    torch.testing.assert_close(-learner.logits.grad, logits.grad, atol=0.01, rtol=0)


def test_it_finds_the_head_that_matters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, estimator="masks", learning_rate=0.2)
    learner = MaskLearner(torch.full((2, 2), 0.8), config, Penalty(0.1, 0.5))
    for step in range(80):
        learner.update(graded(learner.draw(64, seed=step), 4), step)
    gates = learner.gates
    assert gates[0, 0] > 0.9 and gates.flatten()[1:].max() < 0.5


def test_a_broken_off_run_goes_on_to_the_same_gates(tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> torch.Tensor:
        changes = {"output": str(tmp_path / folder), "steps": steps, "resume": resume, "keep": "last"}
        config = tiny_config(tmp_path, estimator="masks", learning_rate=0.2, validate_every=0, **changes)
        return train(config, tiny_model(), TinyTokenizer()).values

    whole = run("whole", 4)
    assert not whole.equal(run("parts", 2))
    assert run("parts", 4, resume=True).equal(whole)


def test_one_sample_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="estimator masks compares a prompt's samples"):
        tiny_config(tmp_path, estimator="masks", advantage="batch", samples_per_prompt=1).check()
