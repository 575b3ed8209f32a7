"""Evaluation against one answer at a time, and the table against counting by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_folder import WINDOW, evaluation

from rlkv.answers import Row, answer_masks, read_rows
from rlkv.bench import Bench, EvalConfig
from rlkv.cache import HeadwiseCache
from rlkv.evaluate import evaluate
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.report import Entry, accuracy, difference, markdown, summarise
from rlkv.statistics import compare, wilson
from rlkv.support import ModelShape
from rlkv.window import Window

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    return evaluation(tmp_path_factory.mktemp("evaluate"))


def test_each_mask_answers_as_it_does_alone_with_the_shrinking_cache(
    config: EvalConfig, tmp_path: Path
) -> None:
    evaluate(replace(config, output=str(tmp_path)))
    bench = Bench(config)
    prompts = bench.problems("", "test", 0)
    rows = read_rows(tmp_path / "rows.jsonl")
    written = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(rows) == len(written) == 7 * 5  # full, 2 x RLKV, 2 x 2 random
    for path in sorted((tmp_path / "masks").iterdir()):
        mask = HeadMask.load(path)
        assert mask.window == WINDOW
        for problem, tokens in zip(prompts.problems, prompts.tokens, strict=True):
            ids = torch.tensor([tokens])
            cache = HeadwiseCache(bench.model.config, mask)
            found = bench.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=24,
                do_sample=False,
            )[0, len(tokens) :].tolist()
            text = bench.tokenizer.decode(found[:-1] if len(found) < 24 else found)
            row = rows[path.stem, f"{problem.task}/{problem.id}"]
            assert (row.prompt_tokens, row.tokens) == (len(tokens), len(found))
            assert row.score == (sum(map(ord, "<think>" + text)) % 2 == 0)


def test_rlkv_masks_cut_the_lowest_gates(config: EvalConfig, tmp_path: Path) -> None:
    evaluate(replace(config, output=str(tmp_path)))
    values = HeadGates.load(config.gates).values.flatten()
    full = HeadMask.load(tmp_path / "masks" / "rlkv-0.666667.json").full.flatten()
    assert full.sum() == 3
    assert set(full.nonzero()[:, 0].tolist()) == set(values.argsort(descending=True)[:3].tolist())


def test_chunks_change_nothing(config: EvalConfig, tmp_path: Path) -> None:
    bench = Bench(config)
    prompts = bench.problems("", "test", 0)
    masks = {"a": torch.ones(3, 3), "b": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])}
    found = [
        answer_masks(
            tmp_path / f"{chunk}.jsonl",
            bench.sampler(prompts),
            bench.tokenizer,
            prompts,
            masks,
            bench.reward,
            max_new_tokens=12,
            chunk=chunk,
        )
        for chunk in (1, 3, 100)
    ]
    assert found[0] == found[1] == found[2]
    assert [row.problem for row in found[0]["b"]] == ["even/0", "odd/1", "even/2", "odd/3", "even/4"]


SHAPE = ModelShape(2, 4, 2, 8, "qwen3", "made up", 512, 4)


def made_up() -> tuple[list[Entry], dict[str, list[Row]]]:
    """Full, RLKV and two random masks on four problems of two tasks."""
    window = Window(1, 9)
    masks = {
        "full": HeadMask(torch.ones(2, 2, dtype=torch.bool), window, SHAPE),
        "rlkv": HeadMask(torch.tensor([[True, False], [True, False]]), window, SHAPE),
        "random-0": HeadMask(torch.tensor([[False, False], [True, True]]), window, SHAPE),
        "random-1": HeadMask(torch.tensor([[True, True], [False, False]]), window, SHAPE),
    }
    scores = {"full": "1110", "rlkv": "1101", "random-0": "0100", "random-1": "0000"}
    lengths = {"full": 90, "rlkv": 90, "random-0": 40, "random-1": 190}
    entries, rows = [], {}
    for name, mask in masks.items():
        method = name.partition("-")[0]
        entries.append(Entry(method, 0.0 if method == "full" else 0.5, name, mask))
        rows[name] = [
            Row(
                mask=name,
                problem=str(number),
                task="ab"[number // 2],
                kind="correct" if score == "1" else "truncated",
                score=float(score),
                prompt_tokens=10,
                tokens=lengths[name],
            )
            for number, score in enumerate(scores[name])
        ]
    return entries, rows


def test_the_summary_is_what_one_counts_by_hand() -> None:
    results = summarise(*made_up())
    full, rlkv, random = results["methods"]
    assert [row["accuracy"]["value"] for row in (full, rlkv, random)] == [0.75, 0.75, 0.125]
    assert (rlkv["lost_to_full"], rlkv["gained_on_full"], rlkv["mcnemar_p_full"]) == (1, 1, 1.0)
    assert (random["lost_to_full"], random["gained_on_full"]) == (2.5, 0)
    assert rlkv["minus_full"]["value"] == 0
    assert random["minus_full"]["value"] == pytest.approx(-0.625)
    assert random["rlkv_minus_this"]["value"] == pytest.approx(0.625)
    assert "rlkv_minus_this" not in full and "rlkv_minus_this" not in rlkv
    assert (random["masks"], random["mean_output_tokens"], random["truncated"]) == (2, 115, 7 / 8)
    a_token = 2 * 8 * 4  # key and value, head_dim, float32
    assert full["kv_bytes"] == 4 * 100 * a_token
    assert rlkv["kv_bytes"] == (2 * 100 + 2 * 10) * a_token
    assert random["kv_bytes"] == ((2 * 50 + 20) + (2 * 200 + 20)) / 2 * a_token
    assert random["kv_share"] == pytest.approx((120 + 420) / (200 + 800))
    assert rlkv["kv_bytes_at_typical_length"] == random["kv_bytes_at_typical_length"]
    assert [row["accuracy"]["value"] for row in results["tasks"]["b"]] == [0.5, 0.5, 0.0]
    assert rlkv["minus_full"]["low"] < 0 < rlkv["minus_full"]["high"]


def test_a_single_problem_is_summarised_without_certainty() -> None:
    entries, rows = made_up()
    found = summarise(entries, {name: these[:1] for name, these in rows.items()})["methods"]
    minus = found[2]["minus_full"]
    assert (minus["value"], minus["low"]) == (-1, -1) and minus["high"] > 0
    json.dumps(found, allow_nan=False)


def test_masks_that_never_vary_are_not_certain() -> None:
    assert accuracy(np.zeros((4, 20))) == wilson(0, 20)
    zero, one = np.zeros((4, 20)), np.ones((1, 20))
    assert difference(zero, one)["minus"] == asdict(compare([False] * 20, [True] * 20).difference)


def test_the_table_has_a_row_for_each_method() -> None:
    results = {"model": "m", "data": "d", "window": "1+9", "prefill": "full", **summarise(*made_up())}
    lines = markdown(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert sum(line.startswith("| RLKV | 0.500 | 75.0 [") for line in table) == 1
    assert sum(line.startswith("| random (mean of 2) |") for line in table) == 3  # all, a, b
