"""How alike two rankings of heads are: Jaccard of the heads kept, Spearman's correlation of the scores."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rlkv.errors import RLKVError
from rlkv_eval.names import method_order

FOLDER_NAMES = {"duo_attn": "duo"}
FINGERPRINT = re.compile(r"-[0-9a-f]{12}$")  # of rlkv_eval.methods.scores
TIE_SEEDS = range(32)


def load_head_scores(folder: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Model -> method -> scores [layers, kv_heads] in [0, 1], from any of these below ``folder``:

        <method>/<model>.tsv                 as published
        <method>/<model>/gates.tsv           gates folders
        <method>[-<fingerprint>]/gates.tsv   gates folders that name their model, such as a run's head scores

    RLKVError: nothing found, two sets of scores for one method, or shapes that differ.
    """
    from rlkv.gates import HeadGates  # here, because it needs torch

    folder = Path(folder)
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted([*folder.glob("*/*.tsv"), *folder.glob("*/*/gates.tsv")]):
        gates = HeadGates.load(path)
        steps = path.relative_to(folder).parts
        if len(steps) == 2 and path.name == "gates.tsv":
            model = Path(gates.model.name).name if gates.model and gates.model.name else "model"
        else:
            model = path.stem if len(steps) == 2 else steps[1]
        method = FINGERPRINT.sub("", steps[0])
        method = FOLDER_NAMES.get(method, method)
        methods = found.setdefault(model, {})
        if method in methods:
            raise RLKVError(f"{folder}: two sets of head scores for {method} on {model}; leave one of them")
        methods[method] = gates.values.double().numpy()
    if not found:
        raise RLKVError(
            f"{folder} holds no head scores: expected <method>/<model>.tsv, or <method>/gates.tsv"
        )
    for model, methods in found.items():
        shapes = {scores.shape for scores in methods.values()}
        if len(shapes) > 1:
            raise RLKVError(f"{folder}: head scores of {model} have different shapes: {sorted(shapes)}")
        found[model] = dict(sorted(methods.items(), key=lambda item: -method_order(item[0])))
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rho (1904): Pearson's correlation of ranks, tied values sharing their mean rank.

    Not a number when either is constant.
    """
    ranks = [mean_ranks(values.ravel()) for values in (first, second)]
    ranks = [rank - rank.mean() for rank in ranks]
    spread = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / spread) if spread else float("nan")


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of the ranks they cover."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def keep(scores: np.ndarray, sparsity: float, seed: int) -> np.ndarray:
    """Bool like ``scores``: the round((1 - s) * heads) highest, ties in an order drawn from ``seed``."""
    flat = scores.ravel()
    shuffle = np.random.default_rng(seed).permutation(flat.size)
    order = shuffle[np.argsort(-flat[shuffle], kind="stable")]
    kept = np.zeros(flat.size, dtype=bool)
    kept[order[: round((1 - sparsity) * flat.size)]] = True
    return kept.reshape(scores.shape)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Heads that both keep over heads that either keeps; 1 when neither keeps any."""
    either = (first | second).sum()
    return float((first & second).sum() / either) if either else 1.0


def expected_jaccard(first: np.ndarray, second: np.ndarray, sparsity: float) -> float:
    """Jaccard of the heads that two rankings keep, averaged over orders of tied heads."""
    pairs = [(keep(first, sparsity, seed), keep(second, sparsity, seed + 1000)) for seed in TIE_SEEDS]
    return float(np.mean([jaccard(*pair) for pair in pairs]))


def random_jaccard(sparsity: float) -> float:
    """What two unrelated rankings of many heads give: k / (2 - k) with k = 1 - s."""
    return (1 - sparsity) / (1 + sparsity)
