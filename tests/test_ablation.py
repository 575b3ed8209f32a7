"""Single-head ablation against one head, one answer and the reference attention at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from rlkv.window import Window

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


def test_eval_takes_its_masks_from_the_scores(config: EvalConfig, tmp_path: Path) -> None:
    results = evaluate(replace(config, output=str(tmp_path), sparsities=[1 / 3]))
    assert [row["method"] for row in results["methods"]] == ["full", "ablation"]
    assert results["methods"][1]["sparsity"] == pytest.approx(1 / 3)
    scores = HeadGates.load(tmp_path / "ablation").values
    full = HeadMask.load(tmp_path / "masks" / "ablation-0.333333.json").full
    assert scores[~full].max() < scores[full].min()


@pytest.fixture(scope="module")
def scored(config: EvalConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished ablation."""
    folder = tmp_path_factory.mktemp("scored")
    ablate(Bench(config), folder)
    return folder


def unfinished(scored: Path, folder: Path) -> Path:
    """What a kill after three answers leaves."""
    shutil.copytree(scored, folder)
    (folder / "gates.tsv").unlink()
    (folder / "card.json").unlink()
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:3]))
    return folder


def test_scores_that_are_there_are_not_computed_again(
    config: EvalConfig, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("rlkv.ablation.score_heads")
    assert torch.equal(ablate(Bench(config), scored).values, HeadGates.load(scored).values)


def test_a_killed_scoring_goes_on_to_the_same_scores(
    config: EvalConfig, scored: Path, tmp_path: Path
) -> None:
    folder = unfinished(scored, tmp_path / "killed")
    first = (folder / "rows.jsonl").read_text()
    assert torch.equal(ablate(Bench(config), folder).values, HeadGates.load(scored).values)
    assert (folder / "rows.jsonl").read_text().startswith(first)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": Window(1, 5)}, "window=2.6, now it is 1.5"),
        ({"prefill": "local"}, "prefill=full, now it is local"),
        ({"max_new_tokens": 15}, "max_new_tokens=16, now it is 15"),
        ({"reward": "exact"}, "reward=tiny_folder:parity, now it is exact"),
        ({"dtype": "bfloat16"}, "dtype=float32, now it is bfloat16"),
        ({"ablation_problems": 4}, "development problems=5 .*, now it is 4 "),
        ({"prompt_template": "{prompt};"}, "development problems=5 .*, now it is 5 "),
    ],
)
def test_scores_of_other_settings_are_refused(
    config: EvalConfig, scored: Path, tmp_path: Path, finished: bool, change: dict[str, Any], message: str
) -> None:
    folder = scored if finished else unfinished(scored, tmp_path / "killed")
    with pytest.raises(RLKVError, match=f"{folder} holds head scores with {message}.*or delete {folder}$"):
        ablate(Bench(replace(config, **change)), folder)


def test_scores_of_other_development_problems_are_refused(
    config: EvalConfig, scored: Path, tmp_path: Path
) -> None:
    same = shutil.copy(config.ablation_data, tmp_path / "moved.jsonl")
    ablate(Bench(replace(config, ablation_data=str(same))), scored)
    others = save_problems(tmp_path / "others.jsonl", start=60)
    with pytest.raises(RLKVError, match="holds head scores with development problems=5 "):
        ablate(Bench(replace(config, ablation_data=str(others))), scored)


def test_scores_of_unknown_settings_are_refused(config: EvalConfig, scored: Path, tmp_path: Path) -> None:
    folder = unfinished(scored, tmp_path / "old")
    (folder / "settings.yaml").unlink()
    with pytest.raises(RLKVError, match="without settings.yaml"):
        ablate(Bench(config), folder)


def test_a_scoring_without_answers_takes_other_settings(
    config: EvalConfig, scored: Path, tmp_path: Path
) -> None:
    folder = unfinished(scored, tmp_path / "empty")
    (folder / "rows.jsonl").write_text("")
    short = Bench(replace(config, max_new_tokens=15))
    assert ablate(short, folder).window == WINDOW
    with pytest.raises(RLKVError, match="max_new_tokens=15, now it is 16"):
        ablate(Bench(config), folder)


def test_an_evaluation_may_take_the_method_in_later(config: EvalConfig, tmp_path: Path) -> None:
    small = replace(config, output=str(tmp_path), methods=["random"], sparsities=[1 / 3], random_masks=1)
    evaluate(small)
    later = replace(small, methods=["random", "ablation"], ablation_problems=4)
    assert [row["method"] for row in evaluate(later)["methods"]] == ["full", "random", "ablation"]
    with pytest.raises(RLKVError, match="holds head scores with development problems=4 .*, now it is 3 "):
        evaluate(replace(later, ablation_problems=3))


@pytest.fixture(scope="module")
def evaluated(config: EvalConfig, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """A finished evaluation; tests copy its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    made = replace(config, output=str(folder), n=2, sparsities=[1 / 3], ablation_problems=2)
    evaluate(made)
    return made


def copied(evaluated: EvalConfig, tmp_path: Path) -> EvalConfig:
    return replace(evaluated, output=str(shutil.copytree(evaluated.output, tmp_path / "copy")))


def test_answered_masks_are_kept_when_other_scores_are_asked_for(
    evaluated: EvalConfig, tmp_path: Path
) -> None:
    """Deleting their scores alone would lead to other masks, hours later."""
    mine = copied(evaluated, tmp_path)
    with pytest.raises(RLKVError, match="development problems=2 .*, now it is 3 .*: choose another output$"):
        evaluate(replace(mine, ablation_problems=3))
    (Path(mine.output) / "rows.jsonl").unlink()
    with pytest.raises(RLKVError, match="or delete .*ablation$"):
        evaluate(replace(mine, ablation_problems=3))


@pytest.mark.parametrize("problems", [2, 3])
def test_answered_masks_whose_scores_are_gone_are_refused_before_scoring(
    evaluated: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: int
) -> None:
    mine = copied(evaluated, tmp_path)
    shutil.rmtree(Path(mine.output) / "ablation")
    monkeypatch.delattr("rlkv.ablation.score_heads")
    with pytest.raises(RLKVError, match="gates.tsv: no such head scores.*or choose another output$"):
        evaluate(replace(mine, ablation_problems=problems))
    assert not (Path(mine.output) / "ablation").exists()


def test_answers_of_other_head_scores_are_not_mixed_at_another_sparsity(
    evaluated: EvalConfig, tmp_path: Path
) -> None:
    mine = copied(evaluated, tmp_path)
    folder = Path(mine.output) / "ablation"
    gates = HeadGates.load(folder)
    gates.values = 1 - gates.values
    gates.save(folder)
    with pytest.raises(RLKVError, match="ablation-0.333333.json is another mask .*or head scores"):
        evaluate(replace(mine, sparsities=[2 / 3]))


def test_the_reported_problems_are_not_used_to_choose(config: EvalConfig, tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="other problems than those reported"):
        ablate(Bench(replace(config, ablation_data=config.data)), tmp_path)
