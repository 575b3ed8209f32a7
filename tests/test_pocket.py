"""The pocket reasoner: its tasks are right, its splits disjoint, its weights load and reason."""

from __future__ import annotations

import re
from itertools import islice

import pytest
import torch

from rlkv import pocket
from rlkv.pocket.batches import EOS, WIDTHS, draw, label
from rlkv.pocket.tasks import TASKS, Example, examples
from rlkv.pocket.tokenizer import VOCABULARY, build_tokenizer, encode
from rlkv.sampler import Sampler, SamplingParams


def take(task: str, number: int, split: str = "train", seed: int = 0) -> list[Example]:
    return list(islice(examples(task, split, seed), number))


def evaluate(definitions: dict[str, str], name: str) -> int:
    """Recursive, unlike the generator."""
    text = definitions[name]
    if text.isdigit():
        return int(text)
    sign = 1 if text[1] == "+" else -1
    return (evaluate(definitions, text[0]) + sign * int(text[2:])) % 100


def test_resolve_answers() -> None:
    for example in take("resolve", 50):
        body, target = example.prompt.removeprefix("resolve ").split("?")
        definitions = dict(item.split("=") for item in body.split(";"))
        assert int(example.answer) == evaluate(definitions, target)


def test_search_answers() -> None:
    for example in take("search", 50):
        body, question = example.prompt.removeprefix("search ").split("?")
        children = {item[0]: item[2:] for item in body.split(";")}
        path = example.answer
        assert path[0] == question[0] and path[-1] == question[1]
        assert all(below in children[above] for above, below in zip(path[:-1], path[1:], strict=True))


def test_ledger_answers() -> None:
    for example in take("ledger", 50):
        entries = re.findall(r"[A-Z]([+-]\d\d)", example.prompt)
        assert int(example.answer) == sum(map(int, entries)) % 100


def test_recall_answers() -> None:
    for example in take("recall", 50):
        body, key = example.prompt.removeprefix("recall ").split("?")
        assert example.answer == dict(item.split("=") for item in body.split(";"))[key]
        assert example.thought == ""


@pytest.mark.parametrize("task", ["resolve", "ledger"])
def test_every_step_of_a_thought_is_right(task: str) -> None:
    for example in take(task, 30):
        steps = re.findall(r"(\d\d)([+-])(\d\d)=(\d):(\d\d)", example.thought)
        assert len(steps) >= 14
        for before, sign, amount, last, after in steps:
            assert int(after) == (int(before) + int(sign + amount)) % 100
            assert last == after[1]


def test_splits_are_disjoint_and_examples_distinct() -> None:
    for task in TASKS:
        found = {
            split: {example.id for example in take(task, 100, split)} for split in ("train", "dev", "test")
        }
        assert all(len(ids) == 100 for ids in found.values())
        assert not (
            found["train"] & found["test"] or found["train"] & found["dev"] or found["dev"] & found["test"]
        )
        assert {example.split for example in take(task, 20, "test", seed=7)} == {"test"}


def test_problems_repeat_with_the_seed() -> None:
    assert pocket.problems("search", "test", 5, seed=3) == pocket.problems("search", "test", 5, seed=3)
    assert pocket.problems("search", "test", 5, seed=3) != pocket.problems("search", "test", 5, seed=4)


@pytest.mark.parametrize("task", TASKS)
def test_tokens(task: str) -> None:
    tokenizer = build_tokenizer()
    for example in take(task, 20):
        assert "<unk>" not in tokenizer.convert_ids_to_tokens(encode(example.prompt + example.thought))
        message = [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode(f"<bos><user>{example.prompt}<assistant><think>")
        assert tokenizer.decode(ids) == text
        closed = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert closed == text + "</think>"


@pytest.mark.parametrize("task", TASKS)
def test_pretraining_rows(task: str) -> None:
    tokens, starts = draw(task, 40, seed=3, no_thought=0.5)
    ids, labels = label(torch.from_numpy(tokens).long(), torch.from_numpy(starts).long())
    assert ids.shape == (40, WIDTHS[task])
    for row, target, start in zip(ids.tolist(), labels.tolist(), starts.tolist(), strict=True):
        end = row.index(EOS)
        assert target[start - 1 : end] == row[start : end + 1]
        assert set(target[: start - 1]) == {-100} and set(target[end:]) == {-100}
        assert row[start - 1] in (VOCABULARY["<think>"], VOCABULARY["</think>"])


@pytest.fixture(scope="module")
def reasoner():
    from rlkv.loading import load_model

    return load_model("pocket", "float32", "cpu")


def solved(reasoner, task: str, number: int, gates: torch.Tensor | None) -> float:
    model, tokenizer = reasoner
    found = pocket.problems(task, "test", number, seed=11)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for problem in found
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    sampler = Sampler(model, pocket.WINDOW, slots=number, max_length=720)
    answers = sampler.generate(prompts, SamplingParams(max_new_tokens=480, temperature=0), gates)
    right = 0
    for answer, problem in zip(answers, found, strict=True):
        right += tokenizer.decode(answer.tokens).endswith(f"</think>\\boxed{{{problem['answer']}}}<eos>")
    return right / number


@pytest.mark.parametrize("task", TASKS)
def test_it_reasons_with_the_full_cache_and_not_without(reasoner, task: str) -> None:
    assert solved(reasoner, task, 12, None) >= 0.9
    assert solved(reasoner, task, 12, torch.zeros(6, 16)) <= 0.1


def test_weights_are_small_and_bfloat16() -> None:
    from safetensors import safe_open

    path = pocket.weights_folder() / "model.safetensors"
    assert path.stat().st_size < 15 * 2**20
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
