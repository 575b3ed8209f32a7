"""How tasks and methods are called in tables and figures, and in which order they stand."""

from __future__ import annotations

# The paper's order: the four reasoning tasks first.
TASKS: dict[str, str] = {
    "gsm8k": "GSM8K",
    "math500": "MATH-500",
    "aime24": "AIME24",
    "aime25": "AIME25",
    "amc23": "AMC23",
    "mbpp": "MBPP",
    "mmlu_pro": "MMLU-Pro",
    "mmlu_pro_chemistry": "MMLU-Pro Chem",
    "mmlu_pro_computer_science": "MMLU-Pro CS",
    "mmlu_pro_law": "MMLU-Pro Law",
    "mmlu_pro_physics": "MMLU-Pro Phys",
    "longreason": "LongReason",
    "pocket": "Pocket reasoning",
    "pocket_resolve": "Pocket resolve",
    "pocket_search": "Pocket search",
    "pocket_ledger": "Pocket ledger",
    "pocket_recall": "Pocket recall",
}
REASONING = ("gsm8k", "math500", "aime24", "mbpp")

# Token-dropping methods first, then those that give heads a window, RLKV last: the paper's order.
METHODS: dict[str, str] = {
    "full": "Full",
    "h2o": "H2O",
    "rkv": "R-KV",
    "streaming": "StreamingLLM",
    "random_eviction": "Random eviction",
    "random": "Random heads",
    "duo": "DuoAttention",
    "kvzip": "KVzip",
    "ablation": "Ablation",
    "rlkv": "RLKV",
}
# Need no training at all; DuoAttention and RLKV train gates.
TRAINING_FREE = ("h2o", "rkv", "streaming", "random_eviction", "random", "kvzip", "ablation")

KINDS: dict[str, str] = {
    "wrong": "wrong",
    "truncated": "cut off",
    "repetition": "repetition",
    "no_answer": "no answer",
    "grader_error": "grader error",
}


def task_title(task: str) -> str:
    """A task's column head; unknown names as they are."""
    return TASKS.get(task, task)


def method_title(method: str, variant: str = "") -> str:
    """A method's row head, its variant in brackets."""
    title = METHODS.get(method, method)
    return f"{title} ({variant})" if variant else title


def method_order(method: str) -> int:
    """Place of a method's row; unknown ones stand before RLKV."""
    order = list(METHODS)
    return order.index(method) if method in order else len(order) - 2
