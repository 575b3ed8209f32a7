"""Multiple choice: the letter of the final answer.

Read after the last ``</think>``, else in the whole text (the rule says so). In each part, in this order:

answer line   "Answer: C", "the correct option is (C)", ``\\boxed{C}``: the last of them that is no quotation
letter line   the last line, if it is a letter or "C) its text" and no list of options ends there
option text   the last line, if it is word for word one of the options (``item.extra["options"]``)

A quoted instruction ("'Answer: $LETTER' ... one of ABCD") names no single letter, so it never counts; two
letters at once ("A or B") count as one answer, which is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from rlkv_eval.graders.base import Verdict, no_answer, right, wrong
from rlkv_eval.graders.extract import Found, boxes_from_end, final_part
from rlkv_eval.tasks.base import Item

MARKUP = re.compile(r"\*\*|__|[`$]|\\(?:text|textbf|mathrm|mathbf|mathsf|rm|bf)\b|\\[()\[\]]")
SAYS = re.compile(
    r"\b(?:answers?|option|choice)\b(?:\s+(?:to|for)\b[^.:\n]{0,60})?"
    r"\s*(?:\bis\b|\bare\b|\bwould be\b|\bmust be\b|\bshould be\b|[:=：]|\s-)(?:\s*:)?"
    r"\s*(?:(?:therefore|thus|hence|clearly|indeed|then|simply|likely|most likely),?\s)?\s*(?:\\boxed)?"
    r"(?P<open>[(\[{<\s]*(?:(?:option|choice|letter)\b\s*:?[(\[{<\s]*)?)"
    r"(?P<letter>[A-Za-z])(?![A-Za-z0-9]|['’][a-z])(?=(?P<rest>[^\n]{0,40}))",
    re.IGNORECASE,
)
IS_CHOICE = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?(?P<letter>[A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b(?P<rest>)"
)
ANOTHER = re.compile(
    r"[)\]}.\s]*(?:,|/|\||\bor\b|\band\b|&)\s*(?:(?:option|choice)\s+)?[(\[{]*[A-Z](?![A-Za-z])"
)
OPTION_LINE = re.compile(r"[-*\s]*\(?([A-Z])(?:[).:\]]|\s-)\s*(.*)")
ONLY_LETTER = re.compile(r"(?:option |choice )?[(\[{]?([A-Z])[)\]}]?[.!]?", re.IGNORECASE)
OPTIONS = "ABCDEFGHIJ"  # the most that a benchmark has
QUOTES = "'\"‘’“”"


def grade_choice(item: Item, text: str, finished: bool) -> Verdict:
    """``item.answer`` is the letter; ``item.extra["options"]``, where known, the options' texts."""
    options = [str(option) for option in item.extra.get("options", ())]
    found = find_letter(text, options)
    if found is None:
        return no_answer("no letter is named as the answer")
    gold = item.answer.strip().upper()
    if found.text == gold:
        return right(found.text, found.rule, f"the letter is {gold}")
    return wrong(found.text, found.rule, f"the letter is {gold}")


def preflight_choice() -> None:
    """Nothing is needed."""


def find_letter(text: str, options: Sequence[str] = ()) -> Found | None:
    """The letter that a completion ends in, two or more as "A or B", or None."""
    final = final_part(text)
    if final is not None:
        found = _search(final, options)
        if found is not None:
            return found
        whole = _answer_line(text[: len(text) - len(final)], options)
    else:
        whole = _search(text, options)
    return whole and Found(whole.text, f"whole text: {whole.rule}")


def _search(text: str, options: Sequence[str]) -> Found | None:
    return _answer_line(text, options) or _last_line(text, options)


def _answer_line(text: str, options: Sequence[str]) -> Found | None:
    plain = MARKUP.sub("", text)
    best: tuple[bool, int, str] | None = None
    for match in [*SAYS.finditer(plain), *IS_CHOICE.finditer(plain)]:
        if (letter := _meant(match)) is not None:
            quoted = plain[: match.start()].rstrip(" ")[-1:] in tuple(QUOTES)
            if quoted and letter not in (string.ascii_uppercase[: len(options)] or OPTIONS):
                continue  # "'Answer: X' where X is ..."
            best = max(best or (False, -1, ""), (not quoted, match.end("letter"), letter))
    for box in boxes_from_end(plain):
        content = re.sub(r"[{}]", "", box.content).strip()
        inside = OPTION_LINE.fullmatch(content) or ONLY_LETTER.fullmatch(content)
        if inside:
            best = max(best or (False, -1, ""), (True, box.end, inside.group(1).upper()))
            break
    if best is not None:
        return Found(best[2], "answer line")
    return _says_text(plain, options)


def _meant(match: re.Match[str]) -> str | None:
    """The letter of a statement, or None where the letter is a word: an article, a pronoun, a variable."""
    letter, rest = match["letter"], match["rest"]
    if another := ANOTHER.match(rest):
        return f"{letter.upper()} or {another.group().strip()[-1]}"
    bracketed = match.re is SAYS and match["open"].strip() != ""
    alone = not rest.strip(" .,;:!)]}*" + QUOTES)
    if letter.islower():  # "answer: b" yes, "the answer is a matter of" no
        return letter.upper() if bracketed or alone else None
    if letter == "I" and not bracketed and re.match(r"\s+(?:think|believe|am|would|will|have|guess)\b", rest):
        return None
    return letter


def _says_text(plain: str, options: Sequence[str]) -> Found | None:
    """ "Answer: <the text of an option>", word for word."""
    for match in reversed(
        list(re.finditer(r"\banswer\b\s*(?:\bis\b|[:：])\s*([^\n]+)", plain, re.IGNORECASE))
    ):
        if (letter := _letter_of(match.group(1), options)) is not None:
            return Found(letter, "option text")
    return None


def _last_line(text: str, options: Sequence[str]) -> Found | None:
    lines = [line for line in (MARKUP.sub("", line).strip() for line in text.splitlines()) if line]
    if not lines:
        return None
    if only := ONLY_LETTER.fullmatch(lines[-1]):
        return Found(only.group(1).upper(), "letter line")
    listed = OPTION_LINE.fullmatch(lines[-1])
    if listed:
        if len(lines) > 1 and OPTION_LINE.fullmatch(lines[-2]):
            return None  # the options, repeated
        told = _letter_of(listed.group(2), options)
        if not options or told == listed.group(1):
            return Found(listed.group(1), "letter line")
    if (letter := _letter_of(lines[-1], options)) is not None:
        return Found(letter, "option text")
    return None


def _letter_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that reads like ``text``."""
    wanted = _fold(text)
    same = [
        letter
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
        if _fold(MARKUP.sub("", option)) == wanted
    ]
    return same[0] if wanted and len(same) == 1 else None


def _fold(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" ." + QUOTES)
