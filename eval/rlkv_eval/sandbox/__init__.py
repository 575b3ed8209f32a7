"""Untrusted Python in a process that can compute, and do nothing else.

    check()                                     # once: RLKVError where it cannot be contained
    outcome = run("print(6 * 7)")               # outcome.kind == "ok", outcome.stdout == "42\\n"

What guards what is said in docs/sandbox.md.
"""

from __future__ import annotations

from rlkv_eval.sandbox.guards import check
from rlkv_eval.sandbox.launch import Job, Limits, Outcome, run, run_together

__all__ = ["Job", "Limits", "Outcome", "check", "run", "run_together"]
