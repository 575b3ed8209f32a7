"""``rlkv version``."""

from __future__ import annotations

from dataclasses import dataclass

import rlkv

POSITIONAL = ""


@dataclass
class Config:
    """No settings."""


def run(config: Config) -> None:
    """Print the version."""
    print(f"rlkv {rlkv.__version__}")
