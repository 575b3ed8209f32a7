"""Evaluation against one answer at a time, going on after a kill, and the table against counting by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import WINDOW, save_gates, save_model, save_problems

from rlkv.answers import Row, answer_masks, read_rows
from rlkv.bench import Bench, EvalConfig
from rlkv.cache import HeadwiseCache
from rlkv.errors import RLKVError
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
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_model(folder / "model")
    return EvalConfig(
        gates=str(save_gates(folder / "gates", model)),
        data=str(save_problems(folder / "test.jsonl")),
        output=str(folder / "never"),
        sparsities=[0.25, 2 / 3],
        random_masks=2,
        reward="tiny_folder:parity",
        max_new_tokens=24,
        slots=8,
        device="cpu",
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_each_mask_answers_as_it_does_alone_with_the_shrinking_cache(
    config: EvalConfig, tmp_path: Path
) -> None:
    evaluate(replace(config, output=str(tmp_path)))
    bench = Bench(config)
    prompts = bench.problems("", "test", 0)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len(rows_of(tmp_path)) == 7 * 5  # full, 2 x RLKV, 2 x 2 random
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


@pytest.mark.parametrize("kept", [0, 1, 17, 34])
def test_a_killed_run_goes_on_to_the_same_result(config: EvalConfig, tmp_path: Path, kept: int) -> None:
    whole = evaluate(replace(config, output=str(tmp_path / "whole")))
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines(keepends=True)
    broken = tmp_path / "broken"
    evaluate(replace(config, output=str(broken)))
    (broken / "rows.jsonl").write_text("".join(lines[:kept]) + lines[kept][:15])  # killed in mid-line
    assert evaluate(replace(config, output=str(broken))) == whole
    again = (broken / "rows.jsonl").read_text().splitlines(keepends=True)
    assert again[:kept] == lines[:kept]
    assert sorted(again) == sorted(lines)


def test_rows_that_are_there_are_not_answered_again(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(config, output=str(tmp_path), n=3, sparsities=[0.25], random_masks=1)
    evaluate(small)
    asked: list[int] = []
    from rlkv.sampler import Sampler

    generate = Sampler.generate

    def counting(self: Sampler, prompts: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, *rest, **options)

    monkeypatch.setattr(Sampler, "generate", counting)
    evaluate(small)
    assert sum(asked) == 0
    evaluate(replace(small, n=5, random_masks=2, chunk=4))  # 3 masks x 2 new problems, 1 new mask x 5
    assert sum(asked) == 11 and max(asked) <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 23}, "max_new_tokens=24, now it is 23"),
        ({"prefill": "local"}, "prefill=full, now it is local"),
        ({"window": Window(2, 7)}, "window=None, now it is 2\\+7"),
    ],
)
def test_rows_of_other_settings_are_not_mixed(
    config: EvalConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    small = replace(config, output=str(tmp_path), n=2, sparsities=[0.25], random_masks=1)
    evaluate(small)
    with pytest.raises(RLKVError, match=message):
        evaluate(replace(small, **change))


def test_rows_of_other_gates_are_not_mixed(config: EvalConfig, tmp_path: Path) -> None:
    small = replace(config, output=str(tmp_path / "out"), n=2, sparsities=[0.5], methods=["rlkv"])
    evaluate(small)
    model = json.loads((Path(config.gates) / "card.json").read_text())["config"]["model"]
    other = save_gates(tmp_path / "other", Path(model), seed=5)
    with pytest.raises(RLKVError, match="another mask"):
        evaluate(replace(small, gates=str(other)))


def test_answers_to_problems_that_have_changed_are_not_reported(config: EvalConfig, tmp_path: Path) -> None:
    """Problems without an id of their own are numbered by line: others of the same number are others."""
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    path = tmp_path / "problems.jsonl"

    def write(*rows: dict[str, Any]) -> None:
        path.write_text(
            "".join(json.dumps({key: row[key] for key in ("prompt", "answer")}) + "\n" for row in rows)
        )

    small = replace(config, data=str(path), output=str(tmp_path / "out"), n=0, methods=["rlkv"])
    write(*rows[:2])
    evaluate(small)
    write(*rows[:3])  # more problems may come
    whole = evaluate(small)
    for changed in ({"prompt": "search a=11"}, {"answer": "11"}):
        write(rows[0], rows[1] | changed, rows[2])
        with pytest.raises(RLKVError, match="an answer to another problem '1'"):
            evaluate(small)
    write(*rows[:3])
    assert evaluate(small) == whole


def test_rows_of_older_versions_are_read(config: EvalConfig, tmp_path: Path) -> None:
    """They hold no digest of the problem."""
    small = replace(config, output=str(tmp_path), methods=["rlkv"])
    whole = evaluate(small)
    rows = rows_of(tmp_path)
    assert all(row.pop("digest") for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(small) == whole
    assert "digest" not in rows_of(tmp_path)[0]  # nothing was answered again


def test_problems_with_the_same_id_are_refused(config: EvalConfig, tmp_path: Path) -> None:
    path = save_problems(tmp_path / "twice.jsonl", 2)
    path.write_text(path.read_text() * 2)
    with pytest.raises(RLKVError, match="two problems have the id 'even/0'"):
        evaluate(replace(config, data=str(path), output=str(tmp_path / "out")))


def test_a_file_that_is_not_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"mask": "full"}\n')
    with pytest.raises(RLKVError, match="line 1 is not a row"):
        read_rows(tmp_path / "rows.jsonl")


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
