"""Pictures show the numbers they were given, and are written where they are expected."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_evaluate import made_up

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.plots import accuracy_for_bytes, draw_folder, gate_map, training_curves
from rlkv.report import summarise

METRICS = [
    {"step": 1, "reward": 0.9, "gate_mean": 1.0, "sparsity": 0.0, "response_length": 40.0},
    {
        "step": 2,
        "reward": 0.8,
        "gate_mean": 0.9,
        "sparsity": 0.1,
        "response_length": 50.0,
        "validation_mask": 0.5,
    },
]


def test_the_heat_map_holds_the_gates_on_a_fixed_scale() -> None:
    values = torch.rand(5, 3) * 0.4
    figure = gate_map(HeadGates(values))
    image = figure.axes[0].images[0]
    assert np.allclose(image.get_array(), values)
    assert image.get_clim() == (0, 1)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("KV head", "layer")
    plt.close(figure)


def test_curves_are_the_metrics_and_empty_panels_are_left_out() -> None:
    figure = training_curves(METRICS)
    drawn = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert len(drawn) == 5 and "answers cut off" not in drawn
    assert drawn["reward of the samples"].lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.8]]
    assert drawn["held-out accuracy"].lines[0].get_xydata().tolist() == [[2, 0.5]]
    plt.close(figure)


def test_methods_stand_at_their_bytes_with_their_intervals() -> None:
    results = summarise(*made_up())
    figure = accuracy_for_bytes(results)
    assert len(figure.axes) == 3  # all, and two tasks
    axes = figure.axes[0]
    found = {container.get_label(): container for container in axes.containers}
    rlkv = results["methods"][1]
    x, y = found["RLKV"].lines[0].get_xydata()[0]
    assert (x * 1024, y) == pytest.approx((rlkv["kv_bytes_at_typical_length"], rlkv["accuracy"]["value"]))
    low, high = found["RLKV"].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((rlkv["accuracy"]["low"], rlkv["accuracy"]["high"]))
    assert "random (mean of 2)" in found
    plt.close(figure)


def test_a_folder_gets_the_pictures_that_it_has_numbers_for(tmp_path: Path) -> None:
    HeadGates(torch.rand(4, 2)).save(tmp_path)
    assert [path.name for path in draw_folder(tmp_path)] == ["gates.png"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS) + '{"step": 3')
    (tmp_path / "results.json").write_text(json.dumps(summarise(*made_up())))
    drawn = draw_folder(tmp_path, tmp_path / "pictures")
    assert [path.name for path in drawn] == ["gates.png", "training.png", "accuracy_kv.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plt.get_fignums() == []


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="nothing to draw"):
        draw_folder(tmp_path)
    with pytest.raises(RLKVError, match="no such folder"):
        draw_folder(tmp_path / "none")
