"""The head methods: the masks they build, the bytes they hold, and that sparsity 0 is the base model."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from method_kit import items, pocket_context, tiny_context
from tiny_folder import parity
from transformers import LlamaConfig

from rlkv.cache import HeadwiseCache
from rlkv.data import Problem, chat_tokens
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.sampler import SamplingParams
from rlkv.support import ModelShape
from rlkv.window import Window
from rlkv_eval.methods import METHODS, Context, Generator, Method, ablation, get_method, token_budget
from rlkv_eval.methods.scores import cached_scores

HEADS = ("full", "rlkv", "random", "duo", "kvzip", "ablation")
SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)


def settings_of(name: str) -> dict[str, Any]:
    """Scores in a second."""
    quick: dict[str, dict[str, Any]] = {
        "duo": {"training": {"steps": 2, "dtype": "float32", "device": "cpu"}},
        "ablation": {"problems": 3, "max_new_tokens": 12},
    }
    return quick.get(name, {})


def prompts_of(context: Context) -> list[list[int]]:
    tasks = [item for task in ("recall", "resolve", "ledger") for item in items(task, 1, "test")]
    return [chat_tokens(context.tokenizer, item.prompt)[0] for item in tasks]


@pytest.mark.parametrize("name", HEADS)
def test_a_method_is_a_dataclass_behind_one_interface(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, Method)
    assert method.name == name and method.title
    assert method == get_method(name, {})


def test_unknown_names_and_settings_are_named() -> None:
    with pytest.raises(RLKVError, match="did you mean 'kvzip'"):
        get_method("kv_zip")
    with pytest.raises(RLKVError, match=r"kvzip\.chnk.*did you mean 'kvzip\.chunk'"):
        get_method("kvzip", {"chnk": 3})
    assert set(HEADS) <= set(METHODS)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 1000])
def test_the_token_budget_is_what_a_head_mask_holds(sparsity: float, length: int) -> None:
    shape = ModelShape(layers=4, query_heads=4, kv_heads=4, head_dim=8)
    window = Window(2, 6)
    mask = HeadMask.random(4, 4, sparsity, window=window, model=shape)
    held = mask.kv_bytes(length) / shape.bytes_per_token / 16  # tokens a head
    assert 0 <= held - token_budget(length, sparsity, window) < 1
    if sparsity == 0:
        assert token_budget(length, sparsity, window) == length


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_at_sparsity_0_every_method_is_the_base_model(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tiny_context(tmp_path, kind)
    prompts = prompts_of(context)
    monkeypatch.setattr(ablation, "graded", lambda items: parity)  # a random model solves nothing
    context.model.set_attn_implementation("eager")
    expected = [
        context.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    generator = get_method(name, settings_of(name)).build(context, 0.0)
    assert isinstance(generator, Generator) and generator.name == name
    assert [done.tokens for done in generator.generate(prompts, GREEDY)] == expected
    shape = context.shape
    assert generator.kv_bytes(100) == shape.layers * shape.kv_heads * 100 * 2 * shape.head_dim * 4


def test_the_pocket_reasoner_at_sparsity_0(tmp_path: Path) -> None:
    context = pocket_context(tmp_path, slots=16)
    prompts = prompts_of(context)
    full = get_method("full").build(context, 0.0)
    expected = [done.tokens for done in full.generate(prompts, GREEDY)]
    ones = HeadGates(torch.rand(context.shape.layers, context.shape.kv_heads))
    for name in set(HEADS) - {"ablation"}:  # its scores take a minute
        generator = get_method(name, settings_of(name)).build(replace(context, gates=ones), 0.0)
        assert [done.tokens for done in generator.generate(prompts, GREEDY)] == expected, name
        assert generator.kv_bytes(77) == full.kv_bytes(77)


def test_a_mask_generates_and_holds_what_the_shrinking_cache_does(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    prompt = prompts_of(context)[0]
    generator = get_method("rlkv").build(context, 0.5)
    assert generator.mask is not None and generator.mask.full.sum() == 4
    seen: list[int] = []
    (done,) = generator.generate([prompt], GREEDY, lambda completion: seen.append(completion.index))
    assert seen == [0]
    cache = HeadwiseCache(context.model.config, generator.mask, block=1)
    ids = torch.tensor([prompt])
    found = context.model.generate(
        ids, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert found[0, len(prompt) :].tolist() == done.tokens
    length = len(prompt) + len(done.tokens) - 1  # the last token's keys are never made
    assert generator.kv_bytes(length) == cache.nbytes()
    assert done.tokens != get_method("full").build(context, 0.0).generate([prompt], GREEDY)[0].tokens


def test_gates_rank_heads(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    values = torch.arange(9).reshape(3, 3) / 9
    HeadGates(values).save(tmp_path / "gates")
    mask = get_method("rlkv", {"gates": str(tmp_path / "gates")}).build(context, 1 / 3).mask
    assert mask is not None and mask.full.flatten().tolist() == [False] * 3 + [True] * 6
    assert mask.window == context.window and mask.model is not None
    with pytest.raises(RLKVError, match="no gates"):
        get_method("rlkv").build(replace(context, gates=None), 0.5)
    HeadGates(torch.rand(3, 4)).save(tmp_path / "others")
    with pytest.raises(RLKVError, match="3 layers x 4 KV heads"):
        get_method("rlkv", {"gates": str(tmp_path / "others")}).build(context, 0.5)
    with pytest.raises(RLKVError, match="sparsity 0"):
        get_method("full").build(context, 0.5)


def test_random_masks_are_those_of_rlkv_eval_and_differ_by_draw(tmp_path: Path) -> None:
    context = replace(tiny_context(tmp_path), seed=3)
    masks = [get_method("random", {"draw": draw}).build(context, 0.5).mask for draw in range(3)]
    assert len({str(mask.full.tolist()) for mask in masks if mask is not None}) == 3
    for draw, mask in enumerate(masks):
        assert mask is not None
        assert torch.equal(mask.full, HeadMask.random(3, 3, 0.5, 3 * 1_000_003 + draw).full)


# Layers, query heads and KV heads of the three models, and the true sparsities that the authors report.
PUBLISHED = {
    "Llama-3.1-8B-R1": (32, 32, 8, {0.2: 0.1992, 0.4: 0.3984, 0.5: 0.5, 0.6: 0.5977, 0.8: 0.7969}),
    "Qwen-2.5-7B-R1": (28, 28, 4, {0.2: 0.2054, 0.4: 0.4018, 0.5: 0.5, 0.6: 0.5982, 0.8: 0.7946}),
    "Qwen-3-4B-Thinking": (36, 32, 8, {0.2: 0.2014, 0.4: 0.3993, 0.5: 0.5, 0.6: 0.6007, 0.8: 0.7986}),
}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("method, source", [("rlkv", "rlkv"), ("duo", "duo_attn"), ("rlkv", "kvzip")])
def test_published_gates_load_as_they_are(model: str, method: str, source: str, tmp_path: Path) -> None:
    path = SHARED / "gates" / source / f"{model}.tsv"
    if not path.is_file():
        pytest.skip(f"published gates not found: {path} (set RLKV_SHARED_DATA)")
    layers, queries, heads, sparsities = PUBLISHED[model]
    config = LlamaConfig(
        hidden_size=128 * queries,
        num_hidden_layers=layers,
        num_attention_heads=queries,
        num_key_value_heads=heads,
    )
    tiny = tiny_context(tmp_path)
    context = replace(tiny, model=config, window=Window(16, 65), gates=None)
    for sparsity, true in sparsities.items():
        mask = get_method(method, {"gates": str(path)}).build(context, sparsity).mask
        assert mask is not None
        assert mask.sparsity == pytest.approx(true, abs=1.01 / mask.full.numel())  # rounding: a head at most


def test_generators_of_one_run_share_the_samplers_memory(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    prompt = prompts_of(context)[:1]
    get_method("full").build(context, 0.0).generate(prompt, GREEDY)
    first = context.shared["sampler"]
    get_method("random").build(replace(context, seed=1), 0.5).generate(prompt, GREEDY)
    assert context.shared["sampler"] is first
    get_method("random").build(replace(context, window=Window(1, 2)), 0.5).generate(prompt, GREEDY)
    assert context.shared["sampler"].window == Window(1, 2)


def test_ablation_ranks_by_what_each_head_alone_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tiny_context(tmp_path)
    monkeypatch.setattr(ablation, "graded", lambda items: parity)
    method = get_method("ablation", {"problems": 3, "max_new_tokens": 12})
    assert isinstance(method, ablation.Ablation)
    scores = method.scores(context)
    accuracy, logprob = torch.tensor(scores.card["accuracy"]), torch.tensor(scores.card["logprob"])
    order = sorted(range(9), key=lambda i: (-accuracy.flatten()[i], -logprob.flatten()[i]))
    assert scores.values.flatten().argsort().tolist() == order
    assert accuracy.unique().numel() > 1
    for layer, head in ((0, 0), (1, 2), (2, 1)):
        full = torch.ones(3, 3, dtype=torch.bool)
        full[layer, head] = False
        right = 0.0
        for item in context.calibration[:3]:
            ids = torch.tensor([chat_tokens(context.tokenizer, item.prompt)[0]])
            cache = HeadwiseCache(context.model.config, HeadMask(full, context.window))
            found = context.model.generate(
                ids, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
            text = context.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=False)
            right += parity(text, Problem("", "", ""))
        assert accuracy[layer, head] == pytest.approx(right / 3)


def test_ablation_stops_where_nothing_can_be_lost(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="solves none of 2 problems"):
        get_method("ablation", {"problems": 2, "max_new_tokens": 4}).build(tiny_context(tmp_path), 0.5)


def test_ablation_asks_each_items_own_grader() -> None:
    found = [*items("recall", 2), *items("ledger", 1)]
    reward = ablation.graded(found)
    for item in found:
        problem = Problem(item.prompt, item.answer, item.id, item.task)
        assert reward(f"12</think>\\boxed{{{item.answer}}}", problem) == 1
        assert reward("12</think>\\boxed{no}", problem) == 0


def test_calibration_is_needed_where_scores_are_computed(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, calibration=[])
    for name in ("ablation", "kvzip"):
        with pytest.raises(RLKVError, match="calibration problems"):
            get_method(name).build(context, 0.5)


def test_scores_are_kept_until_what_they_depend_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlkv_eval.methods.kvzip as kvzip

    context = tiny_context(tmp_path)
    calls: list[int] = []
    real = kvzip.pair_scores

    def counted(model: Any, task: Any) -> torch.Tensor:
        calls.append(1)
        return real(model, task)

    monkeypatch.setattr(kvzip, "pair_scores", counted)

    def count(context: Context, **settings: Any) -> int:
        get_method("kvzip", settings).build(context, 0.5)
        return len(calls)

    assert count(context) == 1
    assert count(context) == 1
    assert count(replace(context, calibration=context.calibration[1:])) == 2
    assert count(context, chunk=50) == 3
    assert count(replace(context, model=tiny_context(tmp_path, seed=1).model)) == 4
    assert count(context) == 4


def test_of_several_shards_one_computes_scores_and_the_others_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context, method = tiny_context(tmp_path), get_method("kvzip")
    began, inside, calls = Event(), [], []

    def compute(folder: Path) -> HeadGates:
        calls.append(folder)
        inside.append(1)
        began.set()
        time.sleep(0.3)
        assert len(inside) == 1, "two at a time"
        inside.pop()
        if len(calls) == 1:
            raise RLKVError("killed")  # the next one in line computes then
        return HeadGates(torch.rand(3, 3), model=context.shape)

    def shard(number: int) -> torch.Tensor:
        if number:
            began.wait()
        return cached_scores(context, method, compute).values

    with ThreadPoolExecutor(3) as pool:
        first, *others = [pool.submit(shard, number) for number in range(3)]
        with pytest.raises(RLKVError, match="killed"):
            first.result()
        scores = [each.result() for each in others]
    assert len(calls) == 2 and calls[0] == calls[1]
    assert scores[0].equal(scores[1])
    assert "waiting for another process" in capsys.readouterr().out
