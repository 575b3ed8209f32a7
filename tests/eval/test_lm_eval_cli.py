"""``rlkv-lm-eval`` where lm_eval, or what it needs, is not installed."""

from __future__ import annotations

import sys

import pytest

from rlkv_eval.lm_eval_cli import main


def test_a_missing_lm_eval_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlkv-lm-eval", "--help"])
    for name in [*sys.modules]:
        if name.split(".")[0] == "lm_eval" or name == "rlkv_eval.lm_eval_adapter":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main() == 2
    said = capsys.readouterr().err
    assert said == 'rlkv-lm-eval: the package lm_eval is missing: pip install "lm_eval[hf]>=0.4.13"\n'
