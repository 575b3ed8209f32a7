"""``rlkv-eval figures``: the paper's figures from results."""

from __future__ import annotations

from rlkv_eval.figures import POSITIONAL, Config, main

__all__ = ["POSITIONAL", "Config", "run"]


def run(config: Config) -> None:
    """Write the figures."""
    for path in main(config):
        print(path)
