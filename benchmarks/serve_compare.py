"""Arms of serve_sglang.py side by side: stock SGLang and head masks, taking turns at the same works.

    python benchmarks/serve_compare.py arms=stock,0,0.5 works=alone:3,ample:3,load out=runs/serve gates=G ...

All engines are up while one is measured (an idle one holds memory and nothing else), so that a drift of the
machine meets every arm; `together=false` starts them one after the other where memory is short. `alone:3` is
three turns. What is not named here goes to serve_sglang.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from serve_table import print_table

OWN = {
    "arms": "stock,0.5",
    "works": "alone,ample",
    "together": "true",
    "out": "runs/efficiency",
    "limit": "600",  # seconds, of one work
}
SCRIPT = str(Path(__file__).with_name("serve_sglang.py"))


class Arm:
    """An engine in a process of its own: "stock", or a sparsity."""

    def __init__(self, name: str, settings: list[str], folder: Path) -> None:
        arm = ["arm=stock"] if name == "stock" else ["arm=rlkv", f"sparsity={name}"]
        kept = [word for word in settings if name != "stock" or not word.startswith("gates=")]
        self.name, self.log = name, folder / f"{name}.log"
        command = [sys.executable, "-u", SCRIPT, *arm, "listen=true", f"out={folder / name}.json", *kept]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
            )

    def wait(self, word: str, count: int, seconds: float) -> str:
        """The ``count``-th line of the log that begins with ``word``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lines = [one for one in self.log.read_text(errors="replace").splitlines() if one.startswith(word)]
            if len(lines) >= count:
                return lines[count - 1]
            if self.process.poll() is not None:
                sys.exit(f"arm {self.name} ended with {self.process.returncode}: see {self.log}")
            time.sleep(0.2)
        sys.exit(f"arm {self.name}: no {word} within {seconds:.0f} s: see {self.log}")

    def do(self, work: str, count: int, seconds: float) -> None:
        assert self.process.stdin is not None
        print(work, file=self.process.stdin, flush=True)
        print(f"{self.name:>6}  {self.wait('RESULT', count, seconds)[7:160]}", flush=True)

    def end(self) -> None:
        """It writes its file when nothing more is asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def turns(arms: list[Arm], works: list[str], limit: float) -> None:
    """Every work of every arm; every other time in the opposite order."""
    for arm in arms:
        arm.wait("READY", 1, 600)
    for count, work in enumerate(works, 1):
        for arm in arms if count % 2 else arms[::-1]:
            arm.do(work, count, limit)
    for arm in arms:
        arm.end()


def main() -> None:
    """Run everything, write <out>/<arm>.json, print the table."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    own = {name: words.pop(name, value) for name, value in OWN.items()}
    folder, names = Path(own["out"]), own["arms"].split(",")
    turns_of = {
        work: int(turns or 1) for work, _, turns in (w.partition(":") for w in own["works"].split(","))
    }
    works = [work for work, count in turns_of.items() for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"{name}={value}" for name, value in words.items()] + [f"works={','.join(turns_of)}"]
    groups = [names] if own["together"] == "true" else [[name] for name in names]
    for group in groups:
        arms = [Arm(name, settings, folder) for name in group]
        try:
            turns(arms, works, float(own["limit"]))
        finally:
            for arm in arms:
                arm.process.kill()
    print_table(folder)


if __name__ == "__main__":
    main()
