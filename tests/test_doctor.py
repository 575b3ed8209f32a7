"""The doctor: what it finds here, and what it says of a machine that lacks something."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from rlkv import doctor
from rlkv.doctor import Finding


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def server() -> Iterator[str]:
    """A local web server that answers every request with 501."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def found() -> dict[str, Finding]:
    return {finding.component: finding for finding in doctor.report()}


def test_reports_what_is_installed_here() -> None:
    findings = found()
    assert findings["torch"].status == "ok" and findings["torch"].detail == torch.__version__
    assert findings["transformers"].detail.startswith(transformers.__version__)
    assert findings["GPU"].status == ("ok" if torch.cuda.is_available() else "missing")
    assert all(finding.install for finding in findings.values() if finding.status == "missing")
    needed = {need for needs in doctor.FEATURES.values() for need in needs}
    assert needed <= set(findings)


def test_missing_package_and_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.10.1+cu128", "transformers": "6.0.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    findings = found()
    assert findings["torch"].status == "missing" and "2.10.1+cu128 is too old" in findings["torch"].detail
    assert findings["transformers"].status == "warn" and "newer than 5.23" in findings["transformers"].detail
    install = "pip install -e '.[train]', in the repository"
    assert findings["datasets"] == Finding("datasets", "missing", "", install)
    versions["transformers"] = "5.2.0"
    assert found()["transformers"].status == "ok"
    features = doctor.runnable(doctor.report())
    assert "torch" in features["train, eval and generate on the pocket model"]
    assert features["math rewards"] == ["math-verify"]


def test_a_grader_that_does_not_import_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is there, and what it needs is not."""
    assert found()["math-verify"].status == "ok"
    for name in [*sys.modules]:
        if name.split(".")[0] in ("math_verify", "latex2sympy2_extended", "antlr4"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "antlr4", None)
    finding = found()["math-verify"]
    assert finding.status == "missing" and "does not import" in finding.detail
    assert doctor.runnable([finding])["math rewards"] == ["math-verify"]


KERNELS, SERVE = "Triton kernels, for sampling and training on a GPU", "rlkv serve, on SGLang"


@pytest.mark.parametrize(
    ("capability", "status", "detail"),
    [
        (None, "missing", "no CUDA device"),
        ((7, 5), "missing", "compute capability 7.5: no bfloat16"),
        ((8, 0), "ok", "compute capability 8.0, bfloat16"),
        ((12, 0), "ok", "compute capability 12.0, bfloat16"),
    ],
)
def test_gpu_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, status: str, detail: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    finding = doctor.check_kernels()
    assert (finding.status, finding.detail) == (status, detail)
    if capability is None:
        assert finding.install == "optional, for speed: a GPU of compute capability 8.0 or above"
    features = doctor.runnable([finding])
    assert (features[KERNELS] == features[SERVE] == []) == (status == "ok")


def test_serving_needs_the_engine_and_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(name="rlkv")]
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: points)
    assert doctor.check_plugin().status == "ok"
    points.clear()
    assert doctor.check_plugin().status == "missing"
    assert doctor.runnable([doctor.check_plugin()])[SERVE] == ["SGLang plugin"]


def test_lm_eval_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    findings = doctor.report()
    lm_eval = next(finding for finding in findings if finding.component == "lm_eval")
    assert lm_eval.status == "missing" and "lm_eval[hf]>=0.4.13" in lm_eval.install
    needs = doctor.runnable(findings)["tasks of lm-evaluation-harness (rlkv-lm-eval)"]
    assert needs == ["rlkv-eval", "lm_eval"]


def test_hub(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    assert "HF_HUB_OFFLINE is set" in doctor.check_hub().detail
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert doctor.check_hub() == Finding("hub", "ok", server)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        finding = doctor.check_hub()
    assert finding.status == "missing" and "does not answer" in finding.detail


def test_pocket_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLKV_POCKET", str(tmp_path))
    assert doctor.check_pocket().status == "missing"
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    assert doctor.check_pocket() == Finding("pocket weights", "ok", "1.0 MiB")


@pytest.mark.parametrize(("weights", "status"), [(True, 0), (False, 1)])
def test_printed_table_and_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: bool,
    status: int,
) -> None:
    monkeypatch.setenv("RLKV_POCKET", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    if weights:
        (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert doctor.main() == status
    printed = capsys.readouterr().out
    lacking = "no  train, eval and generate on the pocket model: needs pocket weights"
    assert (lacking in printed) == (not weights)
    assert ("yes train, eval and generate on the pocket model" in printed) == weights
    assert all(finding.component in printed for finding in doctor.report())
