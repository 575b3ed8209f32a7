"""``rlkv-eval merge``: join the shards of a run."""

from __future__ import annotations

from dataclasses import dataclass

POSITIONAL = "output"


@dataclass
class Config:
    """What ``rlkv-eval merge`` takes."""

    output: str = "runs/benchmark"  # the folder that holds shard-0-of-n, shard-1-of-n, ...


def run(config: Config) -> None:
    """Merge, and print the table."""
    from rlkv_eval.merge import merge
    from rlkv_eval.summary import finish

    finish(merge(config.output))
