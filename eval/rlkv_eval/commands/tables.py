"""``rlkv-eval tables``: the paper's tables from results."""

from __future__ import annotations

from rlkv_eval.tables import POSITIONAL, Config, main

__all__ = ["POSITIONAL", "Config", "run"]


def run(config: Config) -> None:
    """Write the tables."""
    for path in main(config):
        print(path)
