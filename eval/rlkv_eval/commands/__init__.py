"""The ``rlkv-eval`` commands, one module each, as those of ``rlkv`` (rlkv/commands)."""

COMMANDS = {
    "run": "answer and grade: tasks x methods x sparsities, resumable, in shards, here or at a server",
    "merge": "join the shards of a run",
    "tables": "the paper's tables from results, as Markdown and LaTeX",
    "figures": "the paper's figures from results, as PNG and PDF",
    "train-duo": "train DuoAttention's gates, the baseline's own way",
    "version": "print the version",
}
