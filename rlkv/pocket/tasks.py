"""Four tasks with verifiable answers: three that need a long thought, one that is pure retrieval.

Every generator draws a problem and writes the one correct thought for it, so that a small model can learn to
reason by imitation and every step can be checked. The generators share nothing but the random source. Numbers
are two digits, modulo 100.

resolve   shuffled definitions; look each one up from the target down, compute back up, then check every step
search    a tree given as shuffled child lists; walk it depth first with the stack written out, then trace the path back
ledger    a list of labelled additions and subtractions; run it forward, then undo it to zero as a check
recall    shuffled key-value pairs; answer one key at once, without thinking
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

REASONING = ("resolve", "search", "ledger")
TASKS = (*REASONING, "recall")
SPLITS = {"train": range(0, 90), "dev": range(90, 95), "test": range(95, 100)}


@dataclass(frozen=True)
class Example:
    """A problem with its worked solution: ``thought`` is empty for recall."""

    prompt: str
    thought: str
    answer: str
    task: str

    @property
    def id(self) -> str:
        """The hash of the prompt, which also decides the split."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """train (90 %), dev (5 %) or test (5 %), by the prompt's hash: no problem is in two splits."""
        bucket = int(self.id, 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def apply(value: int, sign: str, amount: int) -> int:
    """One step of arithmetic modulo 100."""
    return (value + amount if sign == "+" else value - amount) % 100


def resolve(rng: random.Random) -> Example:
    """A chain of 9 to 11 definitions, each naming the next, among 2 to 5 that do not matter."""
    depth, extra = rng.randint(9, 11), rng.randint(2, 5)
    names = rng.sample(string.ascii_lowercase, depth + extra)
    chain, others = names[:depth], names[depth:]
    steps = {name: (rng.choice("+-"), rng.randrange(1, 100)) for name in names}
    base = rng.randrange(100)
    definitions = [f"{chain[-1]}={base:02}"]
    for name, source in zip(chain[:-1], chain[1:], strict=True):
        definitions.append(f"{name}={source}{steps[name][0]}{steps[name][1]:02}")
    for name in others:
        source = rng.choice([other for other in names if other != name])
        definitions.append(f"{name}={source}{steps[name][0]}{steps[name][1]:02}")
    down = [*definitions[1:depth], definitions[0]]
    values, up, check = {chain[-1]: base}, [definitions[0]], []
    for name, source in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
        sign, amount = steps[name]
        values[name] = apply(values[source], sign, amount)
        up.append(f"{name}={values[source]:02}{sign}{amount:02}={values[name]:02}")
    for name, source in zip(chain[:-1], chain[1:], strict=True):
        sign, amount = steps[name]
        check.append(f"{name}:{source}{sign}{amount:02},{values[source]:02}{sign}{amount:02}={values[name]:02}")
    thought = ";".join(down) + "\n" + ";".join(up) + "\n" + ";".join(check)
    rng.shuffle(definitions)
    return Example(f"resolve {';'.join(definitions)}?{chain[0]}", thought, f"{values[chain[0]]:02}", "resolve")


def search(rng: random.Random) -> Example:
    """A random tree of 31 to 35 nodes with at most 3 children each, walked depth first to the end."""
    count = rng.randint(31, 35)
    names = rng.sample(string.ascii_letters, count)
    children: dict[str, list[str]] = {name: [] for name in names}
    parent: dict[str, str] = {}
    for index, name in enumerate(names[1:], start=1):
        open_nodes = [other for other in names[max(0, index - 8) : index] if len(children[other]) < 3]
        parent[name] = rng.choice(open_nodes)
        children[parent[name]].append(name)
    root, steps, stack = names[0], [], [names[0]]
    while stack:
        node = stack.pop(0)
        stack = children[node] + stack
        steps.append(f"{node}:{''.join(children[node]) or '.'}|{''.join(stack)}")
    path = [rng.choice(names[count // 2 :])]
    while path[-1] != root:
        path.append(parent[path[-1]])
    back = ";".join(f"{child}<{above}" for child, above in zip(path[:-1], path[1:], strict=True))
    thought = ";".join(steps) + "\n" + back
    if len(thought) > 450:  # a rare tree with a long stack: keep every example within the pretraining width
        return search(rng)
    lists = [f"{name}>{''.join(children[name]) or '.'}" for name in names]
    rng.shuffle(lists)
    return Example(f"search {';'.join(lists)}?{root}{path[0]}", thought, "".join(reversed(path)), "search")


def ledger(rng: random.Random) -> Example:
    """14 to 16 labelled entries, in order; the balance starts at 0."""
    labels = string.ascii_uppercase[: rng.randint(14, 16)]
    entries = [(label, rng.choice("+-"), rng.randrange(1, 100)) for label in labels]
    balance, forward = 0, []
    for label, sign, amount in entries:
        before, balance = balance, apply(balance, sign, amount)
        forward.append(f"{label}:{before:02}{sign}{amount:02}={balance:02}")
    answer, backward = balance, []
    for label, sign, amount in reversed(entries):
        undo = "-" if sign == "+" else "+"
        before, balance = balance, apply(balance, undo, amount)
        backward.append(f"{label}:{before:02}{undo}{amount:02}={balance:02}")
    prompt = "ledger " + ";".join(f"{label}{sign}{amount:02}" for label, sign, amount in entries) + "?"
    return Example(prompt, ";".join(forward) + "\n" + ";".join(backward), f"{answer:02}", "ledger")


def recall(rng: random.Random) -> Example:
    """30 to 44 pairs of a letter and a two-digit value."""
    values = {key: f"{rng.randrange(100):02}" for key in rng.sample(string.ascii_letters, rng.randint(30, 44))}
    key = rng.choice(list(values))
    return Example("recall " + ";".join(f"{k}={v}" for k, v in values.items()) + f"?{key}", "", values[key], "recall")


GENERATORS: dict[str, Callable[[random.Random], Example]] = {
    "resolve": resolve,
    "search": search,
    "ledger": ledger,
    "recall": recall,
}


def examples(task: str, split: str, seed: int = 0) -> Iterator[Example]:
    """An endless stream of distinct examples of one task and split, the same for the same seed."""
    rng, seen = random.Random(f"{task}/{split}/{seed}"), set()
    while True:
        example = GENERATORS[task](rng)
        if example.split == split and example.id not in seen:
            seen.add(example.id)
            yield example
