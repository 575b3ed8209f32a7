"""``rlkv-eval run``: answer and grade tasks with every method at every sparsity."""

from __future__ import annotations

from rlkv_eval.config import RunConfig as Config

POSITIONAL = ""


def run(config: Config) -> None:
    """Run what is missing, and print the table."""
    from rlkv_eval.runner import run as run_plan
    from rlkv_eval.summary import finish

    finish(run_plan(config))
    if config.shard:
        print(f"when all {config.shard.count} shards are done: rlkv-eval merge {config.output}")
