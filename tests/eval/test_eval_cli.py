"""The command: help for every word, settings as they are written in scripts, quick to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_kit import Instant, config, tasks  # noqa: F401 (a fixture)

from rlkv import config as settings
from rlkv.cli import read_words
from rlkv_eval import runner
from rlkv_eval.cli import main
from rlkv_eval.commands import COMMANDS
from rlkv_eval.config import RunConfig, Shard


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: rlkv-eval {command}" in said and COMMANDS[command] in said


def test_the_overview_needs_no_torch() -> None:
    code = "import sys; from rlkv_eval.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in COMMANDS)


def test_settings_as_scripts_write_them() -> None:
    words = "--model pocket --tasks math500,aime24 --methods full,h2o --sparsities 0.2,0.4 --shard 1/4"
    words += " --data-dir data --noise-floor true k=2 temperature=0.6 window=16+65 options.duo.gates=a/b"
    found = settings.load(RunConfig, None, read_words(words.split(), "")[1])
    assert found.tasks == ["math500", "aime24"] and found.sparsities == [0.2, 0.4]
    assert found.shard == Shard(1, 4) and found.data_dir == "data" and found.noise_floor
    assert found.options == {"duo": {"gates": "a/b"}} and str(found.window) == "16+65"


def test_a_saved_configuration_loads_again(tmp_path: Path) -> None:
    found = config(tmp_path, shard=Shard(0, 2), options={"random": {"draw": 1}}, max_new_tokens=7)
    settings.save(found, tmp_path / "config.yaml")
    assert settings.load(RunConfig, tmp_path / "config.yaml") == found


@pytest.mark.usefixtures("tasks")
def test_run_then_merge_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "default_backend", Instant)
    for shard in ("0/2", "1/2"):
        words = "run model=pocket tasks=alpha methods=full,random sparsities=0.5 draws=2 noise_floor=true"
        assert main([*words.split(), f"output={tmp_path}", "--shard", shard]) == 0
        assert f"rlkv-eval merge {tmp_path}" in capsys.readouterr().out
    assert main(["merge", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "alpha: 12 problems, 1 sample(s) each" in said and "noise floor: two full-cache runs" in said
    assert "random (mean of 2)" in said and (tmp_path / "summary.json").is_file()


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "model=pocket", "tasks=matth500", f"output={tmp_path}"]) == 2
    assert "did you mean 'math500'" in capsys.readouterr().err
    assert main(["merge", str(tmp_path)]) == 2
    assert "no shards" in capsys.readouterr().err
    assert main(["rnu"]) == 2
    assert "unknown command 'rnu': did you mean 'run'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
