"""``rlkv-eval version``."""

from __future__ import annotations

from dataclasses import dataclass

import rlkv_eval

POSITIONAL = ""


@dataclass
class Config:
    """No settings."""


def run(config: Config) -> None:
    """Print the version."""
    print(f"rlkv-eval {rlkv_eval.__version__}")
