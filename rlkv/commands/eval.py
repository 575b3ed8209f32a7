"""``rlkv eval``: accuracy and KV bytes of masks against the full cache."""

from __future__ import annotations

from rlkv.evaluate import EvalConfig as Config

POSITIONAL = ""


def run(config: Config) -> None:
    """Evaluate, print the table, draw the picture."""
    from rlkv.evaluate import evaluate
    from rlkv.plots import draw_folder
    from rlkv.report import show

    show(evaluate(config))
    draw_folder(config.output)
    print(f"written to {config.output}: table.md, results.json, rows.jsonl, accuracy_kv.png")
