"""Single-head ablation against one head, one answer and the reference attention at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folder import WINDOW, save_model, save_problems

from rlkv.ablation import ablate, rank_scores, single_head_logprobs
from rlkv.attention import Mixed
from rlkv.bench import Bench, EvalConfig
from rlkv.errors import RLKVError
from rlkv.evaluate import evaluate
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    folder = tmp_path_factory.mktemp("ablation")
    return EvalConfig(
        model=str(save_model(folder / "model")),
        data=str(save_problems(folder / "test.jsonl")),
        ablation_data=str(save_problems(folder / "dev.jsonl", start=50)),
        methods=["ablation"],
        window=WINDOW,
        reward="tiny_folder:parity",
        max_new_tokens=16,
        slots=16,
        device="cpu",
    )


def test_log_probabilities_are_those_of_the_reference_one_head_at_a_time(config: EvalConfig) -> None:
    bench = Bench(config)
    answers = [([5, 6, 7], [8, 9, 10, 11] * 6), ([12] * 9, [13, 14] * 10)]
    found = single_head_logprobs(bench, answers)
    for layer in range(3):
        for head in range(3):
            gates = torch.ones(3, 3)
            gates[layer, head] = 0
            total = 0.0
            for prompt, answer in answers:
                ids = torch.tensor([prompt + answer])
                mixed = Mixed(gates, WINDOW, path="reference")
                logits = bench.model(ids, rlkv=mixed, use_cache=False).logits[0].double().log_softmax(-1)
                for place in range(len(prompt), ids.shape[1]):
                    total += logits[place - 1, ids[0, place]].item()
            assert found[layer, head].item() == pytest.approx(total / 44, abs=1e-5)
    assert found.std() > 1e-4


def test_ties_in_accuracy_are_broken_by_likelihood() -> None:
    first = torch.tensor([[3.0, 3.0], [1.0, 5.0]])
    second = torch.tensor([[0.2, 0.1], [9.0, -9.0]])
    assert torch.equal(rank_scores(first, second), torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0]]))
    assert torch.equal(rank_scores(torch.zeros(1, 3), torch.zeros(1, 3)), torch.zeros(1, 3))


def test_scores_rank_by_what_each_head_alone_costs(config: EvalConfig, tmp_path: Path) -> None:
    bench = Bench(config)
    scores = ablate(bench, tmp_path)
    card = HeadGates.load(tmp_path, model=bench.model).card
    accuracy, logprob = torch.tensor(card["accuracy"]), torch.tensor(card["logprob"])
    order = sorted(range(9), key=lambda i: (-accuracy.flatten()[i], -logprob.flatten()[i]))
    assert scores.values.flatten().argsort().tolist() == order
    assert accuracy.unique().numel() > 1
    again = ablate(bench, tmp_path)
    assert torch.equal(again.values, scores.values)


def test_eval_takes_its_masks_from_the_scores(config: EvalConfig, tmp_path: Path) -> None:
    results = evaluate(replace(config, output=str(tmp_path), sparsities=[1 / 3]))
    assert [row["method"] for row in results["methods"]] == ["full", "ablation"]
    assert results["methods"][1]["sparsity"] == pytest.approx(1 / 3)
    scores = HeadGates.load(tmp_path / "ablation").values
    full = HeadMask.load(tmp_path / "masks" / "ablation-0.333333.json").full
    assert scores[~full].max() < scores[full].min()


def test_the_reported_problems_are_not_used_to_choose(config: EvalConfig, tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="other problems than those reported"):
        ablate(Bench(replace(config, ablation_data=config.data)), tmp_path)
