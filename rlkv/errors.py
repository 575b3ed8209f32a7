"""The one exception for mistakes a user can mend: its text says what is wrong, where, and what to do."""

from __future__ import annotations


class RLKVError(ValueError):
    """Raised for bad input; the command line prints its message without a traceback."""
