"""Four tasks with verifiable answers: three that need a long thought, one that is pure retrieval.

Every generator draws a problem and writes the one correct thought for it, so that a small model can learn to
reason by imitation and every step can be checked. The generators share nothing but the random source. Numbers
are two digits, modulo 100.

resolve   shuffled definitions; look each one up from the target down, compute back up, then check every step
search    a tree as shuffled child lists; walk it depth first, stack written out, then trace the path back
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


def work(value: int, sign: str, amount: int) -> str:
    """One step as a thought writes it: the last digit of the result first, since it decides the carry."""
    result = apply(value, sign, amount)
    return f"{value:02}{sign}{amount:02}={result % 10}:{result:02}"


def resolve(rng: random.Random) -> Example:
    """A chain of 8 to 10 definitions, each naming the next, among 2 to 5 that do not matter."""
    depth, extra = rng.randint(8, 10), rng.randint(2, 5)
    names = rng.sample(string.ascii_lowercase, depth + extra)
    chain, others = names[:depth], names[depth:]
    steps = {name: (rng.choice("+-"), rng.randrange(1, 100)) for name in names}
    base = rng.randrange(100)
    source = dict(zip(chain[:-1], chain[1:], strict=True))
    source |= {name: rng.choice([other for other in names if other != name]) for name in others}
    define = {name: f"{name}={source[name]}{steps[name][0]}{steps[name][1]:02}" for name in source}
    define[chain[-1]] = f"{chain[-1]}={base:02}"
    values, up = {chain[-1]: base}, [define[chain[-1]]]
    for name in reversed(chain[:-1]):
        up.append(f"{name}={work(values[source[name]], *steps[name])}")
        values[name] = apply(values[source[name]], *steps[name])
    check = [f"{define[name]},{work(values[source[name]], *steps[name])}" for name in chain[:-1]]
    thought = "\n".join(";".join(part) for part in ([define[name] for name in chain], up, check))
    shuffled = list(define.values())
    rng.shuffle(shuffled)
    return Example(f"resolve {';'.join(shuffled)}?{chain[0]}", thought, f"{values[chain[0]]:02}", "resolve")


def search(rng: random.Random) -> Example:
    """A random tree of 33 to 37 nodes with at most 2 children each, walked depth first to the end."""
    count = rng.randint(33, 37)
    names = rng.sample(string.ascii_letters, count)
    children: dict[str, list[str]] = {name: [] for name in names}
    parent: dict[str, str] = {}
    for index, name in enumerate(names[1:], start=1):
        open_nodes = [other for other in names[max(0, index - 8) : index] if len(children[other]) < 2]
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
    """12 to 14 labelled entries, in order; the balance starts at 0."""
    labels = string.ascii_uppercase[: rng.randint(12, 14)]
    entries = [(label, rng.choice("+-"), rng.randrange(1, 100)) for label in labels]
    balance, forward = 0, []
    for label, sign, amount in entries:
        forward.append(f"{label}:{work(balance, sign, amount)}")
        balance = apply(balance, sign, amount)
    answer, backward = balance, []
    for label, sign, amount in reversed(entries):
        undo = "-" if sign == "+" else "+"
        backward.append(f"{label}:{work(balance, undo, amount)}")
        balance = apply(balance, undo, amount)
    prompt = "ledger " + ";".join(f"{label}{sign}{amount:02}" for label, sign, amount in entries) + "?"
    return Example(prompt, ";".join(forward) + "\n" + ";".join(backward), f"{answer:02}", "ledger")


def recall(rng: random.Random) -> Example:
    """30 to 44 pairs of a letter and a two-digit value."""
    values = {
        key: f"{rng.randrange(100):02}" for key in rng.sample(string.ascii_letters, rng.randint(30, 44))
    }
    key = rng.choice(list(values))
    return Example(
        "recall " + ";".join(f"{k}={v}" for k, v in values.items()) + f"?{key}", "", values[key], "recall"
    )


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
