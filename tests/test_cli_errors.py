"""Bad input ends with one sentence, for every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import COLLECT, EVAL, GENERATE, TRAIN, fails, save_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rank", "{home}/nan.tsv", "sparsity=0.5"), "row 2 (layer 1), column 2 (KV head 1) is nan"),
        (
            (*EVAL, "gates={home}/narrow", "model={home}/model", "window=4+16"),
            "wrong shape: 3 layers x 2 KV heads",
        ),
        ((*EVAL, "model={home}/other"), "gates made for another model: qwen3"),
        ((*GENERATE, "model={home}/other", "prompt=ab"), "gates made for another model: qwen3"),
        (("rank", "{home}/none", "sparsity=0.5"), "{home}/none: no such file or folder"),
        ((*EVAL, "data={home}/none.jsonl"), "{home}/none.jsonl: no such file"),
        (
            (*EVAL, "model={home}/none"),
            "model '{home}/none' could not be loaded (a hub id or a local folder)",
        ),
        (("train", "{home}/none.yaml"), "cannot read the config file {home}/none.yaml: No such file"),
        (("plot", "{home}/none"), "{home}/none: no such folder"),
        ((*GENERATE, "@{home}/none.txt"), "cannot read the prompt file {home}/none.txt"),
        (("train", "stepz=3"), "unknown setting 'stepz': did you mean 'steps'?"),
        (("eval", "out=x"), "unknown setting 'out': did you mean 'output'?"),
        (
            ("rank", "{home}/gates", "sparsity=1.5"),
            "sparsity is the fraction of heads made local, within [0, 1]",
        ),
        (
            (*EVAL, "sparsities=0.5,-0.1"),
            "sparsity is the fraction of heads made local, within [0, 1]; got -0.1",
        ),
        ((*GENERATE, "sparsity=2", "prompt=ab"), "within [0, 1]; got 2.0"),
        ((*EVAL, "window=4+0"), "setting 'window': window: recent must be 1 or more, got 0"),
        (("train", "window=4+0"), "setting 'window': window: recent must be 1 or more, got 0"),
        ((*GENERATE, "prompt=" + "ab=12;" * 60), "the prompt has 364 tokens; the context of"),
        ((*EVAL, "data={home}/empty.jsonl"), "{home}/empty.jsonl: the prompt set is empty"),
        (
            (*EVAL, "prompt_column=question"),
            "row 1 has no column 'question'; it has prompt, answer, id, task",
        ),
        ((*EVAL, "data={home}/long.jsonl"), "all 1 prompts are longer than 128 tokens, the limit by half"),
        (
            (*EVAL, "methods=random", "gates=", "model={home}/sliding", "window=2+6"),
            "mistral ({home}/sliding) can't be split by KV head: its layers use a sliding window of 64",
        ),
        ((*TRAIN, "data={home}/none.jsonl"), "{home}/none.jsonl: no such file"),
        ((*TRAIN, "data={home}/empty.jsonl"), "{home}/empty.jsonl: the prompt set is empty"),
        ((*TRAIN, "prompt_column=question"), "row 1 has no column 'question'; it has prompt, answer"),
        ((*TRAIN, "max_prompt_tokens=5"), "longer than 5 tokens, the limit by max_prompt_tokens"),
        ((*TRAIN, "prompts_per_step=2", "max_new_tokens=250"), "exceeds the model's context of 256"),
        (
            (*TRAIN, "prompts_per_step=2", "target_sparsity=1.5"),
            "target_sparsity must lie in [0, 1], got 1.5",
        ),
        ((*TRAIN, "model={home}/sliding"), "can't be split by KV head: its layers use a sliding window"),
        ((*COLLECT, "data={home}/empty.jsonl"), "{home}/empty.jsonl: the prompt set is empty"),
        ((*COLLECT, "answer_column=gold"), "row 1 has no column 'gold'; it has prompt, answer"),
        ((*COLLECT, "data={home}/long.jsonl"), "longer than 99 tokens, the limit by max_prompt_tokens"),
        (("rank", "{home}/gates"), "give exactly one of sparsity=…, memory=… and max_loss=…; none given"),
        (("rank", "{home}/gates", "sparsity=0", "memory=1GiB"), "sparsity and memory given"),
        (("rank", "{home}/gates", "memory=1KiB", "length=9999"), "even with every head local"),
        (("rank", "{home}/gates", "memory=lots"), "expected a size such as 8GiB"),
        (("rank", "{home}/gates", "sparsity=0.5", "batch=0"), "batch must be 1 or more, got 0"),
        (("rank", "{home}/gates", "sparsity=0.5", "batch=-4"), "batch must be 1 or more, got -4"),
        (("rank", "{home}/gates", "sparsity=0.5", "length=0"), "length must be 1 or more, got 0"),
        (("rank", "{home}/gates", "memory=1GiB", "bytes_per_value=0"), "bytes_per_value must be 1 or more"),
        (("rank", "{home}/gates", "max_loss=.02", "n=-5"), "n is a number of problems, 0 or more (0: all)"),
        (("rank", "{home}/gates", "max_loss=nan"), "setting 'max_loss': expected a finite number, got 'nan'"),
        (
            ("rank", "{home}/narrow", "memory=1GiB"),
            "give window=SINK+RECENT, such as window=16+64; no model is named: give model=pocket",
        ),
        (("eval", "gates={home}/narrow"), "such as window=16+64; no model is named: give model=pocket"),
        ((*GENERATE, "gates={home}/narrow", "prompt=ab"), "such as window=16+64; no model is named"),
        (("rank", "{home}/gates", "sparsity=0.5", "output=/dev/null/x/m.json"), "/dev/null/x: Not a dir"),
        ((*TRAIN, "prompts_per_step=2", "output=/dev/null/x"), "/dev/null/x: Not a directory"),
        ((*COLLECT, "output=/dev/null/x"), "/dev/null/x: Not a directory"),
        ((*EVAL, "output=/dev/null/x"), "/dev/null/x: Not a directory"),
        ((*GENERATE, "prompt=ab", "max_new_tokens=0"), "max_new_tokens must be 1 or more, got 0"),
        ((*GENERATE, "prompt=ab", "temperature=-1"), "temperature must be 0 (greedy) or more, got -1.0"),
        ((*TRAIN, "penalty=nan"), "setting 'penalty': expected a finite number, got 'nan'"),
        (("rank", "sparsity=0.5"), "setting 'gates' is missing: give gates=…"),
        (("rank", "a", "b"), "don't know what to do with 'b'"),
        (("eval", "--gates"), "--gates needs a value"),
        ((*EVAL, "output="), "give output=FOLDER"),
        (("eval", "methods=rlkv"), "the method rlkv needs gates=FOLDER"),
        (("eval", "methods=random", "window=4+16"), "no model is named"),
        (("eval", "methods=random", "model=pocket"), "no window is known"),
        (("generate", "hello"), "give either gates=FOLDER (and sparsity=…) or mask=FILE"),
        ((*GENERATE, "prompt= "), "the prompt is empty"),
        ((*GENERATE, "pocket:resolve"), "expected pocket:TASK:NUMBER"),
        (("trian",), "unknown command 'trian': did you mean 'train'?"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    filled = [word.format(home=home, out=tmp_path) for word in words]
    assert message.format(home=home) in fails(capsys, *filled)
