"""A table as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

NOT_PUBLISHED, NOT_RUN = "n/p", "–"


@dataclass(frozen=True)
class Cell:
    """Text; ``small`` follows it, smaller (an interval, say); the ``best`` of its group is bold."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """``rows`` hold cells or plain text, one for each column; ``rules`` are the rows with a rule above them.

    The first ``left`` columns are set to the left, the others to the right. ``label`` is the LaTeX label.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = ()
    left: int = 1
    rules: Sequence[int] = field(default_factory=tuple)
    label: str = ""

    def cells(self) -> list[list[Cell]]:
        """All rows as cells; raises ValueError for a row of another width."""
        grid = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]
        if any(len(row) != len(self.columns) for row in grid):
            raise ValueError(f"table {self.title!r}: every row needs {len(self.columns)} cells")
        return grid


def missing(published: bool) -> str:
    """The mark of a cell that has no result: none was published, or none was run."""
    return NOT_PUBLISHED if published else NOT_RUN


def mark_best(column: Sequence[float | None]) -> list[bool]:
    """Which values are the highest; all of them where they tie, none where there is only one."""
    known = [value for value in column if value is not None]
    return [value is not None and len(known) > 1 and value == max(known) for value in column]


def markdown(tables: Sequence[Table], heading: str) -> str:
    """One document of all ``tables``, each under its title."""
    return "\n\n".join([f"# {heading}", *map(markdown_table, tables)]) + "\n"


def markdown_table(table: Table) -> str:
    """Title, a GitHub table, notes."""
    body = [[markdown_cell(cell) for cell in row] for row in table.cells()]
    head = [escape_pipes(column) for column in table.columns]
    widths = [max(3, *map(len, column)) for column in zip(head, *body, strict=True)]
    dashes = ["-" * (width if index < table.left else width - 1) for index, width in enumerate(widths)]
    dashes = [mark if index < table.left else mark + ":" for index, mark in enumerate(dashes)]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if index < table.left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    parts = [f"## {table.title}", "\n".join([line(head), line(dashes), *map(line, body)])]
    return "\n\n".join([*parts, *table.notes])


def markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return escape_pipes(f"{text} {cell.small}" if cell.small else text)


def escape_pipes(text: str) -> str:
    return text.replace("|", "\\|")


def latex(tables: Sequence[Table], heading: str) -> str:
    """A file to \\input: one table environment for each table; needs the package booktabs."""
    return "\n\n".join([f"% {heading}. Needs \\usepackage{{booktabs}}.", *map(latex_table, tables)]) + "\n"


def latex_table(table: Table) -> str:
    """A table environment, as wide as the page where it has many columns."""
    environment = "table*" if len(table.columns) > 6 else "table"
    alignment = "l" * table.left + "r" * (len(table.columns) - table.left)
    body: list[str] = []
    for index, row in enumerate(table.cells()):
        if index in table.rules and index:
            body.append(r"\midrule")
        body.append(" & ".join(map(latex_cell, row)) + r" \\")
    lines = [
        rf"\begin{{{environment}}}[t]",
        r"\centering",
        r"\small",
        rf"\caption{{{escape(' '.join([table.title + '.', *table.notes]))}}}",
        *([rf"\label{{tab:{table.label}}}"] if table.label else []),
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(map(escape, table.columns)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines)


def latex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{escape(cell.text)}}}" if cell.best else escape(cell.text)
    return rf"{text} {{\scriptsize {escape(cell.small)}}}" if cell.small else text


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "→": r"$\to$",
    "ρ": r"$\rho$",
    "·": r"$\cdot$",
    "<": r"$<$",
    ">": r"$>$",
}


NEGATIVE = re.compile(r"(?<![\w-])-(?=\d)")


def escape(text: str) -> str:
    """Plain text as LaTeX; a hyphen before a number is a minus sign."""
    text = NEGATIVE.sub("−", text)
    return "".join(LATEX.get(character, character) for character in text)
