"""The head-overlap table: do two methods pick the same heads?"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from rlkv_eval.names import method_title
from rlkv_eval.overlap import expected_jaccard, random_jaccard, spearman
from rlkv_eval.tables.render import Table


def overlap_table(heads: dict[str, dict[str, np.ndarray]], sparsities: list[float]) -> Table:
    """A row for each pair of methods of each model; the last row is what unrelated rankings give."""
    rows: list[list[str]] = []
    rules = []
    for model, methods in heads.items():
        rules.append(len(rows))
        for first, second in combinations(methods, 2):
            pair = methods[first], methods[second]
            overlaps = [f"{expected_jaccard(*pair, sparsity):.3f}" for sparsity in sparsities]
            names = f"{method_title(first)} / {method_title(second)}"
            rows.append([model, names, f"{spearman(*pair):.3f}", *overlaps])
    rules.append(len(rows))
    rows.append(["", "unrelated rankings", "0.000", *(f"{random_jaccard(s):.3f}" for s in sparsities)])
    return Table(
        title="Overlap of the heads that methods keep",
        columns=[
            "model",
            "methods",
            "Spearman ρ",
            *(f"Jaccard, s = {sparsity:g}" for sparsity in sparsities),
        ],
        rows=rows,
        notes=[
            "Spearman: rank correlation of head scores. Jaccard: heads kept full by both over heads kept by "
            "either, mean over orders of tied heads."
        ],
        left=2,
        rules=rules,
        label="overlap",
    )
