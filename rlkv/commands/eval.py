"""``rlkv eval``: accuracy and KV bytes of masks against the full cache."""

from __future__ import annotations

from pathlib import Path

from rlkv.evaluate import EvalConfig as Config

POSITIONAL = ""


def run(config: Config) -> None:
    """Evaluate, print the table, draw the picture."""
    from rlkv.evaluate import evaluate
    from rlkv.plots import draw_folder
    from rlkv.report import show

    try:
        show(evaluate(config))
    except KeyboardInterrupt:
        if Path(config.output).is_dir():
            print(f"what is answered so far is in {config.output}: the same command goes on")
        raise
    draw_folder(config.output)
    print(f"written to {config.output}: table.md, results.json, rows.jsonl, accuracy_kv.png")
