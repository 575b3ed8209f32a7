"""The doctor: what it finds here, and what it says of a machine that lacks something."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

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
