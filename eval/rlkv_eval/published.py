"""The RLKV authors' result files (github.com/Kurt232/RLKV, branch camera-ready), read into :class:`Score`.

    bench/<model>/result.json                   file name -> accuracy in %  (HF evaluator)
    longreason/<model>/result.json              the same, with result_lengths.json: mean output tokens
    efficiency/pred_sweep/<model>/result.json   the same, RLKV at several windows (SGLang)
    efficiency/<model>/<run>.stats.json         timing of one SGLang run, with result.json beside it

A file name says the task, the method, what its head scores are called, the window, and the sparsity:
``mbpp-rlkv-llama_lr1e-2_..._tau0.5-s16r64-sp-0.4.jsonl``. Error classes are read from ``result_evals.json``
(its "results") or ``result_errors.json``: error, incorrect, overlength and repeat, in % of all answers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkv.errors import RLKVError
from rlkv.statistics import Estimate, wilson
from rlkv_eval.scores import Score, Scores
from rlkv_eval.tasks.base import ALIASES

# Problems of each task, as the authors ran them; every published accuracy is a whole number of these.
PROBLEMS = {
    "gsm8k": 1319,
    "math500": 500,
    "aime24": 30,
    "mbpp": 500,
    "mmlu_pro_chemistry": 500,
    "mmlu_pro_computer_science": 410,
    "mmlu_pro_law": 500,
    "mmlu_pro_physics": 500,
    "longreason": 400,
}
OUR_NAMES = {"duo_attn": "duo"}
# The KVzip head scores of the main table; only another set is named in a row of its own.
USUAL_SCORES = {"scbench_repoqa-0": "repoqa", "scbench_qa_eng-0": "qa_eng"}
WINDOW = re.compile(r"^(?P<scores>.*?)-?(?P<window>s\d+r\d+)$")
ERROR_KINDS = ("wrong", "truncated", "repetition")  # incorrect, overlength, repeat


@dataclass(frozen=True)
class RunName:
    """What a result's file name says; ``scores`` is what the authors call the head scores."""

    task: str
    method: str
    sparsity: float = 0.0
    scores: str = ""
    window: str = ""

    @property
    def variant(self) -> str:
        """What tells this run apart from others of its method at this sparsity."""
        kind = USUAL_SCORES.get(self.scores, "") if self.method == "kvzip" else ""
        return self.window or kind


@dataclass(frozen=True)
class Efficiency:
    """One SGLang run over all problems at once; times in seconds, engine start-up excluded."""

    model: str
    task: str
    method: str
    sparsity: float
    problems: int
    max_running: int
    seconds: float
    tokens_per_second: float  # generated
    requests_per_second: float
    seconds_per_request: float
    input_tokens: int
    output_tokens: int
    mean_output: float
    min_output: int
    hit_limit: int  # answers cut off at max_new_tokens
    window: int  # tokens a local head holds
    score: Score | None  # accuracy and error classes of the same run


@dataclass(frozen=True)
class Published:
    """All that was published; parts without files are empty."""

    bench: Scores
    sweep: Scores
    longreason: Scores
    efficiency: tuple[Efficiency, ...]


def load_published(folder: str | Path) -> Published:
    """Read the layout above. RLKVError when there is none of it, or a file cannot be read."""
    folder = Path(folder)
    found = Published(
        read_scores(folder / "bench"),
        read_scores(folder / "efficiency" / "pred_sweep"),
        read_scores(folder / "longreason"),
        read_efficiency(folder / "efficiency"),
    )
    if not (found.bench or found.sweep or found.longreason or found.efficiency):
        raise RLKVError(f"{folder} has no published results: expected bench/<model>/result.json, or the like")
    return found


def read_scores(folder: Path) -> Scores:
    """The scores under ``folder``/<model>/result.json; none if there is no such file."""
    items: list[Score] = []
    for path in sorted(folder.glob("*/result.json")):
        lengths = read_object(path.with_name("result_lengths.json"))
        errors = read_errors(path.parent)
        for file, percent in read_object(path).items():
            if not isinstance(percent, int | float):
                raise RLKVError(f"{path}: {file} should have an accuracy in %, but has {percent!r}")
            score = make_score(path.parent.name, parse_name(file, path), float(percent))
            items.append(replace(score, tokens=lengths.get(file), kinds=errors.get(file, {})))
    return Scores(tuple(items), published=True)


def make_score(model: str, name: RunName, percent: float) -> Score:
    """A score with Wilson's interval: the count of right answers can be told from the percentage."""
    problems = PROBLEMS.get(name.task)
    interval = None
    if problems:
        exact = wilson(round(percent * problems / 100), problems)
        interval = Estimate(percent, 100 * exact.low, 100 * exact.high)
    return Score(
        model, name.task, name.method, name.sparsity, percent, interval, problems, variant=name.variant
    )


def read_efficiency(folder: Path) -> tuple[Efficiency, ...]:
    """The timed runs under ``folder``/<model>/*.stats.json, by model and sparsity."""
    accuracies = read_scores(folder)
    runs = [read_run(path, accuracies) for path in sorted(folder.glob("*/*.stats.json"))]
    return tuple(sorted(runs, key=lambda run: (run.model, run.task, run.sparsity)))


def read_run(path: Path, accuracies: Scores) -> Efficiency:
    """One stats.json. Its name, not its config, tells the sparsity: a full run's config says 0.5."""
    stats = read_object(path)
    name = parse_name(path.name.removesuffix(".stats.json") + ".jsonl", path)
    model = path.parent.name
    try:
        config, times, tokens = stats["config"], stats["throughput"], stats["token_stats"]
        return Efficiency(
            model=model,
            task=name.task,
            method=name.method,
            sparsity=name.sparsity,
            problems=config["num_samples"],
            max_running=config["max_running_requests"],
            seconds=times["total_time_s"],
            tokens_per_second=times["avg_gen_throughput_tok_s"],
            requests_per_second=times["avg_req_throughput_req_s"],
            seconds_per_request=times["avg_latency_per_req_s"],
            input_tokens=times["total_input_tokens"],
            output_tokens=times["total_output_tokens"],
            mean_output=tokens["avg_output_tokens"],
            min_output=tokens["min_output_tokens"],
            hit_limit=tokens["hit_max_tokens"],
            window=config["sink_size"] + config["recent_size"],
            score=accuracies.get(model, name.task, name.method, name.sparsity),
        )
    except (KeyError, TypeError) as error:
        raise RLKVError(f"{path} is not the timing of a run: it lacks {error}") from None


def parse_name(file: str, where: Path) -> RunName:
    """Task, method, head scores, window and sparsity from a result's file name."""
    stem, dot, _ = file.partition(".jsonl")
    head, marked, sparsity = stem.partition("-sp-")
    task, _, tag = head.partition("-")
    method, _, scores = tag.partition("-")
    if not dot or not method or (method != "full") != bool(marked):
        raise RLKVError(
            f"{where}: {file!r} does not name a run: <task>-full.jsonl or <task>-<method>-sp-<s>.jsonl"
        )
    try:
        value = float(sparsity or 0)
    except ValueError:
        raise RLKVError(f"{where}: {file!r} should end in -sp-<number>.jsonl") from None
    match = WINDOW.match(scores)
    window = match["window"] if match else ""
    scores = (match["scores"] if match else scores).removeprefix("pattern-")
    return RunName(ALIASES.get(task, task), OUR_NAMES.get(method, method), value, scores, window)


def read_errors(folder: Path) -> dict[str, dict[str, float]]:
    """File name -> our error classes -> % of all answers."""
    found = read_object(folder / "result_evals.json").get("results") or read_object(
        folder / "result_errors.json"
    )
    return {file: dict(zip(ERROR_KINDS, parts[1:], strict=True)) for file, parts in found.items()}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RLKVError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RLKVError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content
