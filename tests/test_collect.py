"""Self-distillation sampling: what is kept, the buckets, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_kit import TinyTokenizer, write_prompts
from training_kit import tiny_model as endless_model

from rlkv.collect import CollectConfig, Report, collect, draw
from rlkv.data import Problem, PromptSet
from rlkv.errors import RLKVError
from rlkv.rewards import Verdict
from rlkv.sampler import Sampler, SamplingParams
from rlkv.window import Window


def tiny_model() -> Any:
    """Greedy answers of a random model go round in circles: many stop tokens make most of them end."""
    model = endless_model()
    model.generation_config.eos_token_id = list(range(1, 9))
    return model


def solved_if_even(text: str, problem: Problem) -> Verdict:
    """An arbitrary, repeatable judgement of a finished answer."""
    right = len(text.split()) % 2 == 0
    return Verdict(float(right), "correct" if right else "wrong")


def config(folder: Path, **changes: Any) -> CollectConfig:
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        model="tiny",
        data=str(write_prompts(folder / "prompts.jsonl", 40)),
        output=str(folder / "out"),
        prompt_column="prompt",
        prompt_template="{prompt}",
        reward=f"{__name__}:solved_if_even",
        max_prompt_tokens=40,
        max_new_tokens=24,
        bucket_edges=[0, 4, 12, 24],
        bucket_counts=[3, 2, 2],
        slots=7,
    )
    return CollectConfig(**{**settings, **changes})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_keeps_what_the_model_solves_greedily(tmp_path: Path) -> None:
    """Every row agrees with a greedy answer made alone, with the full cache."""
    settings = config(tmp_path)
    model = tiny_model()
    report = collect(settings, model, TinyTokenizer(), say=lambda text: None)
    rows = {row["row"]: row for row in read(tmp_path / "out" / "candidates.jsonl")}
    encoded = PromptSet.from_jsonl(settings.data).encode(TinyTokenizer(), 40)
    sampler = Sampler(model, Window(0, 1), slots=1, max_length=64)
    greedy = SamplingParams(max_new_tokens=24, temperature=0.0)
    assert sorted(rows) == list(range(40))
    for index, tokens in enumerate(encoded.tokens):
        done = sampler.generate([tokens], greedy)[0]
        assert rows[index]["output_tokens"] == len(done.tokens)
        solved = done.finish == "stop" and (len(done.tokens) - 1) % 2 == 0
        assert rows[index]["score"] == float(solved)
    train = read(tmp_path / "out" / "train.jsonl")
    assert train and len(train) == sum(report.train)
    assert all(rows[int(row["id"])]["score"] == 1 for row in train)
    assert PromptSet.from_jsonl(tmp_path / "out" / "train.jsonl").problems[0].answer == "1"


def fake_rows(lengths: list[int], score: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "row": i,
            "id": str(i),
            "prompt": "p",
            "answer": "a",
            "output_tokens": n,
            "score": score,
            "kind": "x",
        }
        for i, n in enumerate(lengths)
    ]


def test_buckets_are_drawn_seeded_and_held_out_is_apart(tmp_path: Path) -> None:
    rows = fake_rows([1, 4] * 10 + [5, 12] * 10 + [13, 24] * 10 + [25] * 5)
    settings = config(tmp_path, held_out=7, bucket_counts=[6, 4, 4])
    (tmp_path / "out").mkdir()
    report = draw(settings, rows, 0, lambda text: None)
    train, test = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "test"))
    assert report.available == [20, 20, 20] and report.train == [6, 4, 4] and report.test == [3, 2, 2]
    assert [
        sum(low < row["output_tokens"] <= high for row in train) for low, high in ((0, 4), (4, 12), (12, 24))
    ]
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    draw(settings, rows[::-1], 0, lambda text: None)  # candidates end in another order after a kill
    assert read(tmp_path / "out" / "train.jsonl") == train
    settings.seed = 2
    draw(settings, rows, 0, lambda text: None)
    assert read(tmp_path / "out" / "train.jsonl") != train


def test_shortfall_is_said_and_reported(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "out").mkdir()
    report = draw(config(tmp_path), fake_rows([1, 2, 3, 4, 7]), 3, said.append)
    assert report.train == [3, 1, 0] and report.shortfall == 3 and report.skipped_prompts == 3
    assert [line for line in said if "SHORTFALL" in line] == [
        "SHORTFALL: 1 of 2 training problems with 4-12 tokens of answer",
        "SHORTFALL: 0 of 2 training problems with 12-24 tokens of answer",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["shortfall"] == 3


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(config(tmp_path / "a"), tiny_model(), TinyTokenizer(), say=lambda text: None)
    settings = config(tmp_path / "b")
    generate, asked = Sampler.generate, []

    def killed(self: Sampler, prompts: Any, params: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        keep, seen = options["on_finish"], []

        def some(completion: Any) -> None:
            keep(completion)
            seen.append(completion)
            if len(seen) == 15:
                raise SystemExit

        return generate(self, prompts, params, on_finish=some if len(asked) == 1 else keep)

    monkeypatch.setattr(Sampler, "generate", killed)
    with pytest.raises(SystemExit):
        collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)
    candidates = tmp_path / "b" / "out" / "candidates.jsonl"
    with candidates.open("a") as file:
        file.write('{"row": 3, "id')  # the kill came in the middle of a line
    again = collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)
    assert asked == [40, 25] and again == whole
    rows = [read(tmp_path / name / "out" / "train.jsonl") for name in "ab"]
    assert rows[0] == rows[1] and len(read(candidates)) == 40
    collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)
    assert len(asked) == 2  # nothing is asked again


def test_a_folder_is_not_mixed_up(tmp_path: Path) -> None:
    settings = config(tmp_path)
    collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)
    settings.max_new_tokens = 20
    with pytest.raises(RLKVError, match="was made with max_new_tokens=24, now it is 20"):
        collect(settings, tiny_model(), TinyTokenizer())


def test_candidates_that_have_changed_are_not_used(tmp_path: Path) -> None:
    settings = config(tmp_path)
    collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)
    path = Path(settings.data)
    path.write_text(path.read_text().replace("question 7 of", "problem 7 of"))
    with pytest.raises(RLKVError, match="its candidates are not those of"):
        collect(settings, tiny_model(), TinyTokenizer(), say=lambda text: None)


def test_another_draw_leaves_no_held_out_problems_of_an_earlier_one(tmp_path: Path) -> None:
    rows = fake_rows([1, 4] * 5)
    settings = config(tmp_path, bucket_edges=[0, 24], bucket_counts=[4], held_out=2)
    (tmp_path / "out").mkdir()
    draw(settings, rows, 0, lambda text: None)
    assert len(read(tmp_path / "out" / "test.jsonl")) == 2
    settings.bucket_counts, settings.held_out = [6], 0
    draw(settings, rows, 0, lambda text: None)
    assert len(read(tmp_path / "out" / "train.jsonl")) == 6
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_a_failed_first_run_does_not_bind_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the data can't be read, nor when not one answer was finished."""
    with pytest.raises(RLKVError, match="no column 'gold'"):
        collect(config(tmp_path, answer_column="gold"), tiny_model(), TinyTokenizer())
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Sampler, "generate", lambda *args, **options: (_ for _ in ()).throw(MemoryError))
        collect(config(tmp_path, max_new_tokens=40), tiny_model(), TinyTokenizer(), say=lambda text: None)
    report = collect(config(tmp_path), tiny_model(), TinyTokenizer(), say=lambda text: None)
    assert report.candidates == 40
    assert json.loads((tmp_path / "out" / "collect.json").read_text())["max_new_tokens"] == 24


def test_max_candidates(tmp_path: Path) -> None:
    report = collect(
        config(tmp_path, max_candidates=10), tiny_model(), TinyTokenizer(), say=lambda text: None
    )
    assert isinstance(report, Report) and report.candidates == 10


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bucket_edges": [0, 4, 12]}, "one more than bucket_counts"),
        ({"bucket_edges": [0, 12, 4, 24]}, "must rise"),
        ({"bucket_counts": [0, 0, 0]}, "not all 0"),
        ({"held_out": -1}, "held_out"),
        ({"slots": 0}, "slots must be 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 1 or more"),
        ({"reward": "exact"}, "none of 40 candidates was solved.*no_answer"),
        ({"answer_column": "gold"}, "no column 'gold'"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RLKVError, match=match):
        collect(config(tmp_path, **changes), tiny_model(), TinyTokenizer(), say=lambda text: None)
