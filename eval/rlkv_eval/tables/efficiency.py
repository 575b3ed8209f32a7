"""Speed and memory: the authors' SGLang runs beside the bound, and the true KV bytes of our own runs."""

from __future__ import annotations

from rlkv_eval.names import method_title, task_title
from rlkv_eval.published import Efficiency
from rlkv_eval.scores import Scores
from rlkv_eval.tables.render import NOT_RUN, Table


def speed_bound(sparsity: float, window: int, length: float) -> float:
    """Most that local heads can gain where KV memory binds: 1 / ((1 - s) + s W / L), L tokens a request."""
    return 1 / ((1 - sparsity) + sparsity * min(window, length) / length)


def efficiency_tables(runs: tuple[Efficiency, ...]) -> list[Table]:
    """One table for each model and task of the authors' timed runs."""
    places = dict.fromkeys((run.model, run.task) for run in runs)
    return [efficiency_table([run for run in runs if (run.model, run.task) == place]) for place in places]


def efficiency_table(runs: list[Efficiency]) -> Table:
    """Speed-ups are against the full cache's run; answers differ in length, so both are shown."""
    full = next((run for run in runs if run.method == "full"), None)
    rows = []
    for run in runs:
        kinds = run.score.kinds if run.score else {}
        parts = " + ".join(f"{value:.1f}" for value in kinds.values())
        length = full and full.mean_output + full.input_tokens / full.problems
        rows.append(
            [
                "full" if run is full else f"{run.sparsity:g}",
                f"{run.score.percent:.1f}" if run.score else NOT_RUN,
                "--"
                if run is full or not length
                else f"{speed_bound(run.sparsity, run.window, length):.2f}×",
                str(run.max_running),
                f"{run.seconds:.2f}",
                f"{full.seconds / run.seconds:.2f}×" if full else NOT_RUN,
                f"{run.tokens_per_second:.1f}",
                f"{run.tokens_per_second / full.tokens_per_second:.2f}×" if full else NOT_RUN,
                f"{run.requests_per_second:.3f}",
                f"{run.seconds_per_request:.2f}",
                str(run.output_tokens),
                f"{run.mean_output:.1f}",
                str(run.min_output),
                str(run.hit_limit),
                f"{sum(kinds.values()):.1f} = {parts}" if kinds else NOT_RUN,
            ]
        )
    first = runs[0]
    return Table(
        title=f"SGLang, {task_title(first.task)}, {first.model}",
        columns=[
            *(
                "sp",
                "acc",
                "bound",
                "max running",
                "time s",
                "speedup",
                "gen tok/s",
                "tok/s speedup",
                "req/s",
            ),
            *(
                "s/req",
                "out tokens total",
                "mean out",
                "min",
                "hit max",
                "error % = wrong + cut off + repeat",
            ),
        ],
        rows=rows,
        notes=[
            f"{first.problems} prompts at once, {first.input_tokens} input tokens, sink + recent = "
            f"{first.window} tokens. Bound: 1/((1 − s) + s·W/L) at the full cache's mean length L."
        ],
        rules=[1],
        label=f"efficiency-{first.model.lower()}",
    )


def bytes_tables(scores: Scores) -> list[Table]:
    """What our own runs held: true KV bytes of a request at its end, beside accuracy and answer length."""
    tables = []
    for model in scores.models:
        rows: list[list[str]] = []
        rules = []
        for task in scores.tasks:
            part = [
                score for score in scores if (score.model, score.task) == (model, task) and score.kv_bytes
            ]
            rules.append(len(rows))
            for score in part:
                share = f"{100 * score.kv_share:.1f}" if score.kv_share is not None else NOT_RUN
                mebibytes = (score.kv_bytes or 0) / 2**20
                size = f"{mebibytes:.1f}" if mebibytes >= 10 else f"{mebibytes:.3f}"
                row = [task_title(task), method_title(score.method), f"{score.sparsity:g}"]
                rows.append([*row, f"{score.percent:.1f}", f"{score.tokens:.0f}", size, share])
        if rows:
            tables.append(
                Table(
                    title=f"KV held, {model}",
                    columns=[
                        "task",
                        "method",
                        "sp",
                        "acc",
                        "mean new tokens",
                        "KV MiB a request",
                        "% of full",
                    ],
                    rows=rows,
                    notes=["Bytes of keys and values at the end of a request, windows included; mean."],
                    left=2,
                    rules=rules,
                    label=f"kv-{model.lower()}",
                )
            )
    return tables
