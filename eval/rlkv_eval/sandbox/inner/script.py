"""Run source text as a script."""

from __future__ import annotations


def main(source: str) -> None:
    exec(compile(source, "<script>", "exec"), {"__name__": "__main__"})
