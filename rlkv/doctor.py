"""What this machine can run, and what to install for the rest: ``rlkv doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["ok", "missing", "warn"]
TRANSFORMERS = (5, 2)
TRIED_TRANSFORMERS = (5, 23)  # the newest that the tests have run with
CAPABILITY = (8, 0)  # of a GPU: the first with bfloat16, which the kernels compute in
HUB_TIMEOUT = 3.0  # seconds


class Finding(NamedTuple):
    """One line of the report; ``install`` is a command or advice, empty when nothing is wanted."""

    component: str
    status: Status
    detail: str
    install: str = ""


# feature, the components it needs
FEATURES: dict[str, tuple[str, ...]] = {
    "train, eval and generate on the pocket model": ("python", "torch", "transformers", "pocket weights"),
    "train and eval on a large model (local folder)": ("python", "torch", "transformers", "GPU"),
    "Triton kernels, for sampling and training on a GPU": ("torch", "GPU kernels", "triton"),
    "rlkv serve, on SGLang": ("torch", "GPU kernels", "triton", "sglang", "SGLang plugin"),
    "models and prompts from the hub": ("hub", "datasets"),
    "math rewards": ("math-verify",),
    "benchmarks, baselines and the paper's tables": ("rlkv-eval", "datasets", "math-verify"),
    "tasks of lm-evaluation-harness (rlkv-lm-eval)": ("rlkv-eval", "lm_eval"),
    "pictures": ("matplotlib",),
    "training curves in TensorBoard": ("tensorboard",),
}


def report() -> list[Finding]:
    """Look at this machine; never raises, and waits at most a few seconds for the hub."""
    return [check() for check in CHECKS]


def runnable(findings: list[Finding]) -> dict[str, list[str]]:
    """For each feature the components that it lacks; an empty list means that it runs."""
    missing = {finding.component for finding in findings if finding.status == "missing"}
    return {feature: [need for need in needs if need in missing] for feature, needs in FEATURES.items()}


def main() -> int:
    """Print the report; returns 0 if the core runs, 1 if it doesn't."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = report()
    core = next(iter(FEATURES))
    table = Table("component", "status", "found", "to install or do", title="RLKV on this machine")
    for finding in findings:
        needed = finding.component in FEATURES[core]
        colour = "green" if finding.status == "ok" else "red" if needed else "yellow"
        table.add_row(
            finding.component,
            f"[{colour}]{finding.status}[/]",
            escape(finding.detail),
            escape(finding.install),
        )
    console = Console()
    console.print(table)
    features = runnable(findings)
    for feature, lacking in features.items():
        mark = (
            f"[yellow]no [/] {feature}: needs {', '.join(lacking)}" if lacking else f"[green]yes[/] {feature}"
        )
        console.print(f"  {mark}")
    return 1 if features[core] else 0


def check_python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def check_transformers() -> Finding:
    finding = _versioned("transformers", TRANSFORMERS, "pip install 'transformers>=5.2'")
    if finding.status == "ok" and _numbers(finding.detail) > TRIED_TRANSFORMERS:
        newest = ".".join(map(str, TRIED_TRANSFORMERS))
        return finding._replace(
            status="warn", detail=f"{finding.detail}, newer than {newest}, the newest tried"
        )
    return finding


def check_gpu() -> Finding:
    """CUDA as torch sees it, with the memory of each device."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    except Exception as error:  # a broken driver raises many types, and must not end the report
        return Finding("GPU", "missing", f"torch can't say: {error}", "mend torch and the NVIDIA driver")
    if devices:
        names = ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices)
        return Finding("GPU", "ok", f"{names}, CUDA {torch.version.cuda}")
    detail = f"none; {os.cpu_count()} CPU cores"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding("GPU", "missing", f"{detail}; torch is a CPU build", "a CUDA build of torch")
    return Finding("GPU", "missing", detail, "nothing: the pocket model runs on a CPU")


def check_kernels() -> Finding:
    """Whether the GPU can run the kernels: a CUDA device that computes in bfloat16."""
    try:
        import torch

        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    except Exception as error:  # as in check_gpu
        return Finding(
            "GPU kernels", "missing", f"torch can't say: {error}", "mend torch and the NVIDIA driver"
        )
    least = ".".join(map(str, CAPABILITY))
    if found is None:
        advice = f"optional, for speed: a GPU of compute capability {least} or above"
        return Finding("GPU kernels", "missing", "no CUDA device", advice)
    detail = f"compute capability {found[0]}.{found[1]}"
    if found < CAPABILITY:
        return Finding("GPU kernels", "missing", f"{detail}: no bfloat16", f"a GPU of {least} or above")
    return Finding("GPU kernels", "ok", f"{detail}, bfloat16")


def check_plugin() -> Finding:
    """Whether SGLang will find ours: it looks for entry points."""
    if any(point.name == "rlkv" for point in metadata.entry_points(group="sglang.srt.plugins")):
        return Finding("SGLang plugin", "ok", _version("rlkv-sglang") or "")
    return Finding("SGLang plugin", "missing", "optional", "pip install -e sglang, in the repository")


def check_hub() -> Finding:
    """Whether the Hugging Face hub answers, unless the environment says to stay offline."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            return Finding(
                "hub", "missing", f"offline because {name} is set", "unset it, or use local folders"
            )
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = "use local folders and JSONL files; HF_HUB_OFFLINE=1 skips its retries"
        return Finding("hub", "missing", f"{address} does not answer ({reason})", advice)
    return Finding("hub", "ok", address)


def check_disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 2:
        return Finding("disk", "warn", f"{free:.1f} GiB free here", "room for checkpoints and results")
    return Finding("disk", "ok", f"{free:.0f} GiB free here")


def check_pocket() -> Finding:
    folder = Path(os.environ.get("RLKV_POCKET") or Path(__file__).parent / "pocket" / "weights")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        advice = "reinstall rlkv, or set RLKV_POCKET to the folder of the weights"
        return Finding("pocket weights", "missing", f"no *.safetensors in {folder}", advice)
    return Finding("pocket weights", "ok", f"{sum(file.stat().st_size for file in weights) / 2**20:.1f} MiB")


def package(
    name: str, install: str, module: str = "", optional: bool = False, least: tuple[int, int] | None = None
) -> Callable[[], Finding]:
    """A check for an installed package; without an optional one nothing of the core is lost.

    One that must have at least the version ``least`` must import, too.
    """

    def check() -> Finding:
        if least is not None:
            return _versioned(name, least, install, module)
        if importlib.util.find_spec(module or name) is None or not (version := _version(name)):
            return Finding(name, "missing", "optional" if optional else "", install)
        return Finding(name, "ok", version)

    return check


def _versioned(name: str, least: tuple[int, int], install: str, module: str = "") -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", "", install)
    if _numbers(version) < least:
        return Finding(name, "missing", f"{version} is too old", install)
    try:
        importlib.import_module(module or name)
    except Exception as error:  # a half-installed package raises many types
        return Finding(name, "missing", f"{version} does not import: {error}", install)
    return Finding(name, "ok", version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    """(5, 23) of ``"5.23.1+cpu"``."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


CHECKS: list[Callable[[], Finding]] = [
    check_python,
    package("torch", "pip install torch==2.13.0", least=(2, 11)),
    check_gpu,
    check_transformers,
    check_kernels,
    package("triton", "pip install -e '.[gpu]', in the repository", least=(3, 5)),
    package("rich", "pip install rich"),
    package("datasets", "pip install -e '.[train]', in the repository"),
    package("math-verify", "pip install 'math-verify[antlr4_13_2]'", "math_verify", least=(0, 8)),
    package("tensorboard", "pip install tensorboard"),
    package("matplotlib", "pip install matplotlib"),
    check_hub,
    check_disk,
    check_pocket,
    package("rlkv-eval", "pip install -e '.[eval]' -e eval, in the repository", module="rlkv_eval"),
    package("lm_eval", "pip install 'lm_eval[hf]>=0.4.13'", optional=True),
    package("sglang", "pip install sglang==0.5.17, in an environment of its own", optional=True),
    check_plugin,
    package("vllm", "only a server for endpoint=: pip install vllm in its own environment", optional=True),
]
