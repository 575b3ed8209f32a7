"""The ``rlkv-eval`` command; words are read as those of ``rlkv`` (rlkv/cli.py).

rlkv-eval run model=pocket gates=gates/pocket tasks=pocket methods=full,rlkv sparsities=0.25,0.5 output=runs/a
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkv import cli
from rlkv_eval.commands import COMMANDS

PROGRAM = cli.Program("rlkv-eval", "rlkv_eval.commands", COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    return cli.main(arguments, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
