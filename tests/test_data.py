"""Prompt sets: reading, bad input named precisely, the length filter, the order of an epoch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from training_kit import TinyTokenizer, write_prompts

from rlkv.data import PromptSet
from rlkv.errors import RLKVError


def test_jsonl_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(
        '{"problem": "1+1?", "gold": 2, "id": 7, "level": "easy"}\n\n{"problem": "x", "gold": "y"}\n'
    )
    found = PromptSet.from_jsonl(path, prompt="problem", answer="gold", template="Solve: {prompt} {now}")
    first, second = found.problems
    assert (first.prompt, first.answer, first.id) == ("Solve: 1+1? {now}", "2", "7")
    assert first.extra == {"level": "easy"} and second.id == "1"


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text('[{"prompt": "a", "answer": "b"}]')
    assert PromptSet.from_spec(str(path), "train").problems[0].prompt == "a"


def test_gold_answers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": r"\frac{1}{2}"}))
    assert PromptSet.from_jsonl(path).problems[0].answer == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"question": "a", "answer": "b"}', "a.jsonl.*no column 'prompt'.*question, answer"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": ', "a.jsonl: line 2 is not valid JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.jsonl", '{"prompt": "a", "answer": null}', r"set is empty \(1 rows have an empty"),
        ("a.jsonl", "\n", "empty"),
        ("a.json", "{}", "array"),
        ("a.json", "[\n{]", "line 2 is not valid JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RLKVError, match=match):
        PromptSet.from_jsonl(tmp_path / name)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "où", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(RLKVError, match=r"latin.jsonl: not UTF-8 text \(byte 13 is 0xf9\)"):
        PromptSet.from_jsonl(path)


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RLKVError, match="no such file"):
        PromptSet.from_spec(str(tmp_path / "nothing.jsonl"), "train")
    with pytest.raises(RLKVError, match="no prompt set"):
        PromptSet.from_spec("", "train")
    with pytest.raises(RLKVError, match="does not contain {prompt}"):
        PromptSet.from_rows([], "x", template="no place")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RLKVError, match="pip install datasets"):
        PromptSet.from_spec("someone/set", "train")


def test_hub_client_on_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    assert len(PromptSet.from_hub(str(tmp_path / "set")).problems) == 3
    with pytest.raises(RLKVError, match="could not load split 'test'"):
        PromptSet.from_hub(str(tmp_path / "set"), "test")


def test_long_prompts_are_skipped_aloud(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * length, "answer": "1"} for length in (5, 50, 14)]
    said: list[str] = []
    encoded = PromptSet.from_rows(rows, "mine").encode(TinyTokenizer(), 20, said.append)
    assert [len(tokens) for tokens in encoded.tokens] == [
        11,
        20,
    ]  # <u> and <a> add six; the limit is inclusive
    assert encoded.skipped == 1 and "SKIPPED 1 of 3" in said[0] and "longest has 56" in said[0]
    with pytest.raises(RLKVError, match="all 3 prompts are longer than 10.*longest has 56"):
        PromptSet.from_rows(rows, "mine").encode(TinyTokenizer(), 10)


def test_open_thought_is_noticed() -> None:
    class Thinker(TinyTokenizer):
        def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
            return "q<think>" if messages[0]["content"] == "hard" else "q<think></think>"

    rows = [{"prompt": "hard", "answer": "1"}, {"prompt": "easy", "answer": "1"}]
    assert PromptSet.from_rows(rows, "mine").encode(Thinker(), 99).thinking == [True, False]


def test_rows_without_an_answer_are_skipped_aloud() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": " "},
        {"prompt": None, "answer": "2"},
    ]
    said: list[str] = []
    assert len(PromptSet.from_rows(rows, "mine").encode(TinyTokenizer(), 99, said.append)) == 1
    assert "SKIPPED 2 rows with an empty prompt or answer" in said[0]


def test_no_chat_template() -> None:
    tokenizer = TinyTokenizer()
    tokenizer.chat_template = ""
    with pytest.raises(RLKVError, match="no chat template"):
        PromptSet.from_rows([{"prompt": "a", "answer": "b"}], "mine").encode(tokenizer, 99)


def test_order_is_seeded_by_epoch(tmp_path: Path) -> None:
    encoded = PromptSet.from_jsonl(write_prompts(tmp_path / "p.jsonl", 50)).encode(TinyTokenizer(), 99)
    orders = [encoded.order(epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert encoded.order(1, 1) == orders[3]


def test_shared_math_files_read() -> None:
    root = Path(os.environ.get("RLKV_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "benchmarks" / "deepscaler" / "train_math.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set RLKV_SHARED_DATA")
    found = PromptSet.from_jsonl(path, prompt="problem")
    assert len(found.problems) > 7000 and any("\\frac" in problem.answer for problem in found.problems)
