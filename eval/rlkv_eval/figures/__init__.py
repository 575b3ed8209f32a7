"""``rlkv-eval figures``: the paper's figures as PNG and PDF, from our results and the published files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlkv_eval.names import REASONING
from rlkv_eval.scores import Scores
from rlkv_eval.sources import Sources, load_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIONAL = "results"


@dataclass
class Config:
    """What ``rlkv-eval figures`` takes."""

    results: list[str] = field(default_factory=list)  # output folders of `rlkv-eval run`, one for each model
    published: str = ""  # folder with the authors' result files
    gates: str = ""  # folder with head scores: <method>/<model>.tsv or <method>/gates.tsv
    output: str = "figures"  # folder for the pictures
    sparsity: float = 0.5  # at which the heat maps show the heads kept


def main(config: Config) -> list[Path]:
    """Draw everything that there are numbers for; returns the files."""
    sources = load_sources(config.results, config.published, config.gates)
    from rlkv_eval.figures.style import STYLE, plt, save

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, figure in pictures(sources, config.sparsity):
            if figure is not None:
                written += save(figure, output / name)
    return written


def pictures(sources: Sources, sparsity: float) -> Iterator[tuple[str, Figure | None]]:
    """(file stem, figure) of each picture; published ones have a name of their own beside ours."""
    from rlkv_eval.figures.accuracy import one_model
    from rlkv_eval.figures.efficiency import speedups
    from rlkv_eval.figures.gates import heat_maps

    yield from score_pictures(sources.own, "")
    for model in sources.own.models:
        part = sources.own.where(model=model)
        if any(score.kv_share is not None for score in part if score.method != "full"):
            yield f"accuracy_kv_{stem(model)}", one_model(part, model, by_bytes=True)
    if found := sources.published:
        yield from score_pictures(found.bench, "published_")
        for model in found.longreason.models:
            yield f"published_longreason_{stem(model)}", one_model(found.longreason, model)
        for model in found.sweep.models:
            yield f"published_sweep_{stem(model)}", one_model(found.sweep, model)
        if found.efficiency:
            runs = Scores(tuple(run.score for run in found.efficiency if run.score), published=True)
            yield from error_pictures(runs, "published_efficiency_")
            yield "published_efficiency", speedups(found.efficiency)
    for model, heads in sources.heads.items():
        yield f"gates_{stem(model)}", heat_maps(heads, model, sparsity)


def score_pictures(scores: Scores, prefix: str) -> Iterator[tuple[str, Figure | None]]:
    """The pictures that come from accuracies."""
    from rlkv_eval.figures.accuracy import models_by_tasks, one_model
    from rlkv_eval.figures.training_free import against_best

    if not scores:
        return
    tasks = [task for task in REASONING if task in scores.tasks] or scores.tasks[:4]
    if len(scores.models) > 1:
        yield f"{prefix}accuracy", models_by_tasks(scores, tasks)
    for model in scores.models:
        yield f"{prefix}accuracy_{stem(model)}", one_model(scores.where(model=model), model)
    yield from error_pictures(scores, prefix)
    yield f"{prefix}training_free", against_best(scores)


def error_pictures(scores: Scores, prefix: str) -> Iterator[tuple[str, Figure | None]]:
    """Error classes, where they are known."""
    from rlkv_eval.figures.errors import error_bars

    for model in scores.models:
        yield f"{prefix}errors_{stem(model)}", error_bars(scores, model)


def stem(model: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", model)
