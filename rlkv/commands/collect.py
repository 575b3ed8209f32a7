"""``rlkv collect``: training prompts that the model solves itself."""

from __future__ import annotations

from rlkv.collect import CollectConfig as Config

POSITIONAL = ""


def run(config: Config) -> None:
    """Collect; the counts are printed on the way."""
    from rlkv.collect import collect

    collect(config)
