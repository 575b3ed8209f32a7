"""DuoAttention's training: its data, its loss against the reference attention, resuming to the same gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import pocket_model, tiny_context
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlkv.attention import Mixed
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.pocket.tokenizer import build_tokenizer
from rlkv.window import Window
from rlkv_eval.methods import get_method, train_duo
from rlkv_eval.methods.passkeys import ORDINALS, SPELLING, Passkeys, padded
from rlkv_eval.methods.train_duo import DuoTrainer, TrainDuoConfig

WINDOW = Window(2, 6)


class WordTokenizer:
    """A word with its space is a token; ids are given as words come."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        import re

        words = re.findall(r"\s*\S+|\s+", text)
        found = [self.ids.setdefault(word, len(self.ids) + 1) for word in words]
        return {"input_ids": [0] * add_special_tokens + found}

    def text(self, tokens: list[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return "".join(words.get(token, "<bos>") for token in tokens)


def config_of(folder: Path, **changes: Any) -> TrainDuoConfig:
    settings: dict[str, Any] = dict(
        output=str(folder), window=WINDOW, steps=6, rows=2, checkpoint_every=2, device="cpu", dtype="float32"
    )
    return TrainDuoConfig(**(settings | changes))


def test_passkeys_are_hidden_in_the_text_and_asked_for_at_its_end() -> None:
    tokenizer = WordTokenizer()
    data = Passkeys(tokenizer, count=4, words=6, shortest=300, longest=600, lengths=3, seed=1)
    assert data.style == "passkeys"
    lengths = set()
    for number in range(12):
        sequence = data.sequence(number)
        assert sequence == data.sequence(number)
        context = tokenizer.text(sequence.tokens[: sequence.labelled])
        asked = tokenizer.text(sequence.tokens[sequence.labelled :])
        assert context.startswith("<bos>") and context.count("passkey") == 4
        assert asked.count("What is the") == 4 and asked.startswith("What is the first passkey")
        keys = [part.split("\n\n")[0] for part in asked.split("Passkey: ")[1:]]
        assert len(set(keys)) == 4
        last = 0
        for ordinal, key in zip(ORDINALS, keys, strict=False):
            assert len(key.split()) == 6 and set(key.split()) <= set(SPELLING)
            place = context.index(f"The {ordinal} passkey to the vault is: {key}\n\n")
            assert place > last
            last = place
        lengths.add(len(sequence.tokens))
    assert lengths == {300, 450, 600}
    assert data.sequence(0) != data.sequence(1)


def test_a_text_of_ones_own_takes_the_place_of_made_up_sentences(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("lorem " * 700)
    tokenizer = WordTokenizer()
    options: dict[str, Any] = dict(count=2, words=3, shortest=200, longest=600, lengths=2)
    sequence = Passkeys(tokenizer, haystack=path, **options).sequence(0)
    assert tokenizer.text(sequence.tokens).count("lorem") > 100
    path.write_text("lorem " * 500)
    with pytest.raises(RLKVError, match="50. tokens, fewer than"):
        Passkeys(tokenizer, haystack=path, **options).sequence(0)
    with pytest.raises(RLKVError, match="no such text file"):
        Passkeys(tokenizer, haystack=tmp_path / "none", **options).sequence(0)
    with pytest.raises(RLKVError, match="1 to 20"):
        Passkeys(tokenizer, count=21)


def test_a_character_level_model_gets_pairs_of_its_own_vocabulary() -> None:
    tokenizer = build_tokenizer()
    data = Passkeys(tokenizer)
    assert data.style == "pairs"
    for number in range(8):
        sequence = data.sequence(number)
        text = str(tokenizer.decode(sequence.tokens))
        asked = str(tokenizer.decode(sequence.tokens[sequence.labelled :]))
        assert "<unk>" not in text and text.startswith("<bos><user>recall ")
        question, _, rest = asked.partition("<assistant>")
        key = question.removeprefix("?")
        assert question == f"?{key}" and len(key) == 1
        value = text.partition(f"{key}=")[2][:2]
        assert rest == f"<think></think>\\boxed{{{value}}}<eos>"
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    strange = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>", chat_template="<think>")
    with pytest.raises(RLKVError, match="knows neither"):
        Passkeys(strange, style="pairs")


def test_the_loss_is_the_distance_of_hidden_states_on_the_labelled_tokens(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    trainer = DuoTrainer(config_of(tmp_path / "run"), context.model, context.tokenizer)
    torch.manual_seed(0)
    values = torch.rand(3, 3)
    trainer.gates.data.copy_(values)
    rows = [trainer.data.sequence(number) for number in range(3)]
    ids, labelled = padded(rows, context.model.device)
    found = trainer.distance(ids, labelled)
    (slope,) = torch.autograd.grad(found, trainer.gates)

    def slowly(gates: torch.Tensor) -> float:
        total, count = 0.0, 0
        for row in rows:
            alone = torch.tensor([row.tokens])
            full = context.model.base_model(alone, use_cache=False).last_hidden_state[0]
            mixed = context.model.base_model(
                alone, use_cache=False, rlkv=Mixed(gates, WINDOW, path="reference")
            ).last_hidden_state[0]
            for place in range(row.labelled, len(row.tokens)):
                total += ((mixed[place] - full[place]) ** 2).mean().item()
                count += 1
        return total / count

    assert found.item() == pytest.approx(slowly(values), rel=1e-4)
    for layer, head in ((0, 0), (1, 2), (2, 1)):
        step = torch.zeros(3, 3)
        step[layer, head] = 1e-2
        measured = (slowly(values + step) - slowly(values - step)) / 2e-2
        assert slope[layer, head].item() == pytest.approx(measured, rel=0.05, abs=1e-4)
    trainer.gates.data.fill_(1)
    assert trainer.distance(ids, labelled).item() < 1e-9


def test_a_step_follows_the_loss_and_the_penalty(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    trainer = DuoTrainer(config_of(tmp_path / "run", penalty=1e6), context.model, context.tokenizer)
    values = trainer.step()
    assert values["loss"] == pytest.approx(values["distance"] + 1e6)
    # AdamW's first step is the learning rate in the direction of the sign; the ramp starts at its whole here
    assert torch.allclose(trainer.gates, torch.full((3, 3), 0.98), atol=1e-5)
    assert all(not parameter.requires_grad for parameter in context.model.parameters())


def test_the_learning_rate_rises_holds_and_falls() -> None:
    config = TrainDuoConfig(steps=100, learning_rate=0.02)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.002) and rates[9] == pytest.approx(0.01)
    assert rates[19:81] == pytest.approx([0.02] * 62)
    assert rates[90] == pytest.approx(0.01) and rates[99] == pytest.approx(0.002)


def test_a_killed_run_goes_on_to_the_same_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tmp_path)
    whole = train_duo.train_duo(config_of(tmp_path / "whole"), context.model, context.tokenizer)
    assert whole.values.std() > 1e-4 and whole.values.max() <= 1

    killed = config_of(tmp_path / "killed")
    real = DuoTrainer.step

    def step(self: DuoTrainer) -> dict[str, float]:
        if self.done == 5:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(DuoTrainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_duo.train_duo(killed, context.model, context.tokenizer)
    monkeypatch.setattr(DuoTrainer, "step", real)
    assert not (tmp_path / "killed" / "gates.tsv").exists()
    with pytest.raises(RLKVError, match="already holds a run at step 4"):
        train_duo.train_duo(killed, context.model, context.tokenizer)
    with pytest.raises(RLKVError, match=r"had rows=2, now it is 3"):
        train_duo.train_duo(replace(killed, rows=3, resume=True), context.model, context.tokenizer)
    resumed = train_duo.train_duo(replace(killed, resume=True), context.model, context.tokenizer)
    assert torch.equal(resumed.values, whole.values)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in logs[1]] == [row["loss"] for row in logs[0]]
    card = HeadGates.load(tmp_path / "whole", model=context.model).card
    assert card["method"] == "DuoAttention" and card["style"] == "pairs" and card["steps"] == 6


def test_the_method_trains_at_the_runs_window_and_keeps_the_gates(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    settings = {"training": {"steps": 3, "device": "cpu", "dtype": "float32"}}
    gates = get_method("duo", settings).scores(context)  # type: ignore[attr-defined]
    assert gates.window == context.window and gates.card["fingerprint"]["settings"]["training"]["steps"] == 3
    (folder,) = tmp_path.glob("duo-*")
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3
    again = get_method("duo", {"gates": str(folder)}).scores(context)  # type: ignore[attr-defined]
    assert torch.equal(again.values, gates.values)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    with pytest.raises(RLKVError, match="steps must be above 0"):
        train_duo.train_duo(config_of(tmp_path, steps=0), context.model, context.tokenizer)
    with pytest.raises(RLKVError, match="no model is named"):
        train_duo.train_duo(config_of(tmp_path))
    with pytest.raises(RLKVError, match="32000 tokens exceed the model's context of 512"):
        DuoTrainer(config_of(tmp_path, style="passkeys"), context.model, WordTokenizer())
    with pytest.raises(RLKVError, match=r"within the window 128\+256"):
        DuoTrainer(config_of(tmp_path, window=None), context.model, context.tokenizer)


def test_checkpointed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    slopes = []
    for number, recompute in enumerate((False, True)):
        config = config_of(tmp_path / str(number), gradient_checkpointing=recompute)
        trainer = DuoTrainer(config, context.model, context.tokenizer)
        trainer.gates.data.fill_(0.7)
        ids, labelled = padded([trainer.data.sequence(0)], context.model.device)
        slopes.append(torch.autograd.grad(trainer.distance(ids, labelled), trainer.gates)[0])
    assert torch.allclose(slopes[0], slopes[1], atol=1e-7) and slopes[0].abs().max() > 1e-5


def test_retrieval_heads_of_the_pocket_reasoner_stay_open(tmp_path: Path) -> None:
    """Gates of a short training: the full heads that they name keep retrieval alive, the others do not."""
    model, tokenizer = pocket_model()
    config = config_of(tmp_path, window=Window(4, 16), steps=20, rows=1, learning_rate=0.1)
    gates = train_duo.train_duo(config, model, tokenizer).values
    trainer = DuoTrainer(config_of(tmp_path / "judge", window=Window(4, 16)), model, tokenizer)
    ids, labelled = padded([trainer.data.sequence(10_000 + row) for row in range(4)], model.device)
    order = gates.flatten().argsort(descending=True)
    distances = []
    for keep in (order[: len(order) // 2], order[len(order) // 2 :]):
        trainer.gates.data.view(-1).zero_()[keep] = 1.0
        distances.append(trainer.distance(ids, labelled).item())
    assert 2 * distances[0] < distances[1]
