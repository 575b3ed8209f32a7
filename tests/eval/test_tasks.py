"""The registry, the loaders on small files of their own, and the real files where they are."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rlkv.errors import RLKVError
from rlkv_eval.tasks import get_task, task_names
from rlkv_eval.tasks.sources import fill, sample

SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
ROWS = {
    "gsm8k/test.jsonl": [{"question": "Two {and} two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}],
    "math500/test.jsonl": [
        {
            "problem": "Half of $1$?",
            "answer": "\\frac{1}{2}",
            "unique_id": "test/a/1.json",
            "subject": "a",
            "level": 1,
        }
    ],
    "aime24/test.jsonl": [{"id": 60, "problem": "Q", "answer": "033"}],
    "aime25/test.jsonl": [{"id": "0", "problem": "Q", "answer": 70}],
    "amc23/test.jsonl": [{"id": 0, "problem": "Q", "answer": 27.0}],
    "longreason/64k.jsonl": [{"example_idx": 3, "background": "B", "final_inquiry": "F {x}", "answer": "b"}],
}


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {
            "question_id": n,
            "question": f"Q{n}",
            "options": ["x", "y", "z"],
            "answer": "B",
            "category": subject,
        }
        for n, subject in enumerate(["law"] * 501 + ["computer science"] * 3)
    ]
    (tmp_path / "mmlu_pro").mkdir()
    with gzip.open(tmp_path / "mmlu_pro/test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "answer", "limit", "identity", "asked"),
    [
        ("gsm8k", "4", 8192, "gsm8k-0", "Two {and} two?"),
        ("math500", "\\frac{1}{2}", 8192, "test/a/1.json", "Half of $1$?"),
        ("aime24", "033", 16384, "aime24-60", "Q"),
        ("aime25", "70", 16384, "aime25-0", "Q"),
        ("amc23", "27", 8192, "amc23-0", "Q"),
    ],
)
def test_math_tasks(folder, name, answer, limit, identity, asked):
    task = get_task(name)
    (item,) = task.load(folder)
    assert (item.answer, item.id, item.task) == (answer, identity, name)
    assert (task.grader, task.max_new_tokens, task.name) == ("math", limit, name)
    instruction, problem = item.prompt.rsplit("\n\n", 1)
    assert problem == asked
    assert "'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct'" in instruction


def test_mmlu_pro(folder):
    computer, law = get_task("mmlu_pro_computer_science").load(folder), get_task("mmlu_pro_law").load(folder)
    assert len(computer) == 3 and len(law) == 500 and len({item.id for item in law}) == 500
    assert law == get_task("mmlu-pro law").load(folder), "the same draw every time"
    assert len(get_task("mmlu_pro").load(folder)) == 504
    assert "one of ABC. " in computer[0].prompt and computer[0].prompt.endswith("\n\nA) x\nB) y\nC) z")
    assert computer[0].answer == "B" and computer[0].extra["options"] == ["x", "y", "z"]
    with pytest.raises(RLKVError, match="no row has the category 'physics'"):
        get_task("mmlu_pro_physics").load(folder)


def test_longreason(folder):
    task = get_task("longreason")
    (item,) = task.load(folder)
    assert (item.id, item.answer, task.max_length) == ("longreason-3", "B", 71680)
    assert "\nB\n" in item.prompt and "\nF {x}\n" in item.prompt


def test_pocket_tasks_need_no_data():
    items = get_task("pocket").load(None)
    assert len(items) == 512 and {item.extra["kind"] for item in items[:3]} == {"resolve", "search", "ledger"}
    assert all(item.extra["kind"] == "recall" for item in get_task("pocket_recall").load(None))


def test_the_shuffle_is_that_of_datasets():
    datasets = pytest.importorskip("datasets")
    rows = [{"n": n} for n in range(1101)]
    theirs = datasets.Dataset.from_list(rows).shuffle(seed=42).select(range(500))
    assert sample(rows, 500) == list(theirs)


def test_any_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "P", "answer": 0}\n\n{"prompt": "Q", "answer": "1", "id": "b", "level": 3}\n')
    task = get_task(f"jsonl:{path}")
    first, second = task.load(None)
    assert (task.name, task.grader) == ("mine", "math")
    assert (first.id, first.answer, second.id, second.extra) == ("0", "0", "b", {"level": 3})
    assert get_task("jsonl[exact]:mine.jsonl").load(tmp_path)[0].prompt == "P"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "P"}', "row 1 has no answer"),
        ('{"prompt": " ", "answer": "1"}', "row 1 has no prompt"),
        ("{", "line 1 is not valid JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ("", "the file is empty"),
        (
            '{"prompt": "P", "answer": "1", "id": 1}\n{"prompt": "P", "answer": "1", "id": 1}',
            "repeats the id '1'",
        ),
    ],
)
def test_bad_jsonl_is_named(tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(RLKVError, match=says):
        get_task(f"jsonl:{tmp_path}/bad.jsonl").load(None)


def test_unknown_names():
    with pytest.raises(RLKVError, match="did you mean 'math500'"):
        get_task("math5000")
    with pytest.raises(RLKVError, match="no grader 'maths'"):
        get_task("jsonl[maths]:x.jsonl")
    assert get_task("math_500").name == "math500" and get_task("mmlu_pro_che").name == "mmlu_pro_chemistry"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RLKVError, match="none of gsm8k/test.jsonl, gsm8k.jsonl is in"):
        get_task("gsm8k").load(tmp_path)


def test_the_hub_is_asked_without_a_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "openai/gsm8k":
            raise ConnectionError("offline\ntrace")
        return datasets.Dataset.from_list(ROWS["gsm8k/test.jsonl"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert get_task("gsm8k").load(None)[0].answer == "4"
    assert asked == [("openai/gsm8k", "main", "test"), ("gsm8k", "main", "test")]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(RLKVError, match="cannot be read from the hub: openai/gsm8k .no network."):
        get_task("gsm8k").load(None)


def test_templates_keep_other_braces():
    assert fill("{a} \\boxed{ANSWER} {b}", a="{b}", b="2") == "{b} \\boxed{ANSWER} 2"
    with pytest.raises(RLKVError, match="no {c}"):
        fill("{a}", c="1")


@pytest.mark.parametrize(
    ("name", "count"),
    [("gsm8k", 1319), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40), ("mmlu_pro", 12032),
     ("mmlu_pro_chemistry", 500), ("mmlu_pro_computer_science", 410), ("mmlu_pro_law", 500)],
)  # fmt: skip
def test_real_files(name, count):
    if not (SHARED / "benchmarks").is_dir():
        pytest.skip(f"benchmarks not found: {SHARED} (set RLKV_SHARED_DATA)")
    items = get_task(name).load(SHARED / "benchmarks")
    assert len(items) == count == len({item.id for item in items})
    assert all(item.prompt and item.answer for item in items)


def test_every_registered_task_resolves():
    for name in task_names():
        assert get_task(name).name == name
