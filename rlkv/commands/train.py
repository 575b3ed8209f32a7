"""``rlkv train``: gates by reinforcement learning, with their pictures."""

from __future__ import annotations

from rlkv.settings import TrainConfig as Config

POSITIONAL = ""


def run(config: Config) -> None:
    """Train, draw, and say what came out."""
    from rlkv.plots import draw_folder
    from rlkv.trainer import train

    gates = train(config)
    pictures = ", ".join(path.name for path in draw_folder(config.output))
    found = gates.stats()
    print(
        f"gates in {config.output}: mean {found['mean']:.3f}, {found['below_0.1']:.0%} below 0.1, "
        f"{found['above_0.9']:.0%} above 0.9; pictures: {pictures}"
    )
