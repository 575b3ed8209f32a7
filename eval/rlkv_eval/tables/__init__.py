"""``rlkv-eval tables``: the paper's tables as Markdown and LaTeX, from our results and published files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlkv.files import write_atomically
from rlkv_eval.scores import Scores
from rlkv_eval.sources import Sources, load_sources
from rlkv_eval.tables.drop import PAIRS
from rlkv_eval.tables.render import Table, latex, markdown

POSITIONAL = "results"


@dataclass
class Config:
    """What ``rlkv-eval tables`` takes."""

    results: list[str] = field(default_factory=list)  # output folders of `rlkv-eval run`, one for each model
    published: str = ""  # folder with the authors' result files
    gates: str = ""  # folder with head scores: <method>/<model>.tsv or <method>/gates.tsv
    output: str = "tables"  # folder for the tables
    margin: float = 2.0  # points below the full cache that still count as near-lossless
    intervals: bool = False  # 95 % intervals in the published tables too (ours always have them)
    sparsities: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.5, 0.6, 0.8])  # of the overlap table
    pairs: dict[str, str] = field(default_factory=lambda: dict(PAIRS))  # reasoning model: its instruct twin


def main(config: Config) -> list[Path]:
    """Write every table that there are numbers for; returns the files."""
    sources = load_sources(config.results, config.published, config.gates)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, heading, tables in documents(sources, config):
        for suffix, render in ((".md", markdown), (".tex", latex)):
            path = output / f"{name}{suffix}"
            write_atomically(path, render(tables, heading))
            written.append(path)
    return written


def documents(sources: Sources, config: Config) -> Iterator[tuple[str, str, list[Table]]]:
    """(file stem, heading, tables) of each document; published ones have a name of their own beside ours."""
    from rlkv_eval.tables.efficiency import bytes_tables, efficiency_tables
    from rlkv_eval.tables.heads import overlap_table
    from rlkv_eval.tables.sweep import frontier_table, sweep_tables

    if sources.own:
        yield from score_documents(sources.own, "", config, intervals=True)
        yield "kv_bytes", "KV bytes held", bytes_tables(sources.own)
    if sources.published:
        yield from score_documents(sources.published.bench, "published_", config, config.intervals)
        if sweep := sources.published.sweep:
            tables = [*sweep_tables(sweep), frontier_table(sweep, config.margin)]
            yield "published_sweep", "Windows (SGLang)", tables
        yield from detail(sources.published.longreason, "published_", config.intervals)
        if runs := sources.published.efficiency:
            yield "published_efficiency", "Efficiency (SGLang)", efficiency_tables(runs)
    if sources.heads:
        yield "head_overlap", "Head overlap", [overlap_table(sources.heads, config.sparsities)]


def score_documents(
    scores: Scores, prefix: str, config: Config, intervals: bool
) -> Iterator[tuple[str, str, list[Table]]]:
    """The documents that come from accuracies."""
    from rlkv_eval.tables.accuracy import contest, main_tables
    from rlkv_eval.tables.drop import drop_table
    from rlkv_eval.tables.near_lossless import near_lossless_table, threshold_table

    if not scores:
        return
    yield f"{prefix}main", "Accuracy against sparsity", main_tables(scores, intervals)
    yield f"{prefix}contest", "Who is best where", list(contest(scores))
    lossless = [near_lossless_table(scores, config.margin)]
    thresholds = threshold_table(scores)
    yield f"{prefix}near_lossless", "Near-lossless", lossless + ([thresholds] if thresholds.rows else [])
    drops = drop_table(scores, config.pairs)
    if drops.rows:
        yield f"{prefix}drop", "Reasoning against instruct", [drops]
    if "longreason" in scores.tasks:
        yield from detail(scores, prefix, intervals)


def detail(scores: Scores, prefix: str, intervals: bool) -> Iterator[tuple[str, str, list[Table]]]:
    """LongReason on its own."""
    from rlkv_eval.tables.longreason import task_tables

    if "longreason" in scores.tasks:
        yield f"{prefix}longreason", "LongReason", task_tables(scores, "longreason", intervals)
