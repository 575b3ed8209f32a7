"""What tables and figures are drawn from: our own result folders, the authors' files, and head scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlkv.errors import RLKVError
from rlkv_eval.published import Published, load_published
from rlkv_eval.results import Results, load_results
from rlkv_eval.scores import Scores, join, own_scores

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sources:
    """Whatever was named; parts that were not are None or empty."""

    own: Scores
    published: Published | None
    heads: dict[str, dict[str, np.ndarray]] = field(repr=False)


def finished(results: Results) -> Results:
    """Without runs that lack answers: a mean over those that came first would favour short answers."""
    kept = tuple(run for run in results.runs if run.complete)
    for run in results.runs:
        if not run.complete:
            print(
                f"{run.folder}: LEFT OUT, {len(run.rows)} of {run.info['answers']} answers: finish that run"
            )
    if not kept:
        raise RLKVError(f"{results.folder}: no run is finished yet")
    return replace(results, runs=kept)


def load_sources(results: list[str], published: str, gates: str) -> Sources:
    """Read them. RLKVError when nothing is named, or a folder does not hold what it should."""
    if not (results or published or gates):
        raise RLKVError(
            "nothing to draw from: give results=FOLDER (of rlkv-eval run), published=FOLDER (the authors' "
            "files) or gates=FOLDER (head scores, <method>/<model>.tsv)"
        )
    heads = {}
    if gates:
        from rlkv_eval.overlap import load_head_scores

        heads = load_head_scores(gates)
    own = join(own_scores(finished(load_results(folder))) for folder in results)
    return Sources(own, load_published(published) if published else None, heads)
