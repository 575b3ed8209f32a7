"""``rlkv plot``: the pictures of a run folder."""

from __future__ import annotations

from dataclasses import dataclass

POSITIONAL = "run"


@dataclass
class Config:
    """What ``rlkv plot`` takes."""

    run: str  # folder with gates.tsv, metrics.jsonl or results.json
    output: str = ""  # folder for the pictures (empty: the same)


def run(config: Config) -> None:
    """Draw whatever the folder has the numbers for."""
    from rlkv.plots import draw_folder

    for path in draw_folder(config.run, config.output or None):
        print(path)
