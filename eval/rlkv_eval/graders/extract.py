"""Where the final answer stands in a completion.

The answer is read after the last ``</think>``. Where that part holds none, or nothing ends a thought (a model
that does not think, or that never closed its thought), the whole text is searched, and the rule says so. In
each part, in this order:

boxed            the last ``\\boxed{...}``; boxes that only commas, "and" or "or" part are one list
unclosed box     the last box, when nothing closes it: up to the end of its line or formula
####             the line that GSM8K's own solutions end in
statement        "the (final) answer is ...", "Answer: ...": the last one
last expression  the last formula or number (never in a thought that was ended)

Boxes and statements that repeat the instruction (``\\boxed{ANSWER}``, a box of the prompt) are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

END_THINK = "</think>"
LONGEST = 4000  # characters of an answer; what is longer is no final answer
BOXES = 200  # looked at, from the end
PLACEHOLDERS = {
    "",
    "answer",
    "youranswer",
    "finalanswer",
    "your_answer",
    "number",
    "...",
    "\\ldots",
    "\\dots",
}
PLACEHOLDERS |= {"?", "\\cdot", "\\cdots", "…", "expression", "value", "result", "youranswerhere"}

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
BARE = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s${}\\]+")
FORMULA_ENDS = re.compile(r"\n|\$|\\\]|\\\)")
SEPARATOR = re.compile(r",?(?:and|or)?|[;&]")
GLUE = re.compile(r"\\text\s*\{([^{}]*)\}")
FILLER = re.compile(r"\\[()\[\],;:! ]|\\q?quad|[$*~\s.]")
HASHES = re.compile(r"^[ \t]*####[ \t]*([-+$€£\d\\.(].*)$", re.MULTILINE)
STATEMENT = re.compile(
    r"\banswers?\b[*_ \t]*(?:to[^.:\n]{0,80}|for[^.:\n]{0,80}|\([^)\n]{0,40}\))?"
    r"[*_ \t]*(?:\bis\b|\bare\b|\bequals\b|[:=：])[*_: \t]*",
    re.IGNORECASE,
)
MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|(?<![\\$])\$(?!\$)([^$\n]{1,400}?)(?<!\\)\$|\\\((.+?)\\\)", re.DOTALL
)
NUMBER = re.compile(
    r"(?<![\w.])[-−–+]?\s?\\?[$€£]?\s?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)
# After a number that is only the beginning of an answer: 5x, 5/7, 3 + 2i, "3, 4", "1:2"; not "5, since ...".
GOES_ON = re.compile(r"\s*(?:[-+*/^=(\\]\s*\S|[,:]\s*(?:[-+−\d.\\($]|[a-z]\b))")
PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")


@dataclass(frozen=True)
class Found:
    """An answer as it stands in the text, and the rule that found it."""

    text: str
    rule: str


@dataclass(frozen=True)
class Box:
    start: int
    end: int
    content: str
    closed: bool


def final_part(text: str) -> str | None:
    """What follows the last ``</think>``, None where nothing ends a thought."""
    _, mark, rest = text.rpartition(END_THINK)
    return rest if mark else None


def find_answer(text: str, prompt: str = "") -> Found | None:
    """The final answer of a completion, or None; ``prompt`` tells which boxes are only repeated."""
    echoes = PLACEHOLDERS | {squeeze(box.content) for box in boxes_from_end(prompt)}
    final = final_part(text)
    if final is not None:
        found = _search(final, echoes) or _last_expression(final)
        if found is not None:
            return found
        whole = _search(text[: len(text) - len(final)], echoes)
    else:
        whole = _search(text, echoes) or _last_expression(text)
    return whole and Found(whole.text, f"whole text: {whole.rule}")


def _search(text: str, echoes: set[str]) -> Found | None:
    return _boxed(text, echoes) or _hashes(text) or _statement(text, echoes)


def boxes_from_end(text: str) -> Iterator[Box]:
    """Boxes, the last one first, inner ones before those around them; at most BOXES."""
    starts = [(match.start(), match.end()) for match in BOX.finditer(text)]
    for start, begin in reversed(starts[-BOXES:]):
        if text[begin : begin + 1] == "{":
            end = closing_brace(text, begin)
            if end is not None:
                yield Box(start, end + 1, text[begin + 1 : end].strip(), True)
                continue
            rest = text[begin + 1 : begin + 1 + LONGEST]
            cut = FORMULA_ENDS.search(rest)
            content = rest[: cut.start()] if cut else rest
            yield Box(start, begin + 1 + len(content), _balanced(content.strip()), False)
        elif bare := BARE.match(text, begin):  # \boxed 5
            yield Box(start, bare.end(), bare.group().rstrip(".,;:"), True)


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at ``opening``; None if there is none within LONGEST."""
    depth, index, limit = 0, opening, min(len(text), opening + LONGEST)
    while index < limit:
        if text[index] == "\\":
            index += 1  # the next character is escaped
        elif text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return None


def squeeze(text: str) -> str:
    """For telling placeholders: lower case, without spaces, dollars and \\text."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b|[\s${}]", "", text).lower()


def _balanced(text: str) -> str:
    missing = len(re.findall(r"(?<!\\)\{", text)) - len(re.findall(r"(?<!\\)\}", text))
    return text + "}" * max(missing, 0)


def _boxed(text: str, echoes: set[str]) -> Found | None:
    chain: list[Box] = []
    for box in boxes_from_end(text):
        if chain and box.end > chain[-1].start:
            continue  # around one that was taken
        if chain and not (box.closed and _only_separates(text[box.end : chain[-1].start])):
            break
        if squeeze(box.content) in echoes:
            if chain:
                break
            continue
        chain.append(box)
    if not chain:
        return None
    contents = list(dict.fromkeys(box.content for box in reversed(chain)))
    rule = "boxed" if chain[0].closed else "unclosed box"
    return Found(", ".join(contents), rule)


def _only_separates(gap: str) -> bool:
    return len(gap) < 60 and bool(SEPARATOR.fullmatch(FILLER.sub("", GLUE.sub(r"\1", gap)).lower()))


def _hashes(text: str) -> Found | None:
    lines = HASHES.findall(text)
    return Found(lines[-1].strip(), "####") if lines else None


def _statement(text: str, echoes: set[str]) -> Found | None:
    for match in reversed(list(STATEMENT.finditer(text))):
        rest = text[match.end() : match.end() + LONGEST].lstrip()
        answer = _first_answer(rest)
        if answer and squeeze(answer) not in echoes and not BOX.search(answer):  # a box that was passed over
            return Found(answer, "statement")
    return None


def _first_answer(rest: str) -> str:
    """What a statement says: its first formula, number or phrase, up to the end of the sentence."""
    if opening := re.match(r"(?:\\\[|\$\$)\s*", rest):  # a displayed formula may go over several lines
        match = MATH.match(rest, 0)
        return next(group for group in match.groups() if group).strip() if match else rest[opening.end() :]
    line = re.split(r"\n|\.(?:\s|$)|;\s| I hope", rest, maxsplit=1)[0].strip().strip("*_`\"' ")
    formulas = [match for match in MATH.finditer(line) if not _is_prose(match)]
    if formulas:
        return next(group for group in formulas[0].groups() if group).strip()
    if (number := NUMBER.match(line)) and not GOES_ON.match(line[number.end() :]):
        return number.group().strip()
    return line.strip().rstrip(".,;:!")


def _last_expression(text: str) -> Found | None:
    """``text`` holds no box but those that were passed over."""
    formulas = [m for m in MATH.finditer(text) if not (_is_prose(m) or BOX.search(m.group()))]
    numbers = list(NUMBER.finditer(text))
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return Found(next(group for group in formulas[-1].groups() if group).strip(), "last expression")
    return Found(numbers[-1].group().strip(), "last expression") if numbers else None


def _is_prose(match: re.Match[str]) -> bool:
    """Between two dollar signs that are currency, not mathematics."""
    return match.group(3) is not None and bool(PROSE.search(match.group(3)))
