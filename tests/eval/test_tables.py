"""Tables from our own results: numbers worked out by hand, Markdown and LaTeX."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_kit import own_folder, write_run

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.support import ModelShape
from rlkv_eval import overlap, tables
from rlkv_eval.results import load_results
from rlkv_eval.scores import join, own_scores
from rlkv_eval.tables.near_lossless import largest, verdict
from rlkv_eval.tables.render import Cell, Table, latex_table, mark_best, markdown_table


def document(folder: Path, name: str) -> str:
    return (folder / f"{name}.md").read_text()


def row(text: str, *start: str) -> list[str]:
    """The first table row that starts with these cells, spaces trimmed."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[: len(start)] == list(start):
            return cells
    raise AssertionError(f"no row {start} in\n{text}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    results = [str(own_folder(root / "a")), str(own_folder(root / "b", "Tiny-Instruct"))]
    config = tables.Config(results, output=str(root / "out"), pairs={"Tiny-R1": "Tiny-Instruct"})
    tables.main(config)
    return root / "out"


def test_main_table(written: Path) -> None:
    text = document(written, "main")
    assert row(text, "method") == ["method", "sp", "GSM8K", "MATH-500", "mean"]
    # 30 of 40 by Wilson: 59.8 to 85.8 (z = 1.96)
    assert row(text, "Full")[2:] == ["75.0 (59.8–85.8)", "75.0 (59.8–85.8)", "75.0"]
    assert row(text, "KVzip")[2:4] == ["60.0 (44.6–73.7)", "60.0 (44.6–73.7)"]
    assert row(text, "RLKV", "0.25")[2].startswith("**75.0**")
    assert row(text, "RLKV", "0.5")[3:] == ["–", "–"]  # not run
    assert row(text, "Random heads")[2].startswith("30.0 (")  # two draws, 25 and 35 %
    assert "mean of 2 draws" in text
    assert "## Tiny-R1" in text and "## Tiny-Instruct" in text


def test_near_lossless_needs_proof(written: Path) -> None:
    """Equal answers on 40 problems are no proof of a loss below 2 points; on 2000 they are."""
    text = document(written, "near_lossless")
    assert row(text, "Tiny-R1", "RLKV")[2:] == ["0 (0.25)", "0 (0.25)"]  # at 0.5: 25 points lost
    assert row(text, "Tiny-R1", "Random heads")[2] == "0"
    assert row(text, "Tiny-R1", "Random heads")[3] == "–"


def test_near_lossless_rule(tmp_path: Path) -> None:
    full = "1" * 1500 + "0" * 500
    write_run(tmp_path, "gsm8k", "full", 0.0, full)
    for sparsity, right in ((0.2, full), (0.4, "1" * 1400 + "0" * 600), (0.6, full)):
        write_run(tmp_path, "gsm8k", "rlkv", sparsity, right)
    scores = own_scores(load_results(tmp_path))
    base = scores.full("Tiny-R1", "gsm8k")
    assert base is not None
    found = [verdict(score, base, 2.0) for score in scores.where(method="rlkv")]
    assert found == ["near-lossless", "lossy", "near-lossless"]
    chosen = [largest(scores, "Tiny-R1", "gsm8k", ("rlkv", ""), 2.0, every=every) for every in (True, False)]
    assert [score and score.sparsity for score in chosen] == [0.2, 0.6]
    # Without paired answers the difference itself decides, the margin included.
    alone = [replace(base, percent=percent, comparison=None) for percent in (73.0, 72.9)]
    assert [verdict(score, base, 2.0) for score in alone] == ["near-lossless", "lossy"]


def test_without_pairs_our_own_results_prove_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "gsm8k", "full", 0.0, "1" * 2000)
    write_run(tmp_path / "b", "gsm8k", "rlkv", 0.2, "1" * 2000)
    scores = join(own_scores(load_results(tmp_path / name)) for name in "ab")
    place = ("Tiny-R1", "gsm8k", ("rlkv", ""), 2.0)
    assert largest(scores, *place) is None
    assert largest(scores, *place, ("near-lossless", "undecided")) is not None


def test_unfinished_runs_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_folder(tmp_path / "a")
    rows = folder / "gsm8k/rlkv-s0.5/rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:13]))
    tables.main(tables.Config([str(folder)], output=str(tmp_path / "out")))
    assert "rlkv-s0.5: LEFT OUT, 13 of 40 answers" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="no row"):
        row(document(tmp_path / "out", "kv_bytes"), "GSM8K", "RLKV", "0.5")
    write_run(tmp_path / "b", "gsm8k", "full", 0.0, "11")
    (tmp_path / "b/gsm8k/full/rows.jsonl").write_text("")
    with pytest.raises(RLKVError, match="no run is finished yet"):
        tables.main(tables.Config([str(tmp_path / "b")], output=str(tmp_path / "out")))


def test_drop_and_contest(written: Path) -> None:
    text = document(written, "drop")
    assert row(text, "reasoning", "Tiny-R1", "KVzip")[3:] == ["0.25", "-15.0", "-15.0"]
    assert row(text, "instruct", "Tiny-Instruct", "RLKV", "0.5")[4:] == ["-25.0", "–"]
    text = document(written, "contest")
    assert row(text, "0.25") == ["0.25", "0", "0", "4"]  # random, KVzip, RLKV: two models, two tasks
    assert row(text, "0.5") == ["0.5", "0", "0", "2"]


def test_kv_bytes(written: Path) -> None:
    cells = row(document(written, "kv_bytes"), "GSM8K", "RLKV", "0.5")
    # requests hold 0.6 of 1, 2, ..., 40 MiB: 12.3 MiB on average; answers have 100 ... 139 tokens
    assert cells[3:] == ["50.0", "120", "12.3", "60.0"]


def test_one_evaluation_twice(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "a")
    with pytest.raises(RLKVError, match="two of the folders hold full at 0 on gsm8k for Tiny-R1"):
        join([own_scores(load_results(folder))] * 2)


def test_nothing_to_draw_from() -> None:
    with pytest.raises(RLKVError, match="nothing to draw from"):
        tables.main(tables.Config())


def test_markdown() -> None:
    table = Table("T", ["a|b", "n"], [["x", Cell("1", "(0–2)", best=True)], ["long name", "n/p"]], ["note"])
    assert markdown_table(table).splitlines() == [
        "## T", "",
        "| a\\|b      |           n |",
        "| --------- | ----------: |",
        "| x         | **1** (0–2) |",
        "| long name |         n/p |", "",
        "note",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="needs 2 cells"):
        markdown_table(replace(table, rows=[["x"]]))


def test_latex() -> None:
    table = Table(
        "50 % & more", ["m_1", "n"], [["a_b", "-1.5"], ["c", Cell("2", "(±1)", best=True)]], rules=[1]
    )
    text = latex_table(table)
    assert r"\caption{50 \% \& more.}" in text and r"\begin{tabular}{lr}" in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    assert body.splitlines()[1:] == [
        r"m\_1 & n \\", r"\midrule", r"a\_b & $-$1.5 \\", r"\midrule",
        r"c & \textbf{2} {\scriptsize ($\pm$1)} \\",
    ]  # fmt: skip


def test_every_latex_row_fits_its_table(written: Path) -> None:
    paths = list(written.glob("*.tex"))
    assert len(paths) == 5
    for path in paths:
        text = path.read_text()
        assert text.isascii() and text.count(r"\begin{") == text.count(r"\end{")
        for columns, body in re.findall(r"(?s)\\begin{tabular}{([lr]+)}(.*?)\\end{tabular}", text):
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert rows and all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in rows)


def test_mark_best() -> None:
    assert mark_best([1.0, None, 2.0, 2.0]) == [False, False, True, True]
    assert mark_best([None, 2.0]) == [False, False]  # no contest


tables_of_numbers = st.lists(st.integers(0, 5), min_size=4, max_size=30)


@settings(deadline=None)
@given(tables_of_numbers, st.randoms(use_true_random=False))
def test_spearman_by_its_definition(values: list[int], random) -> None:
    """Ranks counted pair by pair, then numpy's correlation."""
    others = random.sample(values, len(values))

    def ranks(numbers: list[int]) -> list[float]:
        return [sum(b < a for b in numbers) + (sum(b == a for b in numbers) + 1) / 2 for a in numbers]

    found = overlap.spearman(np.array(values), np.array(others))
    if len(set(values)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(ranks(values), ranks(others))[0, 1], abs=1e-9)


@settings(deadline=None)
@given(tables_of_numbers, st.sampled_from([0.0, 0.2, 0.5, 0.75, 1.0]), st.integers(0, 9))
def test_keep_takes_the_highest(values: list[int], sparsity: float, seed: int) -> None:
    scores = np.array(values, dtype=float).reshape(1, -1)
    kept = overlap.keep(scores, sparsity, seed)
    assert kept.sum() == round((1 - sparsity) * len(values))
    if kept.any() and not kept.all():
        assert scores[kept].min() >= scores[~kept].max()


def test_jaccard_and_ties() -> None:
    first, second = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[4.0, 1.0, 3.0, 2.0]])
    assert overlap.expected_jaccard(first, second, 0.5) == pytest.approx(1 / 3)  # {0, 1} and {0, 2}
    tied = np.ones((20, 20))
    assert overlap.expected_jaccard(tied, tied, 0.5) == pytest.approx(overlap.random_jaccard(0.5), abs=0.02)


def test_head_scores_of_our_own_runs(tmp_path: Path) -> None:
    shape = ModelShape(layers=2, query_heads=4, kv_heads=2, head_dim=8, name="models/tiny")
    for name in ("kvzip-0123456789ab", "rlkv", "duo/tiny"):
        HeadGates(torch.rand(2, 2), model=shape).save(tmp_path / name)
    assert list(overlap.load_head_scores(tmp_path)["tiny"]) == ["rlkv", "kvzip", "duo"]
    HeadGates(torch.rand(2, 2), model=shape).save(tmp_path / "kvzip-00000000000f")
    with pytest.raises(RLKVError, match="two sets of head scores for kvzip on tiny"):
        overlap.load_head_scores(tmp_path)


def test_head_scores_folder(tmp_path: Path) -> None:
    for method in ("duo_attn", "rlkv"):
        (tmp_path / method).mkdir()
        (tmp_path / method / "m.tsv").write_text("0.1\t0.9\n0.5\t0.4\n")
    found = overlap.load_head_scores(tmp_path)
    assert list(found) == ["m"] and list(found["m"]) == ["rlkv", "duo"]
    tables.main(tables.Config(gates=str(tmp_path), output=str(tmp_path / "out"), sparsities=[0.5]))
    assert row(document(tmp_path / "out", "head_overlap"), "m")[1:] == [
        "RLKV / DuoAttention",
        "1.000",
        "1.000",
    ]
    (tmp_path / "duo_attn" / "m.tsv").write_text("0.1\t0.9\n")
    with pytest.raises(RLKVError, match="different shapes"):
        overlap.load_head_scores(tmp_path)
    with pytest.raises(RLKVError, match="no head scores"):
        overlap.load_head_scores(tmp_path / "out")
