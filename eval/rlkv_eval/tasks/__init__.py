"""Benchmarks, one a file, behind the registry of ``base``."""

from __future__ import annotations

from rlkv_eval.tasks.base import Item, Task, get_task, task_names

__all__ = ["Item", "Task", "get_task", "task_names"]
