"""An evaluation's folder: going on after a kill, and never with answers that others gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import WINDOW, evaluation, save_problems

from rlkv.answers import read_rows
from rlkv.bench import EvalConfig
from rlkv.cli import main
from rlkv.config import load, save
from rlkv.data import Problem
from rlkv.errors import RLKVError
from rlkv.evaluate import evaluate
from rlkv.gates import HeadGates
from rlkv.window import Window

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    return evaluation(tmp_path_factory.mktemp("evaluate"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kept", [0, 1, 17, 34])
def test_a_killed_run_goes_on_to_the_same_result(config: EvalConfig, tmp_path: Path, kept: int) -> None:
    whole = evaluate(replace(config, output=str(tmp_path / "whole")))
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines(keepends=True)
    broken = tmp_path / "broken"
    evaluate(replace(config, output=str(broken)))
    (broken / "rows.jsonl").write_text("".join(lines[:kept]) + lines[kept][:15])  # killed in mid-line
    assert evaluate(replace(config, output=str(broken))) == whole
    again = (broken / "rows.jsonl").read_text().splitlines(keepends=True)
    assert again[:kept] == lines[:kept]
    assert sorted(again) == sorted(lines)


def test_rows_that_are_there_are_not_answered_again(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(config, output=str(tmp_path), n=3, sparsities=[0.25], random_masks=1)
    evaluate(small)
    asked: list[int] = []
    from rlkv.sampler import Sampler

    generate = Sampler.generate

    def counting(self: Sampler, prompts: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, *rest, **options)

    monkeypatch.setattr(Sampler, "generate", counting)
    evaluate(small)
    assert sum(asked) == 0
    evaluate(replace(small, n=5, random_masks=2, chunk=4))  # 3 masks x 2 new problems, 1 new mask x 5
    assert sum(asked) == 11 and max(asked) <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 23}, "max_new_tokens=24, now it is 23"),
        ({"prefill": "local"}, "prefill=full, now it is local"),
        ({"window": Window(2, 7)}, "window=2\\+6, now it is 2\\+7"),
    ],
)
def test_rows_of_other_settings_are_not_mixed(
    config: EvalConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    small = replace(config, output=str(tmp_path), n=2, sparsities=[0.25], random_masks=1)
    evaluate(small)
    with pytest.raises(RLKVError, match=message):
        evaluate(replace(small, **change))


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C at the verdict after so many."""
    verdicts = iter([1.0] * after)

    def reward(text: str, problem: Problem) -> float:
        try:
            return next(verdicts)
        except StopIteration:
            raise KeyboardInterrupt from None

    reward.grades_truncated = True  # type: ignore[attr-defined]
    monkeypatch.setattr("tiny_folder.parity", reward)


def test_a_folder_without_answers_takes_other_settings(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(config, output=str(tmp_path), n=2, methods=["rlkv"], sparsities=[0.9])
    right = replace(wrong, sparsities=[0.25], window=Window(1, 5), max_new_tokens=12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=0)
        evaluate(wrong)
    found = evaluate(right)
    assert found == evaluate(replace(right, output=str(tmp_path / "fresh")))
    assert {row["mask"] for row in rows_of(tmp_path)} == {"full", "rlkv-0.25"}
    assert {path.stem for path in (tmp_path / "masks").iterdir()} == {"full", "rlkv-0.25"}


def test_one_answer_is_enough_to_refuse_other_settings(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(config, output=str(tmp_path), n=2, methods=["rlkv"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=1)
        evaluate(small)
    assert len(rows_of(tmp_path)) == 1
    with pytest.raises(RLKVError, match="max_new_tokens=24, now it is 12"):
        evaluate(replace(small, max_new_tokens=12))
    with pytest.raises(RLKVError, match="window=2.6, now it is 1.3"):
        evaluate(replace(small, gates=str(meant_for(small.gates, "1+3", tmp_path / "gates"))))


def meant_for(gates: str, window: str, folder: Path) -> Path:
    """The same gates with another window to deploy."""
    return HeadGates.load(gates).save(folder, deploy_window=window)


@pytest.mark.parametrize("found", ["config.yaml", "rows.jsonl"])
def test_a_folder_of_something_else_is_refused(config: EvalConfig, tmp_path: Path, found: str) -> None:
    here = replace(config, output=str(tmp_path))
    if found == "config.yaml":
        content = "learning_rate: 0.01\nmodel: pocket\n"
    else:
        evaluate(replace(here, output=str(tmp_path / "other"), n=1))
        content = (tmp_path / "other" / found).read_text()
    (tmp_path / found).write_text(content)
    with pytest.raises(RLKVError, match="another command|without config.yaml"):
        evaluate(here)
    assert (tmp_path / found).read_text() == content


def test_the_config_written_names_what_empty_settings_came_to(config: EvalConfig, tmp_path: Path) -> None:
    small = replace(config, output=str(tmp_path), n=1, methods=["rlkv"])
    evaluate(small)
    written = load(EvalConfig, tmp_path / "config.yaml")
    model = json.loads((Path(config.gates) / "card.json").read_text())["config"]["model"]
    assert (written.model, written.window, written.dtype) == (model, WINDOW, "float32")
    for again in (written, replace(written, gates=str(meant_for(small.gates, "1+3", tmp_path / "gates")))):
        evaluate(again)  # given back, it goes on whatever the gates have come to say since


def test_a_folder_of_an_older_version_goes_on(config: EvalConfig, tmp_path: Path) -> None:
    """Its config.yaml holds empty settings as they were given."""
    small = replace(config, output=str(tmp_path), n=2, methods=["rlkv"])
    whole = evaluate(small)
    save(small, tmp_path / "config.yaml")
    assert evaluate(small) == whole


def test_answers_to_problems_that_have_changed_are_not_reported(config: EvalConfig, tmp_path: Path) -> None:
    """Problems without an id of their own are numbered by line: others of the same number are others."""
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    path = tmp_path / "problems.jsonl"

    def write(*rows: dict[str, Any]) -> None:
        path.write_text(
            "".join(json.dumps({key: row[key] for key in ("prompt", "answer")}) + "\n" for row in rows)
        )

    small = replace(config, data=str(path), output=str(tmp_path / "out"), n=0, methods=["rlkv"])
    write(*rows[:2])
    evaluate(small)
    write(*rows[:3])  # more problems may come
    whole = evaluate(small)
    for changed in ({"prompt": "search a=11"}, {"answer": "11"}):
        write(rows[0], rows[1] | changed, rows[2])
        with pytest.raises(RLKVError, match="an answer to another problem '1'"):
            evaluate(small)
    write(*rows[:3])
    assert evaluate(small) == whole


def test_rows_of_older_versions_are_read(config: EvalConfig, tmp_path: Path) -> None:
    """They hold no digest of the problem."""
    small = replace(config, output=str(tmp_path), methods=["rlkv"])
    whole = evaluate(small)
    rows = rows_of(tmp_path)
    assert all(row.pop("digest") for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(small) == whole
    assert "digest" not in rows_of(tmp_path)[0]  # nothing was answered again


def test_problems_with_the_same_id_are_refused(config: EvalConfig, tmp_path: Path) -> None:
    path = save_problems(tmp_path / "twice.jsonl", 2)
    path.write_text(path.read_text() * 2)
    with pytest.raises(RLKVError, match="two problems have the id 'even/0'"):
        evaluate(replace(config, data=str(path), output=str(tmp_path / "out")))


def test_a_file_that_is_not_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"mask": "full"}\n')
    with pytest.raises(RLKVError, match="line 1 is not a row"):
        read_rows(tmp_path / "rows.jsonl")


def test_what_can_be_refused_without_the_model_is(config: EvalConfig, tmp_path: Path) -> None:
    """Loading one takes minutes."""
    here = replace(config, output=str(tmp_path), n=1, methods=["rlkv"])
    evaluate(here)
    nowhere = replace(here, model="/nowhere")
    with pytest.raises(RLKVError, match="now it is /nowhere"):
        evaluate(nowhere)
    with pytest.raises(RLKVError, match="none.jsonl: no such file"):
        evaluate(replace(nowhere, output=str(tmp_path / "new"), data="none.jsonl"))
    with pytest.raises(RLKVError, match="model '/nowhere' could not be loaded"):
        evaluate(replace(nowhere, output=str(tmp_path / "new")))


def test_ctrl_c_says_how_to_go_on(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(replace(config, output=str(tmp_path)), tmp_path / "mine.yaml")
    interrupt(monkeypatch, after=2)
    assert main(["eval", str(tmp_path / "mine.yaml")]) == 130
    assert f"in {tmp_path}: the same command goes on" in capsys.readouterr().out
