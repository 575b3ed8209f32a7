"""The ``rlkv`` command.

    rlkv train configs/pocket.yaml seed=2 steps=20
    rlkv rank gates/ sparsity=0.5 out=mask.json

A word that ends in .yaml is the config file, ``key=value`` (or ``--key value``) a setting, any other word the
command's subject. Bad input ends with one sentence and exit status 2, Ctrl-C with 130.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from rlkv.commands import COMMANDS
from rlkv.errors import RLKVError

T = TypeVar("T")
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)


@dataclass(frozen=True)
class Program:
    """A command line: its name, and its commands, each a module of ``package`` (see rlkv/commands)."""

    name: str
    package: str
    commands: Mapping[str, str]  # name -> summary


RLKV = Program("rlkv", "rlkv.commands", COMMANDS)


def main(arguments: Sequence[str] | None = None, program: Program = RLKV) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: dispatch(words, program))


def script(usage: str, summary: str, config: type[T], run: Callable[[T], None]) -> int:
    """A script of one command, called as ``usage`` says: its help and its errors are those of ``rlkv``."""
    command = SimpleNamespace(Config=config, POSITIONAL="", run=run)
    return guarded(lambda: run_command(sys.argv[1:], usage, summary, command))


def guarded(work: Callable[[], int]) -> int:
    """The exit status of ``work``; a mistake of the user ends with one sentence."""
    # Threads that spin at barriers stall each other when others use the cores too; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return work()
    except RLKVError as error:
        complain(f"error: {error}", colour=31)
        return 2
    except KeyboardInterrupt:
        complain("interrupted", colour=33)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as with `rlkv eval … | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a path that can't be written, a full disk, a server that does not answer
        reason = error.strerror or str(error) or type(error).__name__
        complain(f"error: {error.filename}: {reason}" if error.filename else f"error: {reason}", colour=31)
        return 2


def dispatch(words: list[str], program: Program) -> int:
    """Find the command among ``words`` and run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(program))
        return 0
    name = "version" if words[0] in ("-V", "--version") else words[0]
    if name not in program.commands:
        from rlkv.config import unknown_key

        raise RLKVError(unknown_key(name, list(program.commands)).replace("setting", "command"))
    command = importlib.import_module(f"{program.package}.{name.replace('-', '_')}")
    return run_command(words[1:], f"{program.name} {name}", program.commands[name], command)


def run_command(words: list[str], usage: str, summary: str, command: Any) -> int:
    """Run a command (see rlkv/commands) with its words, or print its help if they ask for it."""
    if any(word in ("-h", "--help") for word in words):
        print(command_help(usage, summary, command))
        return 0
    from rlkv.config import load

    path, overrides = read_words(words, command.POSITIONAL)
    return command.run(load(command.Config, path, overrides)) or 0


def read_words(words: list[str], positional: str) -> tuple[str | None, list[str]]:
    """Split the words after the command into (config file, ``key=value`` settings)."""
    path, overrides, subject = None, [], None
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                if not queue:
                    raise RLKVError(f"{word} needs a value: {word} VALUE or {key}=VALUE")
                value = queue.pop(0)
            overrides.append(f"{key.replace('-', '_')}={value}")
        elif ASSIGNMENT.match(word):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            if path is not None:
                raise RLKVError(f"two config files: {path} and {word}; give one")
            path = word
        elif positional and subject is None:
            subject = word
            overrides.insert(0, f"{positional}={word}")
        else:
            raise RLKVError(f"don't know what to do with {word!r}: settings are written key=value")
    return path, overrides


def overview(program: Program) -> str:
    """``rlkv --help``."""
    width = max(map(len, program.commands)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in program.commands.items()]
    head = f"usage: {program.name} COMMAND [CONFIG.yaml] [key=value ...]\n\ncommands:"
    return "\n".join([head, *lines, "", f"{program.name} COMMAND --help lists every setting of a command."])


def command_help(usage: str, summary: str, command: Any) -> str:
    """A command's help: every setting with its type, default and meaning."""
    from rlkv.settings_help import settings

    subject = f" [{command.POSITIONAL.upper()}]" if command.POSITIONAL else ""
    lines = [
        f"usage: {usage} [CONFIG.yaml]{subject} [key=value ...]",
        "",
        f"{usage}: {summary}",
    ]
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    rows = settings(command.Config)
    if rows:
        lines += ["", "settings (default):"]
    for row in rows:
        lines.append(f"  {row.key}={row.default}  [{row.kind}]")
        lines += textwrap.wrap(row.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def complain(text: str, colour: int) -> None:
    """One line on stderr, in colour on a terminal."""
    line = " ".join(text.split())
    print(f"\033[{colour}m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
