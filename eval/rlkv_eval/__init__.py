"""Evaluation of KV-cache compression for reasoning: tasks, graders, methods, runner, tables, figures."""

from __future__ import annotations

__version__ = "0.1.0"
