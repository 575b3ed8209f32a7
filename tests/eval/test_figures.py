"""Figures: what is drawn is what was measured, and every file is written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from score_kit import own_folder, published_folder

from rlkv_eval import figures
from rlkv_eval.figures.accuracy import one_model
from rlkv_eval.figures.errors import error_bars
from rlkv_eval.figures.gates import heat_maps
from rlkv_eval.figures.style import LOOKS, spread
from rlkv_eval.figures.training_free import against_best
from rlkv_eval.names import METHODS
from rlkv_eval.results import load_results
from rlkv_eval.scores import Scores, own_scores


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return own_scores(load_results(own_folder(tmp_path_factory.mktemp("own"))))


def curve(figure: Figure, panel: int, method: str) -> list[tuple[float, float]]:
    """The points of a method's line in one panel, found by its colour."""
    colour = LOOKS[method][0]
    line = next(line for line in figure.axes[panel].lines if line.get_color() == colour)
    plt.close(figure)
    return [(round(float(x), 4), round(float(y), 4)) for x, y in line.get_xydata()]


def test_accuracy_against_sparsity(scores: Scores) -> None:
    figure = one_model(scores, "Tiny-R1")
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == ["GSM8K", "MATH-500"]
    assert curve(figure, 0, "rlkv") == [(0, 75), (25, 75), (50, 50)]
    assert curve(figure, 1, "kvzip") == [(0, 75), (25, 60)]


def test_bands_are_the_intervals(scores: Scores) -> None:
    figure = one_model(scores, "Tiny-R1")
    score = scores.get("Tiny-R1", "math500", "kvzip", 0.25)
    assert score and score.interval
    edges = [
        path.vertices
        for collection in figure.axes[1].collections
        for path in collection.get_paths()
        if collection.get_facecolor()[0][:3] == pytest.approx(plt.matplotlib.colors.to_rgb(LOOKS["kvzip"][0]))
    ]
    plt.close(figure)
    heights = {round(float(y), 6) for x, y in edges[0] if x == 25}
    assert heights == {round(score.interval.low, 6), round(score.interval.high, 6)}


def test_accuracy_against_bytes(scores: Scores) -> None:
    """The full cache's requests hold 20.5 MiB on average; masks 0.8 and 0.6 of it."""
    assert curve(one_model(scores, "Tiny-R1", by_bytes=True), 0, "rlkv") == [
        (12.3, 50),
        (16.4, 75),
        (20.5, 75),
    ]


def test_error_bars(scores: Scores) -> None:
    figure = error_bars(scores, "Tiny-R1")
    assert figure is not None
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["Random heads", "KVzip", "RLKV"]
    bars = {
        (round(bar.get_x() + bar.get_width() / 2), round(bar.get_y(), 6), round(bar.get_height(), 6))
        for bar in figure.axes[2].patches
        if bar.get_height()
    }
    plt.close(figure)
    # full and 0.25: 10 wrong of 40; 0.5: 12 cut off, 8 repeating
    assert bars == {(0, 0, 25), (1, 0, 25), (2, 0, 30), (2, 30, 20)}


def test_training_free(scores: Scores) -> None:
    figure = against_best(scores)
    assert figure is not None
    table = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    texts = [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
    np.testing.assert_allclose(table, [[15, 20], [15, np.nan], [15, 20]])  # the last row: means
    assert texts.count("+15.0") == 3 and texts.count("KVzip") == 2 and texts.count("Random heads") == 1
    assert against_best(scores.where(method="rlkv")) is None


def test_heat_maps() -> None:
    heads = {"rlkv": np.arange(12.0).reshape(6, 2) / 11, "duo": np.ones((6, 2))}
    figure = heat_maps(heads, "m", 0.5)
    images = [axes.images[0].get_array() for axes in figure.axes[:4]]
    plt.close(figure)
    np.testing.assert_allclose(images[0], heads["rlkv"].T)
    assert np.asarray(images[1]).tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert np.asarray(images[3]).sum() == 6  # ties: half of the heads all the same


@pytest.mark.parametrize("own", [True, False])
def test_files(tmp_path: Path, own: bool) -> None:
    config = figures.Config(output=str(tmp_path / "out"))
    if own:
        config.results = [str(own_folder(tmp_path / "in"))]
        names = ["accuracy_Tiny-R1", "errors_Tiny-R1", "training_free", "accuracy_kv_Tiny-R1"]
    else:
        config.published = str(published_folder(tmp_path / "in"))
        names = ["accuracy_Tiny-R1", "training_free", "longreason_Tiny-R1", "sweep_Tiny-R1",
                 "efficiency_errors_Tiny-R1", "efficiency"]  # fmt: skip
        names = [f"published_{name}" for name in names]
    paths = figures.main(config)
    assert sorted(paths) == sorted(
        tmp_path / "out" / f"{name}.{kind}" for name in names for kind in ("png", "pdf")
    )
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
        assert path.suffix == ".pdf" or np.ptp(plt.imread(path)[..., :3]) > 0.9  # not a blank page


def test_every_method_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(METHODS)
    assert len({look[:2] for look in LOOKS.values()}) == len(LOOKS)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_spread(positions: list[float]) -> None:
    placed = spread(positions, 8.0, 0.0, 100.0)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    assert all(placed[b] - placed[a] >= 8 - 1e-6 for a, b in pairwise(order))
    assert min(placed) >= -1e-6 and max(placed) <= 100 + 1e-6
    apart = sorted(positions)
    if all(b - a >= 8 for a, b in pairwise(apart)):
        assert placed == pytest.approx(positions)
