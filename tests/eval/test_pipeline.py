"""The whole pipeline on the pocket reasoner: every method, then tables and figures; SIGKILL; shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlkv import HeadGates, pocket
from rlkv.support import check_model
from rlkv_eval import plan
from rlkv_eval.cli import main
from rlkv_eval.methods.base import METHODS
from rlkv_eval.results import Results, load_results
from rlkv_eval.tasks.base import get_task

torch.set_num_threads(1)
pytestmark = pytest.mark.xdist_group("pipeline")  # one process: its fixtures take a while

TASKS = ("pocket_recall", "pocket_resolve")
N, NEW_TOKENS, SPARSITY = 4, 48, 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random gates for the pocket reasoner, and development problems that are quick to answer."""
    folder = tmp_path_factory.mktemp("pipeline")
    shape = check_model(pocket.load()[0])
    values = torch.rand(shape.layers, shape.kv_heads, generator=torch.Generator().manual_seed(0))
    HeadGates(values, window=pocket.WINDOW, model=shape).save(folder / "gates", config={"model": "pocket"})
    rows = pocket.problems("recall", "dev", 2)
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(home: Path, output: Path, *more: str) -> list[str]:
    """``rlkv-eval run`` on a few problems; half of their answers are cut, which is as good here."""
    return [
        "run",
        "model=pocket",
        f"gates={home}/gates",
        f"tasks={','.join(TASKS)}",
        f"n={N}",
        f"max_new_tokens={NEW_TOKENS}",
        f"output={output}",
        "device=cpu",
        "slots=8",
        *more,
    ]


@pytest.fixture(scope="module")
def results(home: Path) -> Results:
    """Every method at no sparsity and at half."""
    methods = [
        f"methods={','.join(METHODS)}",
        f"sparsities=0,{SPARSITY}",
        "draws=1",
        "noise_floor=true",
        f"calibration=jsonl[exact]:{home}/dev.jsonl",
        "calibration_problems=2",
        "options.ablation.max_new_tokens=12",
        "options.duo.training.steps=2",
    ]
    assert main(words(home, home / "all", *methods)) == 0
    return load_results(home / "all")


def test_every_method_answers_every_problem(results: Results) -> None:
    assert set(results.methods) == set(METHODS) and set(results.tasks) == set(TASKS)
    assert all(run.complete and len(run.rows) == N for run in results.runs)
    kinds = {row.kind for run in results.runs for row in run.rows}
    assert kinds <= {"correct", "wrong", "truncated", "no_answer", "repetition"}
    full = results.full("pocket_recall")
    assert full is not None and full.accuracy >= 0.75


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_a_whole_budget_is_the_full_cache_token_for_token(results: Results, method: str) -> None:
    for task in TASKS:
        full = results.full(task)
        (run,) = results.find(task, method, 0.0)
        assert full is not None
        assert [row.text for row in run.rows] == [row.text for row in full.rows]
        assert [row.kv_bytes for row in run.rows] == [row.full_kv_bytes for row in full.rows]


def test_methods_hold_the_same_bytes_but_not_the_same_keys(results: Results) -> None:
    for task in TASKS:
        texts = set()
        for method in METHODS:
            for run in results.find(task, method, SPARSITY):
                texts.add(tuple(row.text for row in run.rows))
                for row in run.rows:
                    length = row.prompt_tokens + row.new_tokens
                    budget = (1 - SPARSITY) * length + SPARSITY * min(length, pocket.WINDOW.size)
                    assert row.kv_bytes is not None and row.full_kv_bytes is not None
                    held = row.kv_bytes / row.full_kv_bytes * length
                    # R-KV frees tokens an eighth of the budget at a time, and is at it just before
                    assert budget * (7 / 8 if method == "rkv" else 1) - 1 <= held <= budget + 1e-6
                mask = run.mask()
                assert mask is None or mask.sparsity == run.true_sparsity == SPARSITY
        assert len(texts) >= 3


def test_tables_and_figures(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("tables", "figures"):
        assert main([command, str(results.folder), f"output={tmp_path / command}"]) == 0
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".md", ".tex", ".png", ".pdf"} <= written
    main_table = (tmp_path / "tables" / "main.md").read_text()
    assert "RLKV" in main_table and "H2O" in main_table
    summary = json.loads((results.folder / "summary.json").read_text())
    assert set(summary["noise_floor"]) == set(TASKS) and len(summary["runs"]) == 2 * (1 + 9 * 2)


def test_run_json_says_what_token_dropping_really_did(home: Path, tmp_path: Path) -> None:
    more = ("methods=rlkv,streaming", "sparsities=0.3", "prefill=local", "n=1", "max_new_tokens=4")
    assert main(words(home, tmp_path, *more)) == 0
    dropped, masked = (
        json.loads((tmp_path / f"pocket_recall/{method}-s0.3/run.json").read_text())
        for method in ("streaming", "rlkv")
    )
    assert dropped["true_sparsity"] == pytest.approx(masked["true_sparsity"]) != 0.3  # whole heads' worth
    assert (dropped["prefill"], masked["prefill"]) == ("full", "local")


def test_a_tasks_limit_on_prompt_and_answer_is_kept(
    home: Path, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = sorted(row.prompt_tokens for row in results.find("pocket_resolve", "full")[0].rows)
    limit = prompts[-1]  # the longest prompt leaves no room, the others a little
    long = replace(get_task("pocket_resolve"), max_length=limit)
    monkeypatch.setattr(plan, "get_task", lambda name: long)
    more = ("methods=full,h2o", f"sparsities={SPARSITY}", "tasks=pocket_resolve", "max_new_tokens=500")
    assert main(words(home, tmp_path, *more)) == 0
    for run in load_results(tmp_path).runs:
        assert len(run.info["skipped"]) == prompts.count(limit) and len(run.rows) == N - prompts.count(limit)
        for row in run.rows:
            assert row.prompt_tokens + row.new_tokens <= limit
            assert row.finish == "stop" or row.prompt_tokens + row.new_tokens == limit


SAMPLED = (
    "methods=full,rlkv,random_eviction",
    f"sparsities={SPARSITY}",
    "k=3",
    "temperature=2",
    "slots=3",
    "noise_floor=true",
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("pocket_*/*/*")}


@pytest.fixture(scope="module")
def sampled(home: Path) -> dict[str, bytes]:
    """What a run without any incident leaves."""
    assert main(words(home, home / "whole", *SAMPLED)) == 0
    return files(home / "whole")


def test_sampled_shards_merge_into_the_one_run(home: Path, sampled: dict[str, bytes], tmp_path: Path) -> None:
    """So a sample depends neither on its neighbours in the batch nor on the shard."""
    for shard in ("0/2", "1/2"):
        assert main(words(home, tmp_path, *SAMPLED, "--shard", shard)) == 0
    assert main(["merge", str(tmp_path)]) == 0
    assert files(tmp_path) == sampled
    repeat, full = (sampled[f"pocket_resolve/{name}/rows.jsonl"] for name in ("full-repeat", "full"))
    assert repeat != full


def test_a_run_that_is_sigkilled_goes_on_to_the_same_files(
    home: Path, sampled: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rlkv_eval.cli", *words(home, tmp_path, *SAMPLED)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None and rows_in(tmp_path) < 17:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    kept = rows_in(tmp_path)
    assert 17 <= kept < len(TASKS) * 3 * N * 3
    assert main(words(home, tmp_path, *SAMPLED)) == 0
    assert files(tmp_path) == sampled


def rows_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("pocket_*/*/rows.jsonl"))
