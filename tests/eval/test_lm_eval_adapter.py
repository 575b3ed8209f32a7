"""The model ``rlkv`` of lm-evaluation-harness, on local tasks and the pocket model: no download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lm_eval[hf]'")
pytest.importorskip("accelerate", reason="lm_eval's model hf needs accelerate: pip install 'lm_eval[hf]'")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from rlkv import HeadGates, Sampler, pocket
from rlkv.attention import Mixed
from rlkv.errors import RLKVError
from rlkv.sampler import SamplingParams
from rlkv_eval.lm_eval_adapter import MaskedLM

WINDOW = pocket.WINDOW
LENGTH = 900  # prompt and answer


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = pocket.load()
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return HeadGates(values, window=WINDOW, card={"config": {"model": "pocket"}}).save(
        tmp_path_factory.mktemp("gates")
    )


@pytest.fixture(scope="module")
def masked(gates: Path) -> MaskedLM:
    return MaskedLM(
        gates=str(gates), sparsity=0.5, batch_size=3, max_length=LENGTH, max_gen_toks=40, device="cpu"
    )


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def prompts(masked: MaskedLM, n: int) -> list[str]:
    problems = pocket.problems("resolve", "dev", n)
    return [masked.apply_chat_template([{"role": "user", "content": row["prompt"]}]) for row in problems]


def test_registered_under_its_name() -> None:
    assert get_model("rlkv") is MaskedLM


def test_generates_what_the_sampler_generates(masked: MaskedLM) -> None:
    """Against a sampler of our own with the mask's gates; requests with other limits in between."""
    texts = prompts(masked, 3)
    asked = [request(text, {"until": [], "max_gen_toks": 40 - 10 * (i == 1)}) for i, text in enumerate(texts)]
    answers = masked.generate_until(asked, disable_tqdm=True)
    model, tokenizer = pocket.load()
    sampler = Sampler(model, WINDOW, slots=4, max_length=LENGTH, prefill="full")
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert masked.mask is not None
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    expected = [done.tokens for done in sampler.generate(tokens, params, masked.mask.gates())]
    expected[1] = expected[1][:30]
    assert answers == [tokenizer.decode(part, skip_special_tokens=True) for part in expected]
    full = [done.tokens for done in sampler.generate(tokens, params)]
    assert expected[0] != full[0]  # or the mask was never there


def test_an_answer_gives_way_to_its_prompt(masked: MaskedLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit beyond the context (the default is 8192) must not eat the prompt."""
    text = prompts(masked, 1)[0]
    (answer,) = masked.generate_until([request(text, {"until": [], "max_gen_toks": 8192})], disable_tqdm=True)
    (start,) = masked.generate_until([request(text, {"until": [], "max_gen_toks": 20})], disable_tqdm=True)
    assert answer.startswith(start) and "CUT" not in capsys.readouterr().err
    assert len(masked.tok_encode(answer)) <= LENGTH - len(masked.tok_encode(text))
    masked.generate_until([request(text * 20, {"until": [], "max_gen_toks": 8192})], disable_tqdm=True)
    assert f"1 of 1 prompts are CUT to their last {LENGTH // 2} tokens" in capsys.readouterr().err


def test_stop_strings_and_thinking(masked: MaskedLM) -> None:
    text = prompts(masked, 1)[0]
    whole = masked.generate_until([request(text, {"until": []})], disable_tqdm=True)[0]
    stop = whole[10:12]
    cut = masked.generate_until([request(text, {"until": [stop]})], disable_tqdm=True)[0]
    assert cut == whole.partition(stop)[0] and len(cut) < len(whole)
    tokens = masked.tok_encode(whole)
    masked.think_end_token = tokens[4]
    last = len(tokens) - tokens[::-1].index(tokens[4])
    try:
        after = masked.generate_until([request(text, {"until": []})], disable_tqdm=True)[0]
    finally:
        masked.think_end_token = None
    assert after == masked.tok_decode(tokens[last:]).lstrip()


def test_sampled_answers_depend_on_the_seed_alone(masked: MaskedLM) -> None:
    text, kwargs = prompts(masked, 1)[0], {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    first, second = (masked.generate_until([request(text, kwargs)] * 2, disable_tqdm=True) for _ in range(2))
    assert first == second and first[0] != first[1]


def test_loglikelihood_reads_through_the_mask(masked: MaskedLM) -> None:
    """Against a plain sum over a forward pass with the reference attention, one text at a time."""
    pairs = [(text, answer) for text, answer in zip(prompts(masked, 3), ("12", "3 4 5", "a=1;"), strict=True)]
    found = masked.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    model, _ = pocket.load()
    model.set_attn_implementation("rlkv")
    assert masked.mask is not None
    differs = 0.0
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        whole, start = masked.tok_encode(context + continuation), len(masked.tok_encode(context))
        ids = torch.tensor([whole])
        soft = Mixed(masked.mask.gates(), WINDOW, path="reference")
        with torch.inference_mode():
            logits = model(ids, rlkv=soft, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
            full = model(ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        target = ids[0, start:, None]
        assert score == pytest.approx(logits.gather(1, target).sum().item(), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == target[:, 0]).all())
        differs = max(differs, abs(full.gather(1, target).sum().item() - score))
    assert differs > 0.1  # or the mask was never there


def test_a_task_from_start_to_end(tmp_path: Path, gates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = pocket.problems("resolve", "dev", 2)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
    common += "test_split: test\n"
    common += 'doc_to_text: "{{prompt}}"\n'
    (tmp_path / "generate.yaml").write_text(
        f"task: pocket_generate\n{common}output_type: generate_until\n"
        'doc_to_target: "{{answer}}"\ngeneration_kwargs: {max_gen_toks: 16, until: []}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "choose.yaml").write_text(
        f'task: pocket_choose\n{common}output_type: multiple_choice\ndoc_to_choice: ["1", "2 3"]\n'
        "doc_to_target: 0\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = lm_eval.simple_evaluate(
        model="rlkv",
        model_args=f"gates={gates},sparsity=0.5,window=4+16,device=cpu,max_length={LENGTH}",
        tasks=["pocket_generate", "pocket_choose"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["pocket_choose"]["acc,none"] in (0.0, 0.5, 1.0)
    assert [len(row["resps"][0][0]) > 0 for row in found["samples"]["pocket_generate"]] == [True, True]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gates": "a", "mask": "b"}, "either gates"),
        ({"pretrained": "pocket", "prefill": "none"}, "prefill"),
        ({}, "no model is named"),
        ({"gates": "/nowhere"}, "nowhere"),
        ({"pretrained": "pocket", "window": "16"}, "SINK"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RLKVError, match=match):
        MaskedLM(**options)


def test_without_a_mask_it_is_the_base_model() -> None:
    full = MaskedLM("pocket", device="cpu", max_length=LENGTH)
    text = prompts(full, 1)[0]
    model, _ = pocket.load()
    ids = torch.tensor([full.tok_encode(text + "1")])
    with torch.inference_mode():
        expected = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()
    score = full.loglikelihood([request(text, "1")], disable_tqdm=True)[0][0]
    assert score == pytest.approx(expected, abs=1e-3)
