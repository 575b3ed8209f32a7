"""Settings: where a value comes from, what it becomes, and what is said when it can't be meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv.config import load, save
from rlkv.errors import RLKVError
from rlkv.settings import TrainConfig
from rlkv.settings_help import settings as help_of
from rlkv.window import Window


@dataclass
class Optimiser:
    lr: float = 1e-2  # step size
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class Example:
    name: str  # required
    steps: int = 10  # how many
    rate: float = 0.5
    fast: bool = False
    mode: Literal["group", "batch"] = "group"
    window: Window = Window(4, 16)
    other: Window | None = None
    limit: int | None = 3
    amount: int | str = 0
    values: list[float] = field(default_factory=lambda: [0.25])
    names: tuple[str, ...] = ()
    where: Path = Path("here")
    free: dict[str, Any] = field(default_factory=dict)
    #: lines above,
    #: two of them
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=3e-4))


def test_words_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: from file\nsteps: 20\nrate: 1e-2\noptimiser: {betas: [0.5, 0.6]}\n")
    found = load(Example, path, ["steps=30", "optimiser.lr=2e-1"])
    assert (found.name, found.steps, found.rate, found.fast) == ("from file", 30, 0.01, False)
    assert found.optimiser == Optimiser(0.2, (0.5, 0.6))


def test_a_partly_given_nested_group_keeps_the_defaults_of_its_owner() -> None:
    assert load(Example, None, ["name=x", "optimiser.betas=0,0"]).optimiser == Optimiser(3e-4, (0.0, 0.0))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=1_000", 1000),
        ("steps=1e3", 1000),
        ("rate=3", 3.0),
        ("rate=1e-2", 0.01),
        ("fast=yes", True),
        ("fast=0", False),
        ("mode=batch", "batch"),
        ("window=0+64", Window(0, 64)),
        ("other=1+2", Window(1, 2)),
        ("other=none", None),
        ("limit=none", None),
        ("limit=7", 7),
        ("amount=7", 7),
        ("amount=much", "much"),
        ("values=0.25,0.5", [0.25, 0.5]),
        ("values=[1e-1, 2]", [0.1, 2.0]),
        ("values=1", [1.0]),
        ("values=", []),
        ("names=a,b", ("a", "b")),
        ("where=/tmp/x", Path("/tmp/x")),
        ("name=a=b", "a=b"),
        ("name=42", "42"),
        ("free={a: 1}", {"a": 1}),
    ],
)
def test_text_becomes_the_annotated_type(word: str, value: Any) -> None:
    key = word.partition("=")[0]
    found = getattr(load(Example, None, ["name=x", word]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepz=3", "unknown setting 'stepz': did you mean 'steps'?"),
        ("optimiser.rl=3", "unknown setting 'optimiser.rl': did you mean 'optimiser.lr'?"),
        ("steps=many", "setting 'steps': expected a whole number, got 'many'"),
        ("steps=1.5", "setting 'steps': expected a whole number, got '1.5'"),
        ("rate=nan", "setting 'rate': expected a finite number, got 'nan'"),
        ("rate=-inf", "setting 'rate': expected a finite number, got '-inf'"),
        ("values=0.5,1e999", "setting 'values': expected a finite number, got '1e999'"),
        ("optimiser.lr=inf", "setting 'optimiser.lr': expected a finite number, got 'inf'"),
        ("steps=nan", "setting 'steps': expected a whole number, got 'nan'"),
        ("rate=fast", "setting 'rate': expected a number, got 'fast'"),
        ("fast=maybe", "setting 'fast': expected true or false, got 'maybe'"),
        ("mode=both", "setting 'mode': expected one of group, batch, got 'both'"),
        ("window=16", "setting 'window': window: expected SINK+RECENT such as 16+64, got '16'"),
        ("window=4+0", "setting 'window': window: recent must be 1 or more"),
        ("values=0.5,x", "setting 'values': expected a number, got 'x'"),
        ("optimiser.betas=1", "setting 'optimiser.betas': expected 2 values, got 1"),
        ("steps.a=1", "setting 'steps': expected a whole number, got {'a': '1'}"),
        ("steps", "expected key=value, got 'steps'"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused_by_name(word: str, message: str) -> None:
    with pytest.raises(RLKVError) as caught:
        load(Example, None, ["name=x", word])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: yes", "setting 'steps': expected a whole number, got True"),
        ("name: no", "setting 'name': expected text, got False"),
        ("name: x\nrate: .nan", "setting 'rate': expected a finite number, got nan"),
        ("fast: 2", "setting 'fast': expected true or false, got 2"),
        ("- 1", "must hold 'key: value' lines"),
        ("a: [", "is not YAML"),
        ("steps: 3", "setting 'name' is missing: give name=…"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RLKVError) as caught:
        load(Example, path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RLKVError, match="cannot read the config file .*none.yaml: No such file"):
        load(Example, tmp_path / "none.yaml")


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Example,
        name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12),
        steps=st.integers(-(10**9), 10**9),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        fast=st.booleans(),
        mode=st.sampled_from(["group", "batch"]),
        window=st.builds(Window, st.integers(0, 99), st.integers(1, 99)),
        other=st.none() | st.builds(Window, st.integers(0, 99), st.integers(1, 99)),
        limit=st.none() | st.integers(),
        values=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
        names=st.lists(st.text("abc +-:#", min_size=1), max_size=3).map(tuple),
        where=st.text("abc/", min_size=1).map(Path),
        optimiser=st.builds(Optimiser, st.floats(0, 1)),
    )
)
def test_what_is_saved_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Example) -> None:
    path = tmp_path_factory.mktemp("round") / "deep" / "config.yaml"
    save(config, path)
    assert load(Example, path) == config


def test_help_reads_the_comments_beside_the_fields() -> None:
    rows = {row.key: row for row in help_of(Example)}
    assert (rows["name"].default, rows["name"].meaning) == ("required", "required")
    assert (rows["steps"].default, rows["steps"].meaning) == ("10", "how many")
    assert rows["limit"].kind == "a whole number or none"
    assert rows["optimiser.lr"].meaning == "step size"
    assert rows["window"].default == "4+16"


def test_every_setting_of_training_has_a_meaning() -> None:
    assert [row.key for row in help_of(TrainConfig) if not row.meaning] == []
