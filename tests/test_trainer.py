"""The training loop on a tiny random model: real learning, and every stated rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import EOS, TinyTokenizer, read_metrics, tiny_config, tiny_model

from rlkv.config import load
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.learner import Learner, Sample
from rlkv.remarks import remarks
from rlkv.sampler import Sampler, SamplingParams
from rlkv.settings import TrainConfig
from rlkv.support import ModelShape
from rlkv.trainer import Trainer, train
from rlkv.validation import Best, Validator
from rlkv.window import Window


def test_learning_moves_the_reward(tmp_path: Path) -> None:
    """Gates start low, the reward pulls: the share of even tokens rises beyond noise, with no penalty."""
    config = tiny_config(
        tmp_path, penalty=0.0, steps=30, learning_rate=0.05, prompts_per_step=16, max_new_tokens=24, epochs=99
    )
    trainer = Trainer(config, tiny_model(), TinyTokenizer())
    trainer.run()
    rewards = [row["reward"] for row in read_metrics(Path(config.output))]
    early, late = sum(rewards[:6]) / 6, sum(rewards[-6:]) / 6
    assert late > early + 0.02, rewards
    assert all(not weight.requires_grad and weight.grad is None for weight in trainer.model.parameters())
    assert max(row["logprob_gap"] for row in read_metrics(Path(config.output))) < 1e-4


def test_the_penalty_closes_gates_and_a_target_is_kept(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, penalty=0.5, target_sparsity=0.5, steps=90, learning_rate=0.05, max_new_tokens=8, epochs=99
    )
    gates = train(config, tiny_model(layers=4), TinyTokenizer())
    assert (gates.values < 0.5).float().mean() == pytest.approx(0.5)
    assert gates.mask(0.5).gates().equal((gates.values >= 0.5).float())


def test_output_folder(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        validation_data=str(tmp_path / "prompts.jsonl"),
        validate_every=2,
        validation_prompts=8,
        tensorboard=True,
    )
    model = tiny_model()
    gates = train(config, model, TinyTokenizer())
    folder = Path(config.output)
    loaded = HeadGates.load(folder, model=model)
    assert loaded.values.equal(gates.values)
    assert loaded.window == config.window and loaded.card["prefill"] == "local"
    assert loaded.card["steps"] in (2, 4) and loaded.card["config"]["window"] == "1+3"
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["validation_mask" in row for row in rows] == [False, True, False, True]
    wanted = (
        "reward solved truncated gate_mean sparsity beta reward_factor penalty_grad grad_norm policy_loss "
    )
    wanted += "clip_fraction logprob_gap behaviour_weight response_length rollout_tokens_per_second seconds"
    assert set(wanted.split()) <= set(rows[0])
    assert (folder / "config.yaml").is_file() and list((folder / "tensorboard").iterdir())
    assert load(TrainConfig, folder / "config.yaml") == config


def test_validation_answers_with_the_deployed_mask(tmp_path: Path) -> None:
    """Its two numbers are the mean scores of greedy answers, one prompt at a time."""
    prompts = str(tmp_path / "prompts.jsonl")
    config = tiny_config(
        tmp_path, validation_data=prompts, validate_every=9, deploy_window=Window(0, 2), validation_prompts=6
    )
    trainer = Trainer(config, tiny_model(), TinyTokenizer())
    assert trainer.validator is not None
    gates = torch.tensor([[0.2, 0.9], [0.6, 0.3]])
    got = trainer.validator.accuracy(gates)
    hard = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    actor = trainer.validator.actor
    params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=0.0)
    for name, values, window in (("gates", gates, config.window), ("mask", hard, Window(0, 2))):
        sampler = Sampler(trainer.model, window, slots=1, max_length=80)
        done = [sampler.generate([tokens], params, values)[0] for tokens in actor.prompts.tokens[:6]]
        scores = [actor.verdict(index, one).score for index, one in enumerate(done)]
        assert got[f"validation_{name}"] == pytest.approx(sum(scores) / 6)
    assert actor.sampler.window == config.window  # rollouts go on with the training window


def test_rule_of_the_best_gates(tmp_path: Path) -> None:
    class Stub:
        prompts = [0]

    validator = Validator(Stub(), tiny_config(tmp_path, target_sparsity=0.5))  # type: ignore[arg-type]
    landed, off = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])

    def better(best: Best | None, gates: torch.Tensor, accuracy: float) -> Best | None:
        return validator.better(best, gates, {"validation_mask": accuracy}, 1)

    first = better(None, off, 0.9)
    second = better(first, landed, 0.5)
    assert first and second  # reaching the target comes before accuracy
    assert better(second, off, 1.0) is None
    assert better(second, landed, 0.4) is None
    assert better(second, torch.tensor([[0.2, 1.0]]), 0.5) is None  # a tie goes to the lower mean gate
    assert better(second, torch.tensor([[0.0, 0.9]]), 0.5)


def test_early_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.9, 0.8, 0.7, 0.95])
    monkeypatch.setattr(Validator, "accuracy", lambda self, gates: {"validation_mask": next(accuracies)})
    prompts = str(tmp_path / "prompts.jsonl")
    config = tiny_config(tmp_path, validation_data=prompts, validate_every=1, patience=2, steps=20)
    gates = train(config, tiny_model(), TinyTokenizer())
    assert len(read_metrics(Path(config.output))) == 4
    assert gates.card["steps"] == 2 and gates.card["validation_mask"] == 0.9
    assert HeadGates.load(Path(config.output) / "last").card["steps"] == 4


def test_ctrl_c_saves_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    update = Learner.update

    def interrupted(self: Learner, samples: list[list[Sample]], step: int) -> dict[str, float]:
        values = update(self, samples, step)
        if step == 2:
            raise KeyboardInterrupt
        return values

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "update", interrupted)
        train(config, tiny_model(), TinyTokenizer())
    said = capsys.readouterr().out
    path = Path(config.output) / "checkpoints" / "step-000002.pt"
    assert f"Stopped after step 2 of 4, saved in {path}: give the same command with resume=true" in said
    assert path.is_file() and not (Path(config.output) / "gates.tsv").exists()  # nothing goes on with these
    config.resume = True
    resumed = train(config, tiny_model(), TinyTokenizer())
    whole = train(tiny_config(tmp_path / "whole"), tiny_model(), TinyTokenizer())
    assert resumed.values.equal(whole.values)


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, deploy_window=Window(1, 2), prefill="full", target_sparsity=0.5, steps=1)
    gates = train(config, tiny_model(), TinyTokenizer())
    said = capsys.readouterr().out
    assert "trained with window 1+3 will be deployed with 1+2" in said and "prefill=full" in said
    assert "can hardly bring a gate" in said and "step 1/1  reward" in said
    assert gates.card["deploy_window"] == "1+2"


def test_activations_that_nothing_keeps_small_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-8B's 7,680 tokens at once, by transformers' forward: not beside its weights on 80 GB."""
    shape = ModelShape(layers=32, query_heads=32, kv_heads=8, head_dim=128)
    for changes, kernels, warned in (
        ({}, False, True),
        ({}, True, False),
        ({"gradient_checkpointing": True}, False, False),
        ({"estimator": "masks"}, False, False),
        ({"max_tokens_per_microbatch": 1024}, False, False),
    ):
        config = tiny_config(tmp_path, **{"max_tokens_per_microbatch": 7680, **changes})
        said = " ".join(remarks(config, shape, 1, 0, on_kernels=kernels))
        assert ("about 56 GiB of activations, of 7680 tokens at once" in said) == warned, changes
    monkeypatch.setattr("rlkv.remarks.MUCH", 0)
    train(tiny_config(tmp_path, steps=1), tiny_model(), TinyTokenizer())
    assert "of activations" in capsys.readouterr().out


def test_a_mask_that_lost_what_the_gates_had_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, mask in enumerate((0.9, 0.6)):
        values = {"validation_gates": 0.92, "validation_mask": mask}
        monkeypatch.setattr(Validator, "accuracy", lambda *_, values=values: values)
        config = tiny_config(tmp_path / str(place), steps=2, validate_every=1)
        config.validation_data = config.data
        train(config, tiny_model(), TinyTokenizer())
        warned = "WARNING: with 50.0% of the heads local the mask answers 60.0%" in capsys.readouterr().out
        assert warned == (mask == 0.6)


def test_a_skipped_update_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    norms = iter([torch.tensor(float("nan"))])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: next(norms, None) or clip(*args))
    train(tiny_config(tmp_path, steps=2), tiny_model(), TinyTokenizer())
    said = capsys.readouterr().out
    assert said.count("the update was skipped") == 1
    assert "WARNING: step 1: its gradient is not finite" in said


@pytest.mark.parametrize("name", ["penalty", "tau", "learning_rate", "max_grad_norm", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(RLKVError, match=f"{name} must be a finite number, got {value}"):
        Trainer(tiny_config(tmp_path, **{name: value}), tiny_model(), TinyTokenizer())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"beta1": 1.5}, r"beta1 must lie in \[0, 1\), got 1.5"),
        ({"beta2": -0.1}, r"beta2 must lie in \[0, 1\)"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"patience": 3}, "patience counts validations: give validation_data and validate_every"),
        ({"patience": 3, "validation_data": "pocket"}, "patience counts validations"),  # validate_every=0
        ({"prompts_per_step": 33}, "32 usable prompts, fewer than prompts_per_step=33"),
        ({"max_new_tokens": 250}, "= 290 exceeds the model's context of 256"),
        ({"max_prompt_tokens": 3}, "all 32 prompts are longer than 3"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be 2 or more"),
        ({"eval_sparsity": 1.5}, r"eval_sparsity must lie in \[0, 1\]"),
        ({"target_sparsity": -0.1}, r"target_sparsity must lie in \[0, 1\]"),
        ({"advantage": "gae"}, "advantage: expected one of group, batch"),
        ({"prefill": "none"}, "prefill: expected one of local, full"),
        ({"reward": "nothing"}, "reward: expected"),
        ({"prompt_column": "question"}, "no column 'question'"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    ],
)
def test_bad_settings_stop_before_sampling(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RLKVError, match=match):
        Trainer(tiny_config(tmp_path, **changes), tiny_model(), TinyTokenizer())


def test_unreadable_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RLKVError, match="could not be loaded"):
        Trainer(tiny_config(tmp_path, model=str(tmp_path / "none")))


def test_a_model_folder_trains(tmp_path: Path) -> None:
    """From a folder on disk, as a user has it: weights, tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("_$ abcdefghijklmnopqrstuvwxyz")}
    inner = Tokenizer(models.WordLevel({**letters, "0": 29, "1": 30, "2": 31}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", unk_token="_")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.eos_token_id == EOS
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path, model=str(tmp_path / "model"), steps=1, reward="exact")
    gates = train(config)
    card = json.loads((Path(config.output) / "card.json").read_text())
    assert card["model"] == str(tmp_path / "model") and gates.values.shape == (2, 2)


RECIPES = {  # the authors' scripts: model, beta, tau, temperature, top_p, top_k
    "llama-8b-r1": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 1e-3, 0.5, 1.0, 1.0, 0),
    "qwen-7b-r1": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 1e-3, 0.55, 1.0, 1.0, 0),
    "qwen3-4b-thinking": ("Qwen/Qwen3-4B-Thinking-2507", 2.5e-3, 0.5, 0.6, 0.95, 20),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_paper(name: str) -> None:
    root = Path(__file__).parents[1]
    config = load(TrainConfig, root / "configs" / f"{name}.yaml")
    config.check()
    own = (config.model, config.penalty, config.tau, config.temperature, config.top_p, config.top_k)
    assert own == RECIPES[name]
    common = {"window": Window(128, 256), "prompts_per_step": 32, "samples_per_prompt": 4, "epochs": 2}
    common |= {
        "learning_rate": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.017,
        "max_grad_norm": 1.0,
    }
    common |= {"max_grad_norm": 1.0, "clip": 0.4, "weight_cap": 5.0, "max_new_tokens": 7168, "steps": 0}
    common |= {"minibatches_per_batch": 1, "reward": "math", "max_tokens_per_microbatch": 7680, "seed": 1}
    for key, value in common.items():
        assert getattr(config, key) == value, key
    script = (root / "scripts" / f"train_{name}.sh").read_text()
    assert f"configs/{name}.yaml" in script


def test_defaults_are_the_llama_recipe() -> None:
    """Up to where it runs and what it validates on."""
    recipe = load(TrainConfig, Path(__file__).parents[1] / "configs" / "llama-8b-r1.yaml")
    differing = {key for key, value in vars(TrainConfig()).items() if getattr(recipe, key) != value}
    where = {"device", "slots", "kv_gib"}
    assert differing == {"output", "validation_data", "validate_every"} | where


def test_a_run_can_start_from_gates(tmp_path: Path) -> None:
    start = torch.tensor([[0.2, 0.9], [0.6, 0.4]])
    HeadGates(start).save(tmp_path / "start")
    changes = {
        "initial_gates": str(tmp_path / "start"),
        "learning_rate": 1e-6,
        "steps": 1,
        "validate_every": 0,
    }
    gates = train(tiny_config(tmp_path, **changes), tiny_model(), TinyTokenizer())
    torch.testing.assert_close(gates.values, start, atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", ["soft", "masks"])
def test_paged_rollouts_give_the_same_run(tmp_path: Path, estimator: str) -> None:
    """With pages for a few answers at a time; only the rounding of sums differs."""
    runs = []
    for kv_gib in (0.0, 4e-4):
        config = tiny_config(tmp_path / str(kv_gib), kv_gib=kv_gib, estimator=estimator, steps=3)
        gates = train(config, tiny_model(), TinyTokenizer())
        lengths = [row["response_length"] for row in read_metrics(Path(config.output))]
        runs.append((gates.values, lengths))
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-4, rtol=0)
    assert runs[0][1] == runs[1][1]
