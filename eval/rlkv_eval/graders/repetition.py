"""Does a text end in a loop? Decided from the text alone, so that every backend is judged the same way.

Two signs, either is enough:
1. the last 200 characters or more are at least three copies of one block (the last copy may be cut);
2. the last 400 words hold fewer than 40 different ones: the authors' rule (HF evaluator, on tokens), here on
   words, which needs no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

TAIL = 24_000  # characters looked at: three copies of a block of 8,000
MIN_CHARACTERS = 200
MIN_COPIES = 3
WORDS, MIN_DISTINCT = 400, 40


@dataclass(frozen=True)
class Loop:
    """What repeats: ``block`` as text, how often, and how many characters the loop covers."""

    block: str
    copies: float
    covered: int

    def __str__(self) -> str:
        block = " ".join(self.block.split())
        block = block if len(block) <= 60 else block[:57] + "..."
        return f"{self.copies:.1f} times {block!r}" if self.block else f"{self.covered} words, few different"


def find_loop(text: str) -> Loop | None:
    """The loop that ``text`` ends in, or None."""
    tail = text.rstrip()[-TAIL:]
    length, period = periodic_end(tail)
    if length:
        return Loop(tail[len(tail) - length :][:period], length / period, length)
    words = tail.split()[-WORDS:]
    if len(words) == WORDS and len(set(words)) < MIN_DISTINCT:
        return Loop("", 0.0, WORDS)
    return None


def periodic_end(tail: str) -> tuple[int, int]:
    """(length, period) of the longest end of ``tail`` that repeats often enough; (0, 0) without one.

    The failure function of Knuth, Morris and Pratt on the reversed text: its prefix of n characters has the
    smallest period n - border(n).
    """
    backwards = tail[::-1]
    border = [0] * len(backwards)
    found, matched = (0, 0), 0
    for index in range(1, len(backwards)):
        while matched and backwards[index] != backwards[matched]:
            matched = border[matched - 1]
        matched += backwards[index] == backwards[matched]
        border[index] = matched
        length = index + 1
        period = length - matched
        if length >= MIN_CHARACTERS and length >= MIN_COPIES * period:
            found = length, period
    return found
