"""``rlkv serve``: the plan that it prints, the command that it would become, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlkv import HeadMask, RLKVError, Window
from rlkv.commands.serve import Config, check_engine, make_plan, plugin_settings, run, server_command
from rlkv.loading import load_shape


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    shape = load_shape("pocket")
    return HeadMask.random(shape.layers, shape.kv_heads, 0.5, window=Window(4, 16), model=shape).save(
        tmp_path / "mask.json"
    )


def test_dry_run_prints_plan_and_command(mask: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Config(mask=str(mask), dry_run=True, kv_gib=1, port=31000, options="--device cpu")) == 0
    printed = capsys.readouterr().out
    assert "sparsity 0.500" in printed and "1.99x as many fit" in printed and "in 1 GiB: " in printed
    assert "--attention-backend rlkv" in printed and "--port 31000" in printed and "--device cpu" in printed


@pytest.mark.parametrize(
    "settings,tokens",
    [
        ({}, 1000),
        ({"prompt_tokens": 100}, 100),
        ({"options": "--context-length 300"}, 300),
        ({"options": "--chunked-prefill-size -1"}, 0),
        ({"prefill": "local"}, 0),
    ],
)
def test_memory_for_prompts_in_chunks_is_counted(
    mask: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], tokens: int
) -> None:
    assert run(Config(mask=str(mask), dry_run=True, **{"prompt_tokens": 1000, **settings})) == 0
    printed = capsys.readouterr().out
    assert (f"for a prompt of up to {tokens} tokens" in printed) if tokens else ("a prompt" not in printed)


def test_the_plugin_is_told_everything(mask: Path) -> None:
    config = Config(model="pocket", mask=str(mask), prefill="local", window=Window(2, 8), prompt_tokens=70)
    plan, name = make_plan(config)
    assert plan.window == Window(2, 8) and plan.prefill == "local" and name == "pocket"
    settings = plugin_settings(config, plan)
    assert settings["RLKV_MASK"] == str(mask) and settings["RLKV_WINDOW"] == "2+8"
    assert settings["RLKV_PROMPT_TOKENS"] == "70"
    assert settings["RLKV_PREFILL"] == "local" and "RLKV_GATES" not in settings
    assert (Path(server_command(config, name)[4]) / "config.json").is_file()


def test_another_window_than_the_masks_is_said(mask: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(Config(mask=str(mask)))
    assert "WARNING" not in capsys.readouterr().out
    make_plan(Config(mask=str(mask), window=Window(2, 8)))
    assert "WARNING: a mask made for window 4+16 is used with 2+8." in capsys.readouterr().out


def test_gates_or_mask(mask: Path) -> None:
    with pytest.raises(RLKVError, match="either gates=FOLDER"):
        make_plan(Config(model="pocket"))
    with pytest.raises(RLKVError, match="either gates=FOLDER"):
        make_plan(Config(model="pocket", gates="gates", mask=str(mask)))


def test_a_missing_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkv.commands.serve.distributions", lambda name: [])
    with pytest.raises(RLKVError, match="SGLang is not installed"):
        check_engine()
    monkeypatch.setattr("rlkv.commands.serve.distributions", lambda name: [name])
    monkeypatch.setattr("rlkv.commands.serve.entry_points", lambda group: [])
    with pytest.raises(RLKVError, match="pip install -e sglang/"):
        check_engine()
