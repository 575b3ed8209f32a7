"""Programs graded: the block that is taken, honest code, and code that tries to pass without solving."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlkv.errors import RLKVError
from rlkv_eval.graders.base import grade, preflight
from rlkv_eval.graders.code import find_code, run_tests
from rlkv_eval.sandbox import Limits, check
from rlkv_eval.sandbox.inner import wire
from rlkv_eval.tasks import Item, get_task
from rlkv_eval.tasks.mbpp import defined_names

SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
MBPP = SHARED / "benchmarks" / "mbpp" / "mbpp_test.jsonl"
TESTS = ["assert double(2) == 4", "assert double([1]) == [1, 1]", "assert double('ab') == 'abab'"]
ITEM = Item("t-1", "Double it.", "1", "mbpp", {"tests": TESTS, "names": ["double"], "setup": ""})


@pytest.fixture(scope="module", autouse=True)
def contained() -> None:
    try:
        check()
    except RLKVError as error:
        pytest.skip(str(error))


def answer(code: str) -> str:
    return f"thinking ```python\nwrong\n``` more</think>Here it is:\n\n```python\n{code}\n```\nDone."


def verdict(code: str, item: Item = ITEM) -> Any:
    return grade("code", item, answer(code), True)


@pytest.mark.parametrize(
    ("text", "code", "rule"),
    [
        ("<think>a</think>```python\nx = 1\n```", "x = 1\n", "python block"),
        ("</think>```py\na\n```\ntext\n```python\nb\n```", "b\n", "python block"),
        ("</think>```python\na\n```\n```text\nb\n```\n```\nc\n```", "a\n", "python block"),
        ("</think>```\na\n```\n```output\nb\n```", "a\n", "unmarked block"),
        ("</think>```Python3\na\n", "a\n", "python block"),
        (
            "</think>1. so:\n   ```python\n   def f():\n       return 1\n   ```",
            "def f():\n    return 1\n",
            "python block",
        ),
        ("</think>~~~python\na\n~~~", "a\n", "python block"),
        ("</think>```python\na\n```python\nb\n```", "b\n", "python block"),
        ("```python\na\n``` and on", "a\n", "python block"),
        ("```python\na\n```</think>no code", "a\n", "whole text: python block"),
        ("</think>```python\n\n```\n```python\na\n```\n```python\n```", "a\n", "python block"),
        ("</think>```bash\npip install x\n```", None, "none"),
        ("</think>just text", None, "none"),
    ],
)
def test_which_block_is_taken(text: str, code: str | None, rule: str) -> None:
    assert find_code(text) == (code, rule)


def test_right_code() -> None:
    found = verdict("def double(x):\n    return x + x")
    assert (found.kind, found.score, found.rule) == ("correct", 1.0, "python block")
    assert found.extracted == "def double(x):\n    return x + x\n" and found.reason == "all 3 asserts hold"


def test_no_code_is_no_answer_and_truncated_is_truncated() -> None:
    assert grade("code", ITEM, "</think>I don't know.", True).kind == "no_answer"
    assert grade("code", ITEM, answer("def double(x): return x + x"), False).kind == "truncated"


WRONG = {
    "a wrong value": ("def double(x): return x", "assert 1 of 3 does not hold: assert double(2) == 4"),
    "only the first": ("def double(x): return 4", "assert 2 of 3 does not hold"),
    "raises": ("def double(x): return x / 0", "assert 1 of 3 raised ZeroDivisionError: division by zero"),
    "no such function": ("def duoble(x): return x + x", "raised NameError: the code does not define double"),
    "no Python": ("def double(x) return x", "running the code raised SyntaxError"),
    "raises at import": ("import numpy_of_old", "running the code raised ModuleNotFoundError"),
    "waits for input": ("n = input()", "running the code raised EOFError"),
    "endless recursion": ("def double(x): return double(x)", "raised RecursionError"),
    "too much memory": ("def double(x): return ' ' * (10 << 30)", "raised MemoryError"),
    "a huge value": ("def double(x): return ' ' * (100 << 20)", "ValueError: a value takes more than"),
    "a value that holds itself": (
        "def double(x):\n    a = []\n    a.append(a)\n    return a",
        "RecursionError",
    ),
    "crashes": ("import ctypes\ndef double(x): ctypes.string_at(0)", "the code ended its process"),
}
CHEATS = {
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit in the function": "import sys\ndef double(x): sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the function": "import os\ndef double(x): os._exit(0)",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef double(x): return A()",
    "a list equal to everything": "class A(list):\n    def __eq__(self, other): return True\n"
    "def double(x): return A()",
    "own builtins": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
    "builtins.all = lambda *a: True\ndef double(x): return 0",
    "disabled asserts": "import builtins, sys\nbuiltins.__debug__ if False else None\nsys.flags\n"
    "sys.settrace(lambda *a: None)\ndef double(x): return None",
    "patched runner": "import gc, sys\nfor m in list(sys.modules.values()):\n"
    "    for n in ('pack', 'send', 'main'):\n"
    "        if hasattr(m, n): setattr(m, n, lambda *a: True)\ndef double(x): return 0",
    "the verdict, on every file": "import os\nfor fd in range(3, 64):\n"
    '    try: os.write(fd, b\'["correct", 3, ""]\')\n'
    "    except OSError: pass\ndef double(x): return 0",
    "the verdict, printed": 'print(\'["correct", 3, ""]\', flush=True)\ndef double(x): return 0',
    "garbage frames": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\0\\0\\0\\2{}' * 9)\n"
    "    except OSError: pass\ndef double(x): return 0",
    "deep frames": "import os\nb = b'[' * 200000\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, len(b).to_bytes(4, 'big') + b)\n"
    "    except OSError: pass\ndef double(x): return 0",
    "expected values from memory": "import gc\ndef double(x):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, str) and 'assert double' in o: return eval(o.split('==')[1])\n    return 0",
    "an exception of its own": "class E(BaseException): pass\ndef double(x): raise E",
    "an exception without a text": "class E(Exception):\n"
    "    def __str__(self): raise E\ndef double(x): raise E",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef double(x): return 0",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_code(name: str) -> None:
    code, reason = WRONG[name]
    found = verdict(code)
    assert found.kind == "wrong" and found.score == 0 and reason in found.reason, found


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkv_eval.graders.code.LIMITS", Limits(seconds=4))
    assert verdict(CHEATS[name]).kind == "wrong"


def test_the_runner_goes_on_after_every_attack() -> None:
    """Each is graded, with its reason, and honest code is right in between."""
    limits = Limits(seconds=1, disk=1 << 20)
    attacks = {
        "while True: pass": "did not end within 1 s",
        "def double(x):\n    while True: pass": "did not end within 1 s",
        "import time\ntime.sleep(1000)": "did not end within 1 s",
        "import os\nwhile True: os.fork()": "Operation not permitted",
        "import os\nos.kill(os.getppid(), 9)": "Operation not permitted",
        "import socket\nsocket.create_connection(('1.1.1.1', 53))": "PermissionError",
        "open('/etc/passwd')": "Error",
        "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))": "",
        "while True: print('x' * 10000)": "did not end within 1 s",
    }
    for code, reason in attacks.items():
        kind, said = run_tests(code, TESTS, ["double"], limits=limits)
        assert kind == "wrong" and reason in said, (code, said)
    assert run_tests("def double(x): return x + x", TESTS, ["double"])[0] == "correct"


def test_a_function_named_like_a_builtin() -> None:
    """The task's own name is the code's; any other builtin is the judge's, whatever the code defines."""
    code = "def sum(a, b): return a * b\ndef set(x): return 1"
    assert run_tests(code, ["assert sum(2, 5) == 10"], ["sum"])[0] == "correct"
    assert run_tests(code, ["assert set(sum([1], 2)) == set([7])"], ["sum"])[0] == "wrong"


def test_values_keep_their_types() -> None:
    """What a test can tell apart in one process it can tell apart across two."""
    values = [
        "None", "True", "-7", "10**50", "1.5", "float('inf')", "1e-320",
        "'ü\\ud800'", "b'a\\0'", "bytearray(b'x')",
        "1+2j", "[1, [2]]", "(1,)", "{1, 2}", "frozenset({1})", "{(1, 2): [3]}", "range(3)",
        "{1: 2}.keys()", "{1: 2}.items()",
        "__import__('collections').deque([1])", "__import__('decimal').Decimal('1.10')",
        "__import__('fractions').Fraction(1, 3)", "__import__('array').array('i', [1])",
    ]  # fmt: skip
    code = "def f(): return [" + ", ".join(values) + "]"
    tests = [f"assert type(f()[{i}]) is type({v}) and f()[{i}] == {v}" for i, v in enumerate(values)]
    assert run_tests(code, tests, ["f"], limits=Limits(seconds=20)) == (
        "correct",
        f"all {len(tests)} asserts hold",
    )


def test_subclasses_iterators_and_objects() -> None:
    code = (
        "from collections import Counter, namedtuple, OrderedDict\nP = namedtuple('P', 'x y')\n"
        "class Node:\n    def __init__(self, v): self.v = v\n    def up(self, by=1): return self.v + by\n"
        "def f(): return [Counter('aab'), P(1, 2), OrderedDict(a=1)]\n"
        "def g(n): return (i * i for i in range(n))\ndef same(n): return n\ndef value(n): return n.v\n"
    )
    tests = [
        "assert f() == [{'a': 2, 'b': 1}, (1, 2), {'a': 1}]",
        "assert list(g(4)) == [0, 1, 4, 9] and g(2) != [0, 1]",
        "assert value(Node(3)) == 3 and Node(3).v == 3 and Node(3).up(by=4) == 7",
        "assert same(root) == root and value(root) == 9 and Node(9) != root",
        "assert sorted(g(3), key=lambda square: -square) == [4, 1, 0]",
        "assert math.isclose(value(Node(0.1 + 0.2)), 0.3)",
    ]
    names = ["f", "g", "same", "value", "Node"]
    assert run_tests(code, tests, names, "root = Node(9)") == ("correct", "all 6 asserts hold")


def test_a_test_that_cannot_be_asked_is_an_error_of_the_grader() -> None:
    item = Item("t", "", "", "mbpp", {"tests": ["assert f(lambda x: x) == 1"], "names": ["f"]})
    found = verdict("def f(g): return g(1)", item)
    assert found.kind == "grader_error" and "hands over a function" in found.reason


def test_verdicts_do_not_depend_on_hash_seeds() -> None:
    code = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"
    first = run_tests(code, ["assert f() == 0"], ["f"])
    found = [
        run_tests(code + "\nassert f() == " + repr(order), ["assert True"])[0] for order in seen_orders(code)
    ]
    assert first[0] == "wrong" and found == ["correct"] * 3


def seen_orders(code: str) -> list[list[str]]:
    from rlkv_eval.sandbox import run

    return [json.loads(run(f"import json\n{code}\nprint(json.dumps(f()))").stdout) for _ in range(3)]


def test_frames_are_bounded() -> None:
    reads, writes = os.pipe()
    os.write(writes, (wire.MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(wire.Closed):
        wire.receive(reads)
    os.close(writes)
    with pytest.raises(wire.Closed):
        wire.receive(reads)
    os.close(reads)


@pytest.mark.parametrize(
    "data",
    [["int", 5], ["set", [["list", []]]], ["eval", "1"], ["list"], ["range", [1, 2, 0]], ["Decimal", "x"]],
)
def test_broken_values_are_refused(data: Any) -> None:
    with pytest.raises(wire.Closed):
        wire.unpack(data, lambda number: number)


def test_preflight_refuses_without_containment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[str, ...]:
        raise RLKVError("sandbox: cannot")

    monkeypatch.setattr("rlkv_eval.sandbox.check", refuse)
    with pytest.raises(RLKVError, match="sandbox: cannot"):
        preflight(["code"])


def test_mbpp_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Add.", "test": ["assert add(1, 2) == 3"], "task_id": 11},
        {"text": "Add {x}.", "test_list": ["assert a(1)"], "test_setup_code": "y = 1", "task_id": 12},
    ]
    rows[0]["code"], rows[1]["code"] = "def add(a, b):\r\n    return a + b", "z = 1\nclass A: pass"
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = get_task("mbpp").load(tmp_path)
    assert (first.id, first.answer) == ("mbpp-11", "11")
    assert (
        "Add." in first.prompt
        and "assert add(1, 2) == 3" in first.prompt
        and "return a + b" not in first.prompt
    )
    assert first.extra == {"tests": ["assert add(1, 2) == 3"], "names": ["add"], "setup": ""}
    assert (
        "Add {x}." in second.prompt
        and second.extra["names"] == ["z", "A"]
        and second.extra["setup"] == "y = 1"
    )
    assert grade("code", first, "</think>```python\ndef add(a, b): return b + a\n```", True).kind == "correct"


def test_names_of_a_program() -> None:
    assert defined_names("import re\nx = 1\ndef f(): y = 2\nasync def g(): pass\nclass C: pass") == [
        "x",
        "f",
        "g",
        "C",
    ]
    assert defined_names("def f(:") == []


def mbpp() -> list[dict[str, Any]]:
    if not MBPP.is_file():
        pytest.skip(f"{MBPP} is not here; set RLKV_SHARED_DATA")
    return [json.loads(line) for line in MBPP.read_text().splitlines()]


def failures(rows: list[dict[str, Any]]) -> list[int]:
    found = []
    for row in rows:
        kind, _ = run_tests(row["code"], row["test"], defined_names(row["code"]), limits=Limits(seconds=30))
        found += [row["task_id"]] if kind != "correct" else []
    return found


def test_some_reference_solutions_pass() -> None:
    assert failures(mbpp()[::50]) == []


@pytest.mark.slow
def test_all_reference_solutions_pass() -> None:
    """All but task 367, whose asserts name trees that no line of the file makes."""
    started = time.monotonic()
    rows = mbpp()
    assert len(rows) == 500 and failures(rows) == [367]
    print(f"{len(rows)} in {time.monotonic() - started:.0f} s")
