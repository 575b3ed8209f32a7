"""``rlkv doctor``: what this machine can run."""

from __future__ import annotations

from dataclasses import dataclass

POSITIONAL = ""


@dataclass
class Config:
    """No settings."""


def run(config: Config) -> int:
    """Print the report; 1 if the core does not run here."""
    from rlkv.doctor import main

    return main()
