"""Synthetic retrieval for DuoAttention's gate training: many passkeys in a long text, asked for at its end.

The recipe is that of arXiv 2410.10819 (section 2.3) and its code: ten passkeys of 32 words at random depths,
lengths in equal steps, the loss on questions and answers. The text is generated, so nothing is downloaded; a
file of one's own takes its place. A character-level model such as the pocket reasoner cannot read words, so
it gets its own retrieval task: key=value pairs, one key asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from rlkv.data import chat_tokens
from rlkv.errors import RLKVError

Style = Literal["auto", "passkeys", "pairs"]

_SPELLING = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa "
    "quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
)
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
SPELLING, ORDINALS = _SPELLING.split(), _ORDINALS.split()
WHO = "the miller|an old captain|her sister|the clerk|a stranger|the doctor|our neighbour|the young painter"
DID = "walked past|wrote about|remembered|described|avoided|returned to|looked after|dreamed of"
WHAT = "the harbour|a stone bridge|the northern road|an empty house|the orchard|the market|a narrow stair"
WHEN = "before sunrise|in the rain|for many years|without a word|on the last day|as winter came|at noon"


@dataclass(frozen=True)
class Sequence:
    """Token ids, and where the labelled ones (questions and answers) start."""

    tokens: list[int]
    labelled: int


@dataclass
class Passkeys:
    """Sequences by number: the same number gives the same one, so a resumed run sees what it would have seen.

    Lengths in tokens, depths as fractions of the text.
    """

    tokenizer: Any
    style: Style = "auto"
    haystack: Path | None = None
    count: int = 10
    words: int = 32
    shortest: int = 1000
    longest: int = 32000
    lengths: int = 50
    depths: tuple[float, float] = (0.05, 0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(ORDINALS):
            raise RLKVError(f"passkeys must be 1 to {len(ORDINALS)}, got {self.count}")
        if self.words < 1 or self.lengths < 1 or not 1 <= self.shortest <= self.longest:
            raise RLKVError("passkeys: words and lengths must be 1 or more, and shortest at most longest")
        if not 0 <= self.depths[0] < self.depths[1] <= 1:
            raise RLKVError(f"passkeys: depths must rise within [0, 1], got {self.depths}")
        if self.style == "auto":
            sentence = " ".join(SPELLING)
            self.style = "pairs" if len(self._encode(sentence)) > 0.7 * len(sentence) else "passkeys"
        if self.style == "pairs":
            self.sequence(0)  # does the vocabulary hold them?

    def sequence(self, number: int) -> Sequence:
        """Sequence ``number``."""
        rng = random.Random(f"{self.seed}/{number}")
        return self._pairs(rng) if self.style == "pairs" else self._passkeys(rng)

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _passkeys(self, rng: random.Random) -> Sequence:
        keys = [" ".join(rng.choices(SPELLING, k=self.words)) for _ in range(self.count)]
        gap = self._encode("\n\n")
        needles, questions = [], []
        for ordinal, key in zip(ORDINALS, keys, strict=False):
            needles.append(gap + self._encode(f"The {ordinal} passkey to the vault is: {key}") + gap)
            questions += self._encode(f"What is the {ordinal} passkey to the vault?\nPasskey: {key}") + gap
        opening = self._encode("Here is a very long book: <book> ", special=True)
        closing = self._encode(" </book>\n\n")
        fixed = len(opening) + sum(map(len, needles)) + len(closing) + len(questions)
        hay = self._hay(rng, max(self._length(rng) - fixed, self.count))
        low, high = self.depths
        places = sorted(int(len(hay) * rng.uniform(low, high)) for _ in needles)
        context, last = list(opening), 0
        for place, needle in zip(places, needles, strict=True):
            context += hay[last:place] + needle
            last = place
        context += hay[last:] + closing
        return Sequence(context + questions, len(context))

    def _length(self, rng: random.Random) -> int:
        step = (self.longest - self.shortest) / max(1, self.lengths - 1)
        return round(self.shortest + step * rng.randrange(self.lengths))

    def _hay(self, rng: random.Random, length: int) -> list[int]:
        """``length`` tokens: a stretch of the file, or as many made-up sentences as it takes."""
        if self._book is not None:
            start = rng.randrange(max(1, len(self._book) - length))
            return self._book[start : start + length]
        tokens: list[int] = []
        parts = [part.split("|") for part in (WHO, DID, WHAT, WHEN)]
        while len(tokens) < length:
            text = " ".join(" ".join(map(rng.choice, parts)).capitalize() + "." for _ in range(40))
            tokens += self._encode(" " + text)
        return tokens[:length]

    @cached_property
    def _book(self) -> list[int] | None:
        if self.haystack is None:
            return None
        if not self.haystack.is_file():
            raise RLKVError(f"passkeys: {self.haystack}: no such text file")
        book = self._encode(self.haystack.read_text(encoding="utf-8"))
        if len(book) < self.longest:
            raise RLKVError(
                f"passkeys: {self.haystack} has {len(book)} tokens, fewer than the longest context of "
                f"{self.longest}: give a longer text, or a smaller longest"
            )
        return book

    def _pairs(self, rng: random.Random) -> Sequence:
        """The pocket reasoner's retrieval task (training split): the answer follows at once."""
        from rlkv.pocket.tasks import recall

        example = recall(rng)
        while example.split != "train":
            example = recall(rng)
        prompt, thinking = chat_tokens(self.tokenizer, example.prompt)
        answer = self._encode(f"{'</think>' if thinking else ''}\\boxed{{{example.answer}}}")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in prompt + answer:
            raise RLKVError(
                "passkeys: the tokenizer knows neither words nor the characters of key=value pairs"
            )
        end = getattr(self.tokenizer, "eos_token_id", None)
        tail = answer + ([] if end is None else [end])
        question = len(self._encode(example.prompt.rpartition("?")[2])) + 1  # the key and its "?"
        asked = len(prompt) - self._after_question(prompt, example.prompt) - question
        return Sequence(prompt + tail, asked)

    def _after_question(self, prompt: list[int], text: str) -> int:
        """How many tokens of the chat template follow the user's message."""
        message = self._encode(text)
        for start in range(len(prompt) - len(message), -1, -1):
            if prompt[start : start + len(message)] == message:
                return len(prompt) - start - len(message)
        return 0


def padded(rows: list[Sequence], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and labelled bool, each [rows, longest]."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labelled = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.tokens)] = torch.tensor(row.tokens)
        labelled[index, row.labelled : len(row.tokens)] = True
    return ids.to(device), labelled.to(device)
