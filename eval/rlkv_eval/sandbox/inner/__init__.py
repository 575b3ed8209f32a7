"""What runs inside the sandboxed process. It imports the standard library alone: no site-packages there."""

from __future__ import annotations
