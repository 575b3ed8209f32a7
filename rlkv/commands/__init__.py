"""The ``rlkv`` commands, one module each.

A module has ``Config`` (a dataclass: its settings), ``POSITIONAL`` (the setting that a bare word sets, or
"") and ``run(config)``. It is imported only when its command is called, so that ``rlkv --help`` is instant.
"""

COMMANDS = {
    "train": "train gates by reinforcement learning",
    "rank": "choose the full heads: by sparsity, memory budget or accuracy loss",
    "eval": "accuracy and KV bytes of full cache, RLKV, random and ablation masks",
    "generate": "write one answer with the head-wise cache, and measure the cache",
    "serve": "start an OpenAI server (SGLang) with a head mask",
    "plot": "draw the pictures of a run folder again",
    "collect": "sample training prompts that the model solves itself",
    "doctor": "say what this machine can run, and what to install for the rest",
    "version": "print the version",
}
