"""The authors' result files: names, numbers, and every cell of the tables made from them."""

from __future__ import annotations

import os
import re
from math import ceil
from pathlib import Path

import pytest
from score_kit import published_folder, write_object

from rlkv.errors import RLKVError
from rlkv_eval import tables
from rlkv_eval.overlap import keep, load_head_scores, spearman
from rlkv_eval.published import load_published, parse_name, read_scores

SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
REFERENCE = SHARED.parent / "reference" / "published_tables.md"

HERE = Path("result.json")
Rows = list[list[str]]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("aime24-full.jsonl", ("aime24", "full", 0.0, "", "")),
        ("mbpp-h2o-sp-0.2.jsonl", ("mbpp", "h2o", 0.2, "", "")),
        ("gsm8k-duo_attn-pattern-lr=0.02-ctx=1_3-sp-0.4.jsonl", ("gsm8k", "duo", 0.4, "lr=0.02-ctx=1_3", "")),
        ("math_500-rlkv-a_tau0.5-s16r64-sp-0.3.jsonl", ("math500", "rlkv", 0.3, "a_tau0.5", "s16r64")),
        ("mmlu_pro_law-kvzip-scbench-0-sp-0.8.jsonl", ("mmlu_pro_law", "kvzip", 0.8, "scbench-0", "")),
        ("gsm8k-rlkv-s16r64-sp-0.5.jsonl", ("gsm8k", "rlkv", 0.5, "", "s16r64")),
    ],
)  # fmt: skip
def test_file_names(file: str, expected: tuple[str, str, float, str, str]) -> None:
    name = parse_name(file, HERE)
    assert (name.task, name.method, name.sparsity, name.scores, name.window) == expected


@pytest.mark.parametrize("file", ["gsm8k.jsonl", "gsm8k-h2o.jsonl", "gsm8k-h2o-sp-x.jsonl", "gsm8k-full.txt"])
def test_names_that_are_no_runs(file: str) -> None:
    with pytest.raises(RLKVError, match="result.json: "):
        parse_name(file, HERE)


def test_reads_all_parts(tmp_path: Path) -> None:
    found = load_published(published_folder(tmp_path))
    assert [pair for pair in found.bench.settings] == [
        ("duo", ""), ("kvzip", "repoqa"), ("kvzip", "qa_eng"), ("rlkv", "")
    ]  # fmt: skip
    score = found.bench.get("Tiny-R1", "aime24", "full")
    assert score and score.interval and score.problems == 30
    # 9 of 30 by Wilson's formula, worked out by hand with z = 1.96
    assert score.interval.low == pytest.approx(16.66, abs=0.02)
    assert score.interval.high == pytest.approx(47.88, abs=0.02)
    assert found.sweep.get("Tiny-R1", "gsm8k", "rlkv", 0.3, "s32r128").tokens == 987.6  # type: ignore[union-attr]
    full, half = found.efficiency
    assert (full.method, full.sparsity, half.sparsity, half.window) == ("full", 0.0, 0.5, 80)
    assert half.score and half.score.kinds == {"wrong": 20.0, "truncated": 8.0, "repetition": 2.0}


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="no published results"):
        load_published(tmp_path)
    write_object(tmp_path / "m" / "result.json", {"gsm8k-full.jsonl": "high"})
    with pytest.raises(RLKVError, match="accuracy in %"):
        read_scores(tmp_path)
    (tmp_path / "m" / "result.json").write_text("{")
    with pytest.raises(RLKVError, match="is not JSON"):
        read_scores(tmp_path)
    write_object(tmp_path / "efficiency" / "m" / "math_500-full.stats.json", {"config": {}})
    with pytest.raises(RLKVError, match="lacks 'throughput'"):
        load_published(tmp_path)


def test_tables_of_a_small_folder(tmp_path: Path) -> None:
    written = make_tables(published_folder(tmp_path / "in"), tmp_path / "out")
    main = written["published_main"]["Tiny-R1"]
    assert main[0] == ["method", "sp", "GSM8K", "AIME24", "mean"]
    assert main[1:] == [
        ["Full", "0", "50.0", "30.0", "40.0"],
        ["DuoAttention", "0.4", "25.0", "n/p", "n/p"],
        ["KVzip (repoqa)", "0.4", "40.0", "20.0", "30.0"],
        ["KVzip (qa_eng)", "0.4", "n/p", "23.3", "n/p"],
        ["RLKV", "0.4", "**49.0**", "n/p", "n/p"],
    ]
    sweep = written["published_sweep"]["Tiny-R1"]
    assert ["s16r64", "0.6", "n/p"] in sweep and ["s32r128", "0.6", "60.0 / 988"] in sweep
    frontier = next(rows for title, rows in written["published_sweep"].items() if title.startswith("Largest"))
    assert [row[-1] for row in frontier[1:]] == ["--", "0.6 / 60.0 (full 60.0)"]  # 0.3 fails, 0.6 passes
    efficiency = next(iter(written["published_efficiency"].values()))
    assert efficiency[2][:8] == ["0.5", "70.0", "1.85×", "4", "50.00", "2.00×", "180.0", "2.00×"]  # L = 1000
    assert efficiency[2][-1] == "30.0 = 20.0 + 8.0 + 2.0"


# What the reference calls methods and columns, in our words.
NAMES = {
    "KVZip(repoqa)": "KVzip (repoqa)", "KVZip(qa_eng)": "KVzip (qa_eng)", "DuoAttn": "DuoAttention",
    "CS": "MMLU-Pro CS", "Law": "MMLU-Pro Law", "Phys": "MMLU-Pro Phys", "--": "n/p",
    "duo_attn": "DuoAttention", "kvzip": "KVzip", "rkv": "R-KV", "rlkv": "RLKV", "full": "full", "h2o": "H2O",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> str:
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not here; set RLKV_SHARED_DATA")
    return REFERENCE.read_text()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Rows]]:
    folder = SHARED / "published"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set RLKV_SHARED_DATA")
    return make_tables(folder, tmp_path_factory.mktemp("tables"))


def make_tables(published: Path, output: Path) -> dict[str, dict[str, Rows]]:
    """Document -> title -> rows, read back from the Markdown that was written."""
    paths = tables.main(tables.Config(published=str(published), output=str(output)))
    return {path.stem: read_tables(path.read_text(), "## ") for path in paths if path.suffix == ".md"}


def section(reference: str, number: int) -> str:
    return re.split(r"(?m)^## \d+\. ", reference)[number]


def read_tables(text: str, mark: str) -> dict[str, Rows]:
    """Heading -> rows of the table under it, its head first."""
    found: dict[str, Rows] = {}
    for part in re.split(rf"(?m)^{mark}", text)[1:]:
        title, _, body = part.partition("\n")
        lines = [line.strip().strip("|") for line in body.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        if cells:
            found[title.split("  (")[0].strip()] = [cells[0], *cells[2:]]
    return found


def in_our_words(cell: str) -> str:
    """A reference cell: names as ours; the best method's star as bold."""
    text = NAMES.get(cell, cell)
    return f"**{text[:-1]}**" if text.endswith("*") else text


def same_cells(theirs: Rows, mine: Rows, keys: int) -> int:
    """Compare row by row, cell by cell; our further rows may only hold cells that were not published."""
    table = {tuple(row[:keys]): row[keys:] for row in mine[1:]}
    heads = [in_our_words(cell) for cell in theirs[0]]
    assert mine[0] == heads
    for row in theirs[1:]:
        words = [in_our_words(cell) for cell in row]
        assert table.pop(tuple(words[:keys])) == words[keys:], words[:keys]
    assert all(set(rest) == {"n/p"} for rest in table.values())
    return sum(len(row) - keys for row in theirs[1:])


def test_every_cell_of_the_main_results(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    theirs = read_tables(section(reference, 1), "### ")
    assert len(theirs) == 3
    cells = sum(same_cells(rows, ours["published_main"][model], keys=2) for model, rows in theirs.items())
    assert cells == 9 * (21 + 24 + 21)


def test_who_is_best_where(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    won, lost = ours["published_contest"].values()
    text = section(reference, 1)
    lines = re.findall(r"- sp (\S+): cells won .*?: (.*)", text)
    assert len(lines) == 4
    for sparsity, counts in lines:
        theirs = {NAMES[name]: count for name, count in re.findall(r"(\w+) (\d+)", counts)}
        mine = next(row for row in won if row[0] == sparsity)
        assert dict(zip(won[0][1:], mine[1:], strict=True)) == theirs
    found = set()
    for model, line in re.findall(r"(?m)^- ((?:Llama|Qwen)\S+): (.*)$", text):
        for task, sparsity, best, value, rlkv in re.findall(
            r"([^;]+?) sp(\S+): (\w+) (\S+) vs RLKV ([\d.]+)", line
        ):
            found.add((model, sparsity, NAMES.get(task.strip(), task.strip()), NAMES[best], value, rlkv))
    assert {tuple(row) for row in lost[1:]} == found and len(found) == 29


def test_every_cell_of_the_sweep(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    theirs = read_tables(section(reference, 2), "### ")
    mine = ours["published_sweep"]
    frontier = next(title for title in theirs if title.startswith("Lossless frontier"))
    models = [title for title in theirs if title != frontier]
    assert sum(same_cells(theirs[model], mine[model], keys=2) for model in models) == 8 * (12 + 13 + 13)
    last = next(rows for title, rows in mine.items() if title.startswith("Largest sparsity"))
    marked = [[cell.replace("--", "n/p") for cell in row] for row in last]
    assert same_cells(theirs[frontier], marked, keys=2) == 72


def test_efficiency(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    theirs = next(iter(read_tables("### x\n" + section(reference, 5), "### ").values()))
    mine = next(iter(ours["published_efficiency"].values()))
    for row, own in zip(theirs[1:7], mine[1:], strict=True):
        assert own[:2] + own[3:] == [re.sub(r"x$", "×", cell) for cell in row[:2] + row[3:]]
        if (
            row[2] != "--"
        ):  # the column with the bound: their length is not given, see docs/published_tables.md
            assert float(own[2].strip("×")) == pytest.approx(float(row[2].strip("x")), rel=0.01)


LONG = {"kvzip": "kvzip (repoqa)"}


def test_longreason(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    theirs = next(iter(read_tables("### x\n" + section(reference, 7), "### ").values()))
    mine = {
        (row[0].lower(), row[1]): row[2:] for row in next(iter(ours["published_longreason"].values()))[1:]
    }
    assert len(theirs) - 1 == len(mine) == 17
    for method, sparsity, accuracy, _, *_, length in theirs[1:]:
        found = mine[LONG.get(method, NAMES[method].lower()), sparsity]
        assert found[0].strip("*") == f"{float(accuracy):.2f}"  # 400 answers: quarters of a point
        assert found[1] == f"{float(length):.0f}"
        assert set(found[2:]) == {"n/p"}  # error classes: no file


def test_thresholds(reference: str, ours: dict[str, dict[str, Rows]]) -> None:
    """Section 6: cells at sparsities that have files agree to the digits that are given."""
    theirs = next(iter(read_tables("### x\n" + section(reference, 6), "### ").values()))
    mine = next(rows for title, rows in ours["published_near_lossless"].items() if "paper" in title)
    table = {(row[0], row[1]): row[2:] for row in mine[1:]}
    model, compared = "", 0
    for first, method, *cells in theirs[1:]:
        model = first or model
        for text, own in zip(cells, table[model, method], strict=True):
            if own == "n/p":
                continue
            numbers = [[float(n) for n in re.findall(r"[-+]?\d+\.?\d*", cell)] for cell in (text, own)]
            assert numbers[1] == pytest.approx(numbers[0], abs=0.051), (model, method)
            compared += 1
    assert compared == 12 + 12 + 4 * (3 + 3)


def test_head_overlap(reference: str) -> None:
    """Section 11: its ties were broken by noise, so its value is one of those that orders of ties give."""
    folder = SHARED / "gates"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set RLKV_SHARED_DATA")
    heads = load_head_scores(folder)
    names = {"duo_attn": "duo", "kvzip": "kvzip", "rlkv": "rlkv"}
    pattern = r"(?m)^(\S+) (\w+)/(\S+) vs (\w+)/(\S+) spearman (\S+) (.*)$"
    compared = 0
    for model, first, scores, second, others, rho, rest in re.findall(pattern, section(reference, 10)):
        if "qa_eng" in scores + others:
            continue
        pair = heads[model][names[first]], heads[model][names[second]]
        assert spearman(*pair) == pytest.approx(float(rho), abs=0.005)
        for sparsity, jaccard in re.findall(r"sp(\S+) J (\S+)", rest):
            size = pair[0].size
            pruned = ceil(float(sparsity) * (size - 1) - 1e-9)  # the authors cut at numpy's quantile
            kept = [[keep(scores, pruned / size, seed) for scores in pair] for seed in range(200)]
            found = [float((a & b).sum() / (a | b).sum()) for a, b in kept]
            assert min(found) - 0.001 <= float(jaccard) <= max(found) + 0.001, (
                model,
                first,
                second,
                sparsity,
            )
            compared += 1
    assert compared == 9 * 5
