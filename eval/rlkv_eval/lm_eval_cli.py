"""``rlkv-lm-eval``: lm_eval's own command line, with the model ``rlkv`` (lm_eval_adapter.py)."""

from __future__ import annotations

import sys

from rlkv.errors import RLKVError


def main() -> int:
    """Run it; returns the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from rlkv_eval import lm_eval_adapter  # noqa: F401 (registers the model)
    except ModuleNotFoundError as error:
        name, advice = (error.name or "").partition(".")[0], 'pip install "lm_eval[hf]>=0.4.13"'
        print(f"rlkv-lm-eval: the package {name} is missing: {advice}", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except RLKVError as error:
        print(f"rlkv-lm-eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
