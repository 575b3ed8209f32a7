"""An evaluation's folder goes on only with the masks that gave its answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import evaluation, save_gates

from rlkv.bench import EvalConfig
from rlkv.errors import RLKVError
from rlkv.evaluate import evaluate

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    return evaluation(tmp_path_factory.mktemp("evaluate"))


def test_rows_of_other_gates_are_not_mixed(config: EvalConfig, tmp_path: Path) -> None:
    small = replace(config, output=str(tmp_path / "out"), n=2, sparsities=[0.5], methods=["rlkv"])
    evaluate(small)
    model = json.loads((Path(config.gates) / "card.json").read_text())["config"]["model"]
    other = replace(small, gates=str(save_gates(tmp_path / "other", Path(model), seed=5)))
    written = (tmp_path / "out" / "config.yaml").read_text()
    asked: dict[str, Any]
    for asked in ({}, {"sparsities": [2 / 3]}, {"methods": ["random"]}):
        with pytest.raises(RLKVError, match="rlkv-0.5.json is another mask .*other gates"):
            evaluate(replace(other, **asked))
    assert (tmp_path / "out" / "config.yaml").read_text() == written
    copy = shutil.copytree(small.gates, tmp_path / "moved")
    evaluate(replace(small, gates=str(copy), sparsities=[2 / 3]))


@pytest.mark.parametrize(("lost", "sparsity"), [("rlkv-0.25", 0.25), ("rlkv-0.25", 0.5), ("full", 0.25)])
def test_answers_without_their_mask_are_refused(
    config: EvalConfig, tmp_path: Path, lost: str, sparsity: float
) -> None:
    small = replace(config, output=str(tmp_path), n=1, sparsities=[0.25], methods=["rlkv"])
    evaluate(small)
    (tmp_path / "masks" / f"{lost}.json").unlink()
    with pytest.raises(RLKVError, match=f"{lost}.json: no such mask file, .*rows.jsonl: put it back"):
        evaluate(replace(small, sparsities=[sparsity]))
