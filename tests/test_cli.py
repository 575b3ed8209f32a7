"""The command line: words, exit codes, and one clear sentence for each kind of bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_kit import EVAL, GENERATE, TRAIN, fails, save_home

from rlkv import __version__
from rlkv.cli import main, read_words
from rlkv.commands import COMMANDS
from rlkv.data import PromptSet
from rlkv.errors import RLKVError
from rlkv.learner import Learner, Sample
from rlkv.mask import HeadMask
from rlkv.rank import format_bytes
from rlkv.window import Window

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("cli"))


def test_words_are_sorted_into_config_subject_and_settings() -> None:
    assert read_words(["a.yaml", "x=1", "y=a=b"], "") == ("a.yaml", ["x=1", "y=a=b"])
    assert read_words(["gates/x", "x=1"], "gates") == (None, ["gates=gates/x", "x=1"])
    assert read_words(["--max-loss", "0.02", "--model=pocket"], "") == (
        None,
        ["max_loss=0.02", "model=pocket"],
    )
    assert read_words(["x=1", "subject"], "s") == (None, ["s=subject", "x=1"])
    with pytest.raises(RLKVError, match="two config files"):
        read_words(["a.yaml", "b.yml"], "")


def test_eval_prints_the_table_and_writes_the_folder(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(home=home, out=tmp_path) for word in EVAL]
    assert main([*words, "sparsities=0.5", "random_masks=2", "reward=tiny_folder:parity"]) == 0
    printed = capsys.readouterr().out
    assert "full cache" in printed and "random (mean of 2)" in printed and "RLKV" in printed
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"config.yaml", "rows.jsonl", "results.json", "table.md", "accuracy_kv.png", "masks"}
    assert json.loads((tmp_path / "results.json").read_text())["problems"] == 5


@pytest.mark.parametrize(
    "command", [(*EVAL, "sparsities=0.5", "random_masks=1", "reward=exact"), (*GENERATE, "prompt=ab")]
)
def test_a_window_without_sink_is_fine_and_another_than_trained_is_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    words = [word.format(home=home, out=tmp_path) for word in command]
    assert main([*words, "window=0+5"]) == 0
    printed = capsys.readouterr().out
    assert "gates trained with window 2+6 are used with 0+5" in printed and "window 0+5" in printed


def test_collect_keeps_what_the_pocket_model_solves(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [vars(problem) for problem in PromptSet.from_pocket("recall", "train", 6).problems]
    rows[2]["answer"] = "unheard-of"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=pocket", f"data={tmp_path}/in.jsonl", f"output={tmp_path}", "reward=exact", "device=cpu"]
    words += ["prompt_column=prompt", "prompt_template={prompt}", "dtype=float32"]
    words += ["bucket_edges=0,64,1024", "bucket_counts=3,3"]
    assert main(["collect", *words]) == 0
    assert "SHORTFALL: 0 of 3 training problems with 64-1024 tokens" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and {row["id"] for row in kept} <= {row["id"] for row in rows} - {rows[2]["id"]}
    assert PromptSet.from_jsonl(tmp_path / "train.jsonl").problems[0].answer == kept[0]["answer"]


def test_waiting_threads_yield_unless_the_user_says_otherwise() -> None:
    code = "import os, rlkv.cli; rlkv.cli.main(['version']); print(os.environ['OMP_WAIT_POLICY'])"
    bare = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for more, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**bare, **more}
        )
        assert found.stdout.split()[-1] == policy


def test_rank_writes_the_mask_that_the_sentence_describes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "mask.json"
    assert main(["rank", f"{home}/gates", "sparsity=0.5", f"output={path}", "length=100"]) == 0
    printed = capsys.readouterr().out
    mask = HeadMask.load(path)
    assert f"sparsity {mask.sparsity:.3f} (asked for 0.5)" in printed
    assert mask.window == Window(2, 6) and mask.sparsity == pytest.approx(5 / 9)
    assert f"full heads a layer: {' '.join(map(str, mask.per_layer()))}" in printed


def test_rank_by_memory_takes_the_fewest_local_heads_that_fit(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    a_token = 2 * 8 * 4  # key and value, head_dim, float32
    budget = (6 * 100 + 3 * 8) * a_token
    for spare, local in ((0, 3), (-1, 4)):
        words = [f"memory={budget + spare}", "length=100", "bytes_per_value=4", f"output={path}"]
        assert main(["rank", f"{home}/gates", *words]) == 0
        assert int((~HeadMask.load(path).full).sum()) == local


def test_rank_takes_the_shape_of_a_bare_table_from_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "adapter_weights.tsv"
    table.write_text(
        "\n".join("\t".join(str((16 * row + column) / 96) for column in range(16)) for row in range(6))
    )
    words = ["memory=8MiB", "length=512", "batch=8", "window=4+16", f"output={tmp_path}/mask.json"]
    assert "no model is named: give model=" in fails(capsys, "rank", str(table), *words)
    assert main(["rank", str(table), *words, "model=pocket"]) == 0
    mask = HeadMask.load(tmp_path / "mask.json")
    assert mask.kv_bytes(512, 8) <= 8 * 2**20 < mask.full_bytes(512, 8)


def test_rank_by_loss_answers_development_problems(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={home}/dev.jsonl", "max_new_tokens=8", "reward=tiny_folder:parity", "device=cpu"]
    assert main(["rank", f"{home}/gates", "max_loss=1", *words, f"output={tmp_path}/mask.json"]) == 0
    assert "loses at most 100.0% on the dev split" in capsys.readouterr().out
    assert HeadMask.load(tmp_path / "mask.json").sparsity == pytest.approx(8 / 9)  # all that was tried fits


def test_generate_reports_the_bytes_of_the_cache(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("search " + "ab=12;" * 20)
    words = [word.format(home=home) for word in GENERATE]
    assert main([*words, f"@{tmp_path}/prompt.txt", "sparsity=1", "max_new_tokens=60"]) == 0
    printed = capsys.readouterr().out
    assert "9 of 9 KV heads local, window 2+6" in printed
    assert "search ab=12;" in printed
    # 9 heads x 8 tokens x (key and value of 8 float32 values)
    assert "the cache keeps 4.5 KiB for" in printed and "tokens, is 4.5 KiB (measured)" in printed


def test_generate_compares_tokens_with_tokens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Storage in blocks is another number: a short answer's is larger than the full cache by tokens."""
    words = [word.format(home=home) for word in GENERATE]
    assert main([*words, "prompt=ab", "sparsity=0"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    held = int(re.search(r"for (\d+) tokens", said)[1])  # type: ignore[index]
    size = format_bytes(9 * held * 64)
    assert held < 64 and f"keeps {size} for {held} tokens, 100% of the full cache's {size}; " in said
    assert said.endswith("in blocks of 64 tokens, is 36 KiB (measured)")


def test_help_needs_no_torch_and_lists_every_command() -> None:
    code = "import sys, rlkv.cli; rlkv.cli.main(['--help']); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in found.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_explains_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: rlkv {name}") and COMMANDS[name] in printed
    lines = printed.splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert all(lines[index + 1 : index + 2] and lines[index + 1].startswith("      ") for index in heads)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["version"], ["--version"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"rlkv {__version__}\n"


def test_a_real_process_exits_with_2_and_no_traceback(home: Path) -> None:
    command = [sys.executable, "-m", "rlkv.cli", "rank", f"{home}/none", "sparsity=0.5"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert found.returncode == 2
    assert "Traceback" not in found.stderr and found.stderr.count("\n") == 1


def test_ctrl_c_in_training_saves_and_stops_a_script(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(home=home, out=tmp_path) for word in TRAIN]
    words += ["prompts_per_step=2", "steps=3", "validate_every=0", "tensorboard=false"]
    update = Learner.update

    def interrupted(self: Learner, samples: list[list[Sample]], step: int) -> dict[str, float]:
        if step == 1:
            raise KeyboardInterrupt
        return update(self, samples, step)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", interrupted)
        assert main(words) == 130
    captured = capsys.readouterr()
    assert f"saved in {tmp_path}/checkpoints/step-000001.pt" in captured.out
    assert captured.err.splitlines()[-1] == "interrupted"
    assert main([*words, "resume=true"]) == 0
    assert "Going on after step 1." in capsys.readouterr().out


def test_a_mask_used_with_another_window_is_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", f"{home}/gates", "sparsity=0.5", f"output={tmp_path}/mask.json"]) == 0
    words = [f"mask={tmp_path}/mask.json", "max_new_tokens=4", "device=cpu", "prompt=ab", "window=0+5"]
    assert main(["generate", *words]) == 0
    assert "WARNING: a mask made for window 2+6 is used with 0+5." in capsys.readouterr().out


def test_ctrl_c_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlkv.commands.version.run", interrupt)
    assert main(["version"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
