"""A run killed with SIGKILL at any moment and resumed ends with the same gates, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import TinyTokenizer, read_metrics, tiny_config, tiny_model

from rlkv import checkpoint
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.trainer import Trainer, train

STEPS = 12
SETTINGS: dict[str, Any] = dict(steps=STEPS, validate_every=5, validation_prompts=4, target_sparsity=0.5)

WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_resume import run
run(Path(sys.argv[1]), resume=True)
"""


def run(folder: Path, **changes: Any) -> HeadGates:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, "validation_data": str(folder / "prompts.jsonl"), **changes}
    return train(tiny_config(folder, **settings), tiny_model(), TinyTokenizer())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    torch.set_num_threads(threads)
    return folder / "run"


def without_timing(folder: Path) -> list[dict[str, Any]]:
    timing = ("seconds", "rollout_tokens_per_second", "train_tokens_per_second")
    return [{key: row[key] for key in row if key not in timing} for row in read_metrics(folder)]


def test_killed_and_resumed_run_ends_the_same(tmp_path: Path, whole: Path) -> None:
    """Killed twice: once soon after a random step's line is written, once a random moment later."""
    generator = random.Random(os.urandom(8))
    script = WORKER.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    metrics = tmp_path / "run" / "metrics.jsonl"
    kills = 0
    for first, last in ((1, 5), (6, 10)):
        wanted = generator.randint(first, last)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                if metrics.is_file() and metrics.read_bytes().count(b"\n") >= wanted:
                    time.sleep(generator.random() * 0.05)
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
        kills += process.returncode == -signal.SIGKILL
    assert kills, "the run ended before it could be killed"
    state = checkpoint.load_last(tmp_path / "run" / "checkpoints")
    assert state is None or state["step"] <= STEPS
    finished = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    assert finished.returncode == 0
    assert (tmp_path / "run" / "gates.tsv").read_bytes() == (whole / "gates.tsv").read_bytes()
    ends = [checkpoint.load_last(folder / "checkpoints") for folder in (tmp_path / "run", whole)]
    assert ends[0] is not None and ends[1] is not None
    for name in ("gates", "optimiser"):
        assert str(ends[0]["learner"][name]) == str(ends[1]["learner"][name])
    assert ends[0]["learner"]["gates"].equal(ends[1]["learner"]["gates"])
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert without_timing(tmp_path / "run") == without_timing(whole)


def test_a_line_after_the_last_checkpoint_is_written_anew(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, steps=5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward": 0.1}\n{"step": 7, "rew')
    run(tmp_path, steps=STEPS, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, steps=2)
    again = run(tmp_path, steps=2, resume=True)
    assert again.values.equal(first.values) and len(read_metrics(tmp_path / "run")) == 2


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, steps=6, keep_checkpoints=3)
    names = [path.name for path in checkpoint.found(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000004.pt", "step-000005.pt", "step-000006.pt"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == names


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, {"step": 3}, keep=2)
    (tmp_path / "step-000004.part").write_bytes(b"half")
    state = checkpoint.load_last(tmp_path)
    assert state is not None and state["step"] == 3


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-000004.pt").write_bytes(b"half")
    with pytest.raises(RLKVError, match="step-000004.pt cannot be read.*delete it"):
        checkpoint.load_last(tmp_path)


def test_a_run_is_not_overwritten_or_mixed_up(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    with pytest.raises(RLKVError, match="already holds a run at step 1: give resume=true"):
        run(tmp_path, steps=1)
    with pytest.raises(RLKVError, match="had window=1.3, now it is 2.3"):
        config = tiny_config(tmp_path, **{**SETTINGS, "steps": 1, "resume": True})
        config.validation_data = str(tmp_path / "prompts.jsonl")
        config.window = type(config.window)(2, 3)
        Trainer(config, tiny_model(), TinyTokenizer())


def test_the_best_gates_so_far_come_back(tmp_path: Path) -> None:
    run(tmp_path, steps=5, validate_every=2)
    state = checkpoint.load_last(tmp_path / "run" / "checkpoints")
    assert state is not None and state["best"]["step"] in (2, 4, 5)
    state["best"]["step"], state["since_best"] = 2, 7
    checkpoint.save(tmp_path / "run" / "checkpoints", 5, state, keep=2)
    settings = {**SETTINGS, "validation_data": str(tmp_path / "prompts.jsonl"), "validate_every": 2}
    trainer = Trainer(tiny_config(tmp_path, **settings, resume=True), tiny_model(), TinyTokenizer())
    assert trainer.best is not None and (trainer.best.step, trainer.since_best) == (2, 7)
    assert trainer.best.key == state["best"]["key"] and trainer.best.gates.equal(state["best"]["gates"])


def test_random_states_come_back() -> None:
    import numpy as np

    states = checkpoint.random_states()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    checkpoint.restore_random_states(states)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
