"""Graders, one a file, behind ``base.grade`` and ``base.preflight``."""

from __future__ import annotations

from rlkv_eval.graders.base import KINDS, Verdict, grade, preflight

__all__ = ["KINDS", "Verdict", "grade", "preflight"]
