"""Is an answer equal to the gold answer? Runs in the worker process (see ``worker``): sympy may never return.

math-verify decides. Before it come kinds of answers that it reads too kindly: units (it takes the variable of
``2t`` for one), plain numbers (it rounds to six decimals, so that all small ones agree), numbers with a base
(it drops the subscript), clock times and ratios, words (it multiplies their letters, so that anagrams agree),
and ordered tuples answered as a bare list (it forgets their order). After it, where it cannot read one of the
sides, comes latex2sympy2 if that is installed.
"""

from __future__ import annotations

import importlib
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rlkv_eval.graders.latex import clean, plain_words, without_units

PLAIN = re.compile(r"[-+]?\s?(?:\d{1,3}(?:,\s?\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)")
BASE = re.compile(r"(-?)(?:\\text\s*\{)?([0-9A-Za-z]+)\}?_\{(\d+|[a-z]+)\}")
DIGITS = re.compile(r"(-?)(?:\\text\s*\{)?([0-9A-Za-z]+)\}?")
CLOCK = re.compile(
    r"(\d+)\s*:\s*(\d+)(?:\s*:\s*(\d+))?(?:\s*(?:\\text\s*\{)?\s*([ap])\.?\s?m\.?\s*\}?)?", re.I
)
APPROXIMATELY = re.compile(r"(?<=\S)\s*\\approx\b\s*")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
OPTION = re.compile(r"\(?([A-Z])\)?")
BASE_WORDS = {"two": "2", "five": "5", "six": "6", "seven": "7", "eight": "8", "ten": "10"}


def compare(gold: str, answer: str) -> tuple[bool, str]:
    """(equal, who said so). Any exception of sympy passes through."""
    gold, answer = clean(gold), clean(answer)
    exact, *rounded = APPROXIMATELY.split(gold)
    answer = APPROXIMATELY.split(answer)[0]  # 22/7 \\approx 3.14: what comes first is meant
    for meant in rounded:
        equal, who = _compare(meant, answer)
        if equal:
            return equal, who
    return _compare(exact, answer)


def _compare(gold: str, answer: str) -> tuple[bool, str]:
    if _same(gold, answer):
        return True, "same text"
    words = _words(gold, answer)
    if words is not None:
        return words, "words"
    gold = without_units(gold, words=False)
    answer = without_units(answer, words=not VARIABLE.search(gold))
    if _same(gold, answer):
        return True, "same text but for the unit"
    for rule, name in ((_numbers, "number"), (_bases, "base"), (_clocks, "clock or ratio")):
        said = rule(gold, answer)
        if said is not None:
            return said, name
    answer = _as_tuple(gold, answer)
    return _math_verify(gold, answer)


def _same(gold: str, answer: str) -> bool:
    return re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer)


def _numbers(gold: str, answer: str) -> bool | None:
    """Two plain decimal numbers are equal as written, or not."""
    values = [text.replace(" ", "").replace(",", "") for text in (gold, answer) if PLAIN.fullmatch(text)]
    return Decimal(values[0]) == Decimal(values[1]) if len(values) == 2 else None


def _bases(gold: str, answer: str) -> bool | None:
    """Digits must agree, and bases where both are written."""
    sides = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if sides == (None, None):
        return None
    digits = sides[0] or DIGITS.fullmatch(gold), sides[1] or DIGITS.fullmatch(answer)
    if not (digits[0] and digits[1]):
        return None
    if sides[0] and sides[1]:
        bases = [BASE_WORDS.get(side.group(3), side.group(3)) for side in sides if side]
        if bases[0] != bases[1]:
            return False
    return digits[0].group(1, 2) == digits[1].group(1, 2)


def _clocks(gold: str, answer: str) -> bool | None:
    """5:00 is 05:00; a.m. and p.m. count where both say it. A ratio against a fraction is left to sympy."""
    sides = CLOCK.fullmatch(gold), CLOCK.fullmatch(answer)
    if not (sides[0] and sides[1]):
        written = sides[0] or sides[1]
        return False if written and written.group(2).startswith("0") else None
    halves = [side.group(4) for side in sides if side]
    numbers = [[int(part) for part in side.group(1, 2, 3) if part] for side in sides if side]
    return numbers[0] == numbers[1] and (None in halves or halves[0].lower() == halves[1].lower())


def _words(gold: str, answer: str) -> bool | None:
    """Gold answers that are text: same words, whatever their case and articles."""
    if not (re.fullmatch(r"\\text\s*\{[^{}]*\}(?:\s*\\text\s*\{[^{}]*\})*", gold) or _is_word(gold)):
        return None
    wanted = plain_words(gold)
    option = OPTION.fullmatch(wanted.upper())
    if option:  # (C), C, "(C) 12", "C: 12"
        letter = option.group(1)
        bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip()
        return bool(re.match(rf"\(?{letter}(?:\)|[.:]|$|\s*$)", bare)) or bare == letter.lower()
    letters = re.findall(r"[a-z]", wanted)
    given = plain_words(answer)
    if re.fullmatch(r"[a-z](?:\s*,\s*[a-z])+", wanted):  # "A, C": a set of options
        return sorted(letters) == sorted(re.findall(r"\b[a-z]\b", re.sub(r"\band\b", ",", given)))
    return re.sub(r"\b(?:the|an|a) ", "", wanted) == re.sub(r"\b(?:the|an|a) ", "", given)


def _is_word(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z]{4,}(?: [A-Za-z]+)*", text))


def _as_tuple(gold: str, answer: str) -> str:
    """``1, 2`` as ``(1, 2)`` where the gold answer is an ordered tuple of as many parts."""
    if gold.startswith("(") and gold.endswith(")") and len(parts(gold[1:-1])) > 1:
        bare = re.sub(r"^\w+\s*=\s*(?=\()", "", answer)
        if not re.match(r"[(\[\\{]|.*=", bare) and len(parts(bare)) == len(parts(gold[1:-1])):
            return f"({bare})"
    return answer


def parts(text: str) -> list[str]:
    """What commas part outside all brackets and braces."""
    depth, pieces = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _math_verify(gold: str, answer: str) -> tuple[bool, str]:
    from math_verify import verify

    sides = _parse(_ratio(gold)), _parse(_ratio(answer))
    decimals = max((len(digits) for digits in re.findall(r"\.(\d+)", gold)), default=0)
    options = {"float_rounding": max(6, decimals), "allow_set_relation_comp": True}
    if verify(*sides, timeout_seconds=None, raise_on_error=True, **options):
        return True, "math-verify"
    unread = [text for text, side in zip((gold, answer), sides, strict=True) if not _read(side)]
    if not unread:
        return False, "math-verify"
    second = _latex2sympy2(gold, answer)
    if second is not None:
        return second, "latex2sympy2 (math-verify could not read it)"
    return False, f"math-verify, which could not read {unread[0][:80]!r}"


def readable(gold: str) -> bool:
    """Whether a rule or math-verify makes something of a gold answer, beyond its text."""
    for part in APPROXIMATELY.split(clean(gold)):
        bare = without_units(part, words=not VARIABLE.search(part))
        rules = (_words, _numbers, _bases, _clocks)
        if all(rule(bare, bare) is None for rule in rules) and not _read(_parse(bare)):
            return False
    return True


def _ratio(text: str) -> str:
    return re.sub(r"^(\d+)\s*:\s*([1-9]\d*)$", r"\\frac{\1}{\2}", text)


@lru_cache(maxsize=4096)
def _parse(latex: str) -> list[Any]:
    """The whole of ``latex`` as one expression (never only its last number)."""
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse

    # Its unit remover takes variables for units ("2t" becomes 2): ours has done that work.
    normalise = LatexNormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
    configuration = [LatexExtractionConfig(normalization_config=normalise)]
    return parse(f"\\boxed{{{latex}}}", configuration, parsing_timeout=None, raise_on_error=True)


def _read(side: list[Any]) -> bool:
    return any(not isinstance(value, str) for value in side)


def second_opinion_works() -> bool:
    """Whether latex2sympy2 imports and reads a fraction (its parser was made by another antlr)."""
    return _latex2sympy2(r"\frac{1}{2}", r"\frac{2}{4}") is True


def _latex2sympy2(gold: str, answer: str) -> bool | None:
    """Its opinion, None where it is not installed or cannot read one of the sides."""
    try:
        latex2sympy = importlib.import_module("latex2sympy2").latex2sympy
    except Exception:  # its own import fails in odd ways under another antlr; preflight has said so
        return None
    try:
        values = latex2sympy(gold), latex2sympy(answer)
        return bool(values[0].equals(values[1]))
    except Exception:
        return None
