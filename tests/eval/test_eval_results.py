"""Result folders: written and read back, torn and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_kit import make_row

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.window import Window
from rlkv_eval.results import (
    Row,
    load_results,
    recover_rows,
    row_line,
    run_name,
    task_folder,
    write_info,
    write_rows,
)


def save_run(folder: Path, rows: list[Row], **info: object) -> Path:
    folder.mkdir(parents=True)
    facts = {"task": "alpha", "method": "full", "sparsity": 0.0, "seed": 0, "answers": len(rows)}
    write_info(folder, facts | info)
    write_rows(folder / "rows.jsonl", rows)
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [make_row(id=f"{n}", sample=s, text="ä\u2028\n'\"\ud7ff\x85") for n in (2, 10, 1) for s in (1, 0)]
    save_run(tmp_path / "alpha" / "full", rows)
    found = load_results(tmp_path).runs[0]
    assert list(found.rows) == sorted(rows, key=lambda row: row.key)
    assert found.complete and not found.repeat and found.mask() is None


def test_results_by_task_method_and_sparsity(tmp_path: Path) -> None:
    rows = [make_row()]
    for task in ("beta", "alpha"):
        save_run(tmp_path / task / "full", rows, task=task)
        save_run(tmp_path / task / "full-repeat", rows, task=task)
        for draw in (1, 0):
            name = run_name("random", 0.25, draw)
            save_run(tmp_path / task / name, rows, task=task, method="random", sparsity=0.25, seed=draw)
    mask = HeadMask.random(4, 4, 0.4, window=Window(4, 16))
    folder = tmp_path / "alpha" / run_name("rlkv", 0.4)
    save_run(folder, rows, method="rlkv", sparsity=0.4, true_sparsity=mask.sparsity)
    mask.save(folder / "mask.json")
    found = load_results(tmp_path)
    assert found.tasks == ["alpha", "beta"] and found.methods == ["full", "random", "rlkv"]
    assert found.sparsities == [0.25, 0.4]
    assert [run.seed for run in found.find("beta", "random", 0.25)] == [0, 1]
    full, repeat = found.full("alpha"), found.repeat("alpha")
    assert full and full.name == "full" and repeat and repeat.name == "full-repeat"
    assert [run.name for run in found.find("alpha", "full")] == ["full"]
    (run,) = found.find("alpha", "rlkv")
    assert run.true_sparsity == 0.375
    loaded = run.mask()
    assert loaded is not None and loaded.full.equal(mask.full)


def test_a_torn_last_line_is_left_out_by_readers_and_removed_by_the_writer(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "alpha" / "full", [make_row(), make_row(sample=1)], answers=3)
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    torn = row_line(make_row(sample=2, text="ü")).encode()
    for length in range(1, len(torn)):
        path.write_bytes(whole + torn[:length])
        run = load_results(tmp_path).runs[0]
        assert len(run.rows) == 2 and not run.complete
    assert path.read_bytes() != whole  # reading changed nothing
    assert len(list(recover_rows(path))) == 2 and path.read_bytes() == whole


def test_what_is_not_a_result_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="holds no evaluation"):
        load_results(tmp_path)
    (tmp_path / "shard-0-of-2").mkdir()
    with pytest.raises(RLKVError, match="rlkv-eval merge"):
        load_results(tmp_path)
    folder = save_run(tmp_path / "alpha" / "full", [make_row()])
    line = json.loads(row_line(make_row(id="1")))
    path = folder / "rows.jsonl"
    for broken in ({**line, "more": 1}, {key: line[key] for key in line if key != "kind"}, [1]):
        path.write_text(row_line(make_row()) + json.dumps(broken) + "\n")
        with pytest.raises(RLKVError, match="rows.jsonl: line 2 is not a row"):
            load_results(tmp_path)
    (folder / "run.json").write_text("{}")
    path.write_text("")
    with pytest.raises(RLKVError, match="lacks 'task'"):
        load_results(tmp_path)
    (folder / "run.json").write_text("{")
    with pytest.raises(RLKVError, match="run.json cannot be read"):
        load_results(tmp_path)


def test_names_of_folders() -> None:
    assert run_name("full", 0.0) == "full"
    assert run_name("rlkv", 0.5) == "rlkv-s0.5" and run_name("random", 0.25, 3) == "random-s0.25-seed3"
    assert task_folder("math500") == "math500"
    assert task_folder("jsonl[exact]:/data/my set.jsonl") == "jsonl_exact_data_my_set.jsonl"
    assert task_folder("jsonl:../..") == "jsonl"
