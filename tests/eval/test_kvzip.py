"""KVzip's scores against eager attention weights, read off one long forward without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import items, tiny_context

from rlkv.errors import RLKVError
from rlkv.pocket.tokenizer import build_tokenizer
from rlkv_eval.methods import get_method, kvzip
from rlkv_eval.methods.kvzip import pair_scores
from rlkv_eval.methods.reconstruction import FIRST, LATER, Task, contexts_of, frame, tasks_of


def slow_scores(model: Any, task: Task) -> torch.Tensor:
    """[layers, kv_heads, context tokens], a query head and a key at a time.

    The whole sequence goes through eager attention once for each chunk; its weights, over all keys, are
    normalised again over the keys that the paper's authors keep: opening, chunk, repetition.
    """
    model.set_attn_implementation("eager")
    layers, queries = model.config.num_hidden_layers, model.config.num_attention_heads
    heads = model.config.num_key_value_heads
    group = queries // heads
    scores = torch.zeros(layers, heads, task.end - task.start)
    for first, last, repetition in task.chunks:
        ids = torch.tensor([task.prompt + repetition])
        weights = model(ids, output_attentions=True).attentions
        total = ids.shape[1]
        kept = [*range(task.start), *range(first, last), *range(task.end, total)]
        for layer in range(layers):
            for query_head in range(queries):
                for query in range(task.end, total):
                    row = weights[layer][0, query_head, query]
                    share = row[first:last] / row[kept].sum()
                    place = slice(first - task.start, last - task.start)
                    old = scores[layer, query_head // group, place]
                    scores[layer, query_head // group, place] = torch.maximum(old, share)
    return scores


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("chunk, block_bytes", [(2000, 2**28), (17, 2**28), (17, 20_000), (1, 2**28)])
def test_scores_are_those_of_eager_attention(
    kind: str, chunk: int, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tiny_context(tmp_path, kind)
    monkeypatch.setattr(kvzip, "SCORE_BYTES", block_bytes)  # small: queries go in blocks
    text = "ledger A+12;B-07?\nx=3;" if chunk > 1 else "a=1"
    task = tasks_of(context.tokenizer, text * 2, 30, chunk, 512)
    assert len(task.chunks) == -(-(task.end - task.start) // chunk)
    context.model.set_attn_implementation("rlkv")
    found = pair_scores(context.model, task)
    expected = slow_scores(context.model, task)
    assert found.shape == expected.shape and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_heads_score_is_its_best_pair_over_all_contexts(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    scores = get_method("kvzip", {"contexts": 2, "chunk": 40}).scores(context)  # type: ignore[attr-defined]
    best = torch.zeros(3, 3)
    for number in range(2):
        text = "\n\n".join(item.prompt for item in context.calibration[number::2])
        task = tasks_of(context.tokenizer, text, 16384, 40, 512)
        context.model.set_attn_implementation("rlkv")
        best = torch.maximum(best, pair_scores(context.model, task).flatten(2).max(dim=2).values)
    assert torch.equal(scores.values, best)
    assert scores.values.unique().numel() == 9


def test_what_the_model_is_asked_to_repeat() -> None:
    tokenizer = build_tokenizer()
    text = "ledger A+12;B-07;C+33?"
    task = tasks_of(tokenizer, text, 1000, 10, 0)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert task.prompt[task.start :] == tokens
    assert tokenizer.decode(task.prompt[: task.start]) == "<bos><user>"
    said = []
    for first, last, repetition in task.chunks:
        part = task.prompt[first:last]
        assert repetition[-len(part) :] == part
        said += part
        asked = tokenizer.decode(repetition[: -len(part)])
        quoted = str(tokenizer.decode(task.prompt[max(task.start, first - 8) : first]))
        request = LATER + quoted if first > task.start else FIRST
        assert asked == f"{request}<assistant><think></think>"
    assert said == tokens


@pytest.mark.parametrize("chunk", [5, 50, 2000])
@pytest.mark.parametrize("context_length", [130, 256, 1024])
def test_a_context_and_its_repetition_fit_the_model(chunk: int, context_length: int) -> None:
    tokenizer = build_tokenizer()
    text = "".join(item.prompt for item in items("search", 10))
    task = tasks_of(tokenizer, text, 10**6, chunk, context_length)
    longest = max(len(repetition) for _, _, repetition in task.chunks)
    assert context_length - 80 < len(task.prompt) + longest <= context_length
    assert task.end - task.start > 0
    with pytest.raises(RLKVError, match="leaves no room"):
        tasks_of(tokenizer, text, 10**6, chunk, 60)


def test_contexts_come_from_files_or_from_problems(tmp_path: Path) -> None:
    problems = items("recall", 5)
    both = contexts_of(problems, [], 2)
    assert [text.count("recall") for text in both] == [3, 2]
    assert len(contexts_of(problems, [], 9)) == 5
    path = tmp_path / "book.txt"
    path.write_text("once")
    assert contexts_of(problems, [path], 1) == ["once"]
    with pytest.raises(RLKVError, match="no such text file"):
        contexts_of(problems, [tmp_path / "none.txt"], 1)


def test_the_template_is_closed_as_each_model_closes_its_thought() -> None:
    tokenizer = build_tokenizer()
    assert frame(tokenizer) == ("<bos><user>", "<assistant><think></think>")
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}<|Assistant|>{{ '<think>\\n' }}"
    assert frame(tokenizer) == ("<s>", "<|Assistant|><think>\n\n</think>\n\n")
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}<|Assistant|>"
    assert frame(tokenizer) == ("<s>", "<|Assistant|>")
    tokenizer.chat_template = "<s>{{ messages[0]['content'] | lower }}<|Assistant|>"
    with pytest.raises(RLKVError, match="does not contain the user's message"):
        frame(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(RLKVError, match="no chat template"):
        frame(tokenizer)
