"""The runner: the same files after kills, from shards, and never from other settings."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_kit import Instant, config, make_items, make_task, tasks  # noqa: F401 (a fixture)

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.window import Window
from rlkv_eval import plan as plan_module
from rlkv_eval.config import RunConfig, Shard
from rlkv_eval.graders.base import grader_versions
from rlkv_eval.jobs import stream
from rlkv_eval.merge import merge
from rlkv_eval.plan import make_plan
from rlkv_eval.results import load_results
from rlkv_eval.runner import run
from rlkv_eval.tasks.base import Item

pytestmark = pytest.mark.usefixtures("tasks")


def files(folder: Path) -> dict[str, bytes]:
    """Content of every row file and run.json, by place."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*/*.json*")}


def started(settings: RunConfig, fail_after: int | None = None) -> Instant:
    """Run until the end, or until the backend breaks off."""
    backends: list[Instant] = []

    def make(plan: Any) -> Instant:
        backends.append(Instant(plan, fail_after))
        return backends[0]

    try:
        run(settings, make)
    except KeyboardInterrupt:
        assert fail_after is not None
    return backends[0]


def test_a_run_killed_at_random_rows_ends_in_the_same_files(tmp_path: Path) -> None:
    started(config(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len(whole) == 2 * 2 * 4  # tasks x (rows, run.json) x (full, full-repeat, two draws)
    rng = random.Random(0)
    asked = []
    for trial in range(5):
        settings, left = config(tmp_path / f"killed-{trial}"), 2 * 4 * 36
        while left:
            backend = started(settings, rng.randint(1, 120))
            asked += backend.asked
            left -= len(backend.asked)
            assert left >= 0, "an answer was asked for twice"
            for path in (tmp_path / f"killed-{trial}").glob("*/*/rows.jsonl"):
                if path.read_bytes() not in whole.values() and rng.random() < 0.7:
                    with path.open("ab") as file:  # what SIGKILL leaves: a line that was being written
                        file.write(b'{"id": "alpha-0", "sample": 0, "task": "al\xc3')
        assert files(tmp_path / f"killed-{trial}") == whole


@pytest.mark.parametrize("count", [2, 5])
def test_merged_shards_equal_one_run(tmp_path: Path, count: int) -> None:
    started(config(tmp_path / "whole"))
    out = tmp_path / "shards"
    for index in range(count):
        with pytest.raises(RLKVError, match="missing|finish|no shards"):
            merge(out)
        started(config(out, shard=Shard(index, count)))
    results = merge(out)
    assert files(out) == files(tmp_path / "whole")
    assert all(run.complete for run in results.runs)
    parts = [load_results(out / f"shard-{index}-of-{count}") for index in range(count)]
    sizes = [len(part.runs[0].rows) for part in parts]
    assert sum(sizes) == 36 and max(sizes) - min(sizes) <= 3  # 12 problems of 3 samples, dealt out evenly


def test_runs_that_no_shard_has_begun_are_missed(tmp_path: Path) -> None:
    for index in range(2):
        started(config(tmp_path, shard=Shard(index, 2)), fail_after=4 * 18)  # all of alpha, nothing of beta
    with pytest.raises(RLKVError, match="shard-0-of-2 has not begun beta/full"):
        merge(tmp_path)


def test_unfinished_or_foreign_shards_are_not_merged(tmp_path: Path) -> None:
    started(config(tmp_path, shard=Shard(0, 2)))
    started(config(tmp_path, shard=Shard(1, 2)), fail_after=100)
    with pytest.raises(RLKVError, match="finish that shard"):
        merge(tmp_path)
    other = tmp_path / "other"
    started(config(other, shard=Shard(0, 2)))
    started(config(other, shard=Shard(1, 2), seed=1))
    with pytest.raises(RLKVError, match="differ in (seeds|settings): not shards of one run"):
        merge(other)
    assert not list(other.glob("alpha"))  # nothing written
    started(config(other, shard=Shard(0, 3)))
    with pytest.raises(RLKVError, match="shards of several runs"):
        merge(other)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"k": 2}, "k"),
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 3}, "seed"),
        ({"n": 5}, "problems"),
        ({"prefill": "local", "methods": ["random"], "noise_floor": False}, "prefill"),
        ({"window": Window(2, 8), "methods": ["full"]}, None),  # which the full cache never sees
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"options": {"random": {"draw": 1}}}, None),  # another run's folder, so no contradiction
    ],
)
def test_another_configuration_is_refused_before_the_model_is_loaded(
    tmp_path: Path, change: dict[str, Any], name: str | None
) -> None:
    settings = config(tmp_path)
    started(settings, fail_after=100 if name == "prefill" else 30)
    before = files(tmp_path)
    changed = replace(settings, **change)
    if name is None:
        make_plan(changed)
        return

    def never(plan: Any) -> Instant:
        raise AssertionError("the model was loaded")

    with pytest.raises(RLKVError, match=rf"holds a run with {name}=.*choose another output"):
        run(changed, never)
    assert files(tmp_path) == before


def test_a_finished_run_loads_nothing_and_more_methods_add_to_it(tmp_path: Path) -> None:
    first = config(tmp_path, methods=["full"], noise_floor=False)
    started(first)
    before = files(tmp_path)
    run(first, lambda plan: pytest.fail("nothing was left to do"))
    backend = started(config(tmp_path))
    assert len(backend.asked) == 2 * 3 * 36
    assert before.items() <= files(tmp_path).items()


def test_the_repeat_run_asks_for_the_same_in_another_order_with_other_numbers(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path))
    full, repeat = plan.jobs[:2]
    first, second = plan.requests(full, set()), plan.requests(repeat, set())
    assert first != second and sorted(first, key=lambda r: r.key) == sorted(second, key=lambda r: r.key)
    assert plan.sampling_seed(full) != plan.sampling_seed(repeat)
    assert len({plan.sampling_seed(job) for job in plan.jobs if not job.repeat}) == 1


def test_streams_belong_to_a_sample_of_a_problem_of_a_task() -> None:
    items = make_items("a", 50) + make_items("b", 50) + [Item("a-0", "", "", "b")]
    streams = {stream(item, sample) for item in items for sample in range(8)}
    assert len(streams) == 101 * 8
    assert all(0 <= number < 2**62 for number in streams)


def test_every_folder_says_what_made_it(tmp_path: Path) -> None:
    started(config(tmp_path))
    info = json.loads((tmp_path / "alpha/random-s0.5-seed1/run.json").read_text())
    assert info["settings"]["draw"] == 1 and info["seed"] == 1 and info["answers"] == 36
    assert {"rlkv", "torch", "transformers", "python", "machine"} <= info["versions"][0].keys()
    assert "sympy" not in info["versions"][0]  # which the grader of these tasks does not ask
    assert {"math-verify", "sympy", "antlr4-python3-runtime"} <= grader_versions("math").keys()
    assert info["seeds"]["sampling"] == 0 and info["window"] == "4+16"
    saved = RunConfig(**{"tasks": ["alpha"], "model": "pocket"})
    assert saved.check() is None


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(RLKVError, match=match):
            run(config(tmp_path, **changes), lambda plan: pytest.fail("the model was loaded"))

    refused("needs gates=", methods=["rlkv"])
    refused("did you mean 'random'", methods=["randm"])
    refused("within \\[0, 1\\]", sparsities=[1.5])
    refused("greedy samples", temperature=0.0)
    refused("no tasks are named", tasks=[])
    refused("no sparsities", methods=["random"], sparsities=[], noise_floor=False)
    refused("did you mean 'options.random'", options={"randm": {}})
    refused("did you mean 'random.draw'", options={"random": {"drew": 1}})
    refused("no window is known", model="elsewhere")
    refused("one cache", endpoint="http://localhost:1")
    HeadGates(torch.ones(2, 2)).save(tmp_path / "gates")
    refused("wrong shape", methods=["rlkv"], gates=str(tmp_path / "gates"))
    monkeypatch.setattr(
        plan_module, "get_task", lambda name: replace(make_task(name), load=lambda folder: [])
    )
    refused("holds no problems")
    twice = make_items("a", 2) * 2
    monkeypatch.setattr(plan_module, "get_task", lambda name: replace(make_task(name), load=lambda f: twice))
    refused("two problems have the id 'a-0'")

    def lacking(graders: Any) -> None:
        raise RLKVError(f"the grader {next(iter(graders))} needs a package")

    monkeypatch.setattr(plan_module, "preflight", lacking)
    refused("the grader exact needs a package")


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "1/0", ""])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(RLKVError, match="0/2 and 1/2"):
        Shard.parse(text)


def test_a_grader_that_waits_works_in_threads_and_its_failure_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [replace(make_task(name), grader="code") for name in ("alpha",)][0]
    monkeypatch.setattr(plan_module, "get_task", lambda name: code)
    settings = config(tmp_path / "a", tasks=["alpha"])
    started(settings)
    monkeypatch.setattr(plan_module, "get_task", make_task)
    started(config(tmp_path / "b", tasks=["alpha"]))
    rows = [path.read_bytes() for path in sorted((tmp_path / "a").glob("*/*/rows.jsonl"))]
    assert rows == [path.read_bytes() for path in sorted((tmp_path / "b").glob("*/*/rows.jsonl"))]

    from rlkv_eval import runner

    def broken(*arguments: Any) -> None:
        raise RLKVError("the sandbox is gone")

    monkeypatch.setattr(runner, "grade", broken)
    monkeypatch.setattr(plan_module, "get_task", lambda name: code)
    with pytest.raises(RLKVError, match="the sandbox is gone"):
        started(config(tmp_path / "c", tasks=["alpha"]))
