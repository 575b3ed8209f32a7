"""What a model is asked in KVzip: contexts, and the chunks to repeat (arXiv 2505.23416, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv.errors import RLKVError

if TYPE_CHECKING:
    from rlkv_eval.tasks.base import Item

# The paper's two requests, and how many tokens before a later chunk are quoted.
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with "
QUOTED = 8
MARK = "CONTEXT"


@dataclass
class Task:
    """Tokens ``prompt`` hold the context at ``start`` … ``end`` - 1, after the chat template's opening.

    ``chunks``: (first, past last) token of a chunk in ``prompt``, and the tokens that ask for and repeat it.
    """

    prompt: list[int]
    start: int
    chunks: list[tuple[int, int, list[int]]]

    @property
    def end(self) -> int:
        return len(self.prompt)


def contexts_of(calibration: list[Item], files: list[Path], count: int) -> list[str]:
    """The texts to repeat: ``files``, or the calibration problems dealt out to ``count`` contexts."""
    if files:
        for path in files:
            if not path.is_file():
                raise RLKVError(f"kvzip: {path}: no such text file")
        return [path.read_text(encoding="utf-8") for path in files]
    if not calibration:
        raise RLKVError("kvzip: nothing to repeat; give calibration problems, or texts=FILE")
    groups = [calibration[first::count] for first in range(min(count, len(calibration)))]
    return ["\n\n".join(item.prompt for item in group) for group in groups]


def tasks_of(tokenizer: Any, text: str, limit: int, chunk: int, context_length: int) -> Task:
    """The task for one text, cut to ``limit`` tokens and to what fits ``context_length`` (0: unbounded)."""
    opening, closing = frame(tokenizer)
    encode = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
    before, after = encode(opening), encode(closing)
    requests = encode(FIRST), encode(LATER)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][
        :limit
    ]  # cut, so no warning
    if context_length:
        overhead = len(before) + max(map(len, requests)) + QUOTED + len(after)
        room = context_length - overhead
        fits = room // 2 if room // 2 <= chunk else room - chunk  # the longest repetition is one chunk
        if fits < 1:
            raise RLKVError(f"kvzip: the model's context of {context_length} tokens leaves no room to repeat")
        tokens = tokens[:fits]
    chunks = []
    for first in range(0, len(tokens), chunk):
        part = tokens[first : first + chunk]
        ask = requests[1] + tokens[max(0, first - QUOTED) : first] if first else requests[0]
        place = len(before) + first
        chunks.append((place, place + len(part), ask + after + part))
    return Task(before + tokens, len(before), chunks)


def frame(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text before and after a user's message; a thought that it opens is closed."""
    if not getattr(tokenizer, "chat_template", None):
        raise RLKVError("kvzip: the tokenizer has no chat template; set tokenizer.chat_template")
    message = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    opening, mark, closing = text.partition(MARK)
    if not mark:
        raise RLKVError("kvzip: the chat template does not contain the user's message as it is")
    if closing.rfind("<think>") > closing.rfind("</think>"):
        closing += "\n</think>\n\n" if closing.endswith("\n") else "</think>"
    return opening, closing
