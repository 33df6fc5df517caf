"""The page of a certificate under way: right figures at every byte, and for this machine alone."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from certificates import encoded
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import datasets, live
from cactus_edge.certificate import Sample, Tally
from cactus_edge.certify import Request, certify
from cactus_edge.certify.partial import partial_of
from cactus_edge.cli import run
from cactus_edge.errors import MissingExtraError, ToolError, UsageError
from cactus_edge.inputs import Perturbation
from cactus_edge.live import Counts, Watch, serving

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "digits-0.05" / "model.tflite"
COUNT = 12


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of real samples, followed by made-up ones of all verdicts."""
    data = datasets.load("digits", "test")
    wanted = Request(
        data,
        Perturbation.epsilon("0.05"),
        count=COUNT,
        models=((MODEL.name, MODEL.read_bytes()),),
    )
    path = tmp_path_factory.mktemp("live") / "c.jsonl"
    head, _ = certify(wanted, path)
    verdicts = ("certified", "refuted", "unknown", "error")
    rng = np.random.default_rng(0)
    samples = [
        Sample(i, int(rng.integers(2)), int(rng.integers(2)), verdicts[rng.integers(4)], "made up")
        for i in range(COUNT)
    ]
    return encoded(head, samples)


def expected(prefix: bytes) -> tuple[int, dict[str, int], int]:
    """Counts of the whole lines behind the head."""
    tally, correct = Tally(), 0
    for line in prefix.splitlines(keepends=True)[1:]:
        if line.endswith(b"\n") and not line.startswith(b'{"summary"'):
            brief = tally.sample(line)
            correct += brief.label == brief.prediction and brief.verdict != "error"
    return tally.samples, tally.summary(False).verdicts, correct


@given(cuts=st.lists(st.floats(0, 1), max_size=6))
def test_counts_are_those_of_the_whole_lines(
    certificate: bytes, cuts: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever the file is cut, and also where it becomes shorter, as a resumed run makes it."""
    output = tmp_path_factory.mktemp("cut") / "c.jsonl"
    watch = Watch(output)
    assert watch.counts() == Counts(str(output))
    for cut in cuts:
        prefix = certificate[: int(cut * len(certificate))]
        partial_of(output).write_bytes(prefix)
        found = watch.counts()
        assert found.problem == ""
        assert found.total == (COUNT if b"\n" in prefix else 0)
        if found.total:
            assert (found.done, found.verdicts, found.correct) == expected(prefix)
        assert found.finished == (prefix == certificate)
    partial_of(output).write_bytes(certificate)
    watch.counts()
    partial_of(output).replace(output)
    found = watch.counts()
    assert found.finished and found.done == COUNT and sum(found.verdicts.values()) == COUNT
    assert found.models == (MODEL.name,) and found.data == "digits test"
    assert found.radius == "epsilon 1/20"


def test_an_older_certificate_is_not_shown(certificate: bytes, tmp_path: Path) -> None:
    output = tmp_path / "c.jsonl"
    output.write_bytes(certificate)
    assert Watch(output).counts().total == 0


def test_verdicts_of_another_claim_are_forgotten(certificate: bytes, tmp_path: Path) -> None:
    """Also where the new run has written more than the old one before the page asks again."""
    output = tmp_path / "c.jsonl"
    watch = Watch(output)
    lines = certificate.splitlines(keepends=True)
    partial_of(output).write_bytes(b"".join(lines[:4]))
    assert watch.counts().done == 3
    other = [lines[0].replace(b'"radius":"1/20"', b'"radius":"1/25"'), *lines[4:10]]
    assert other[0] != lines[0] and len(b"".join(other)) > len(b"".join(lines[:4]))
    partial_of(output).write_bytes(b"".join(other))
    found = watch.counts()
    assert found.problem == "" and found.radius == "epsilon 1/25"
    assert (found.done, found.verdicts, found.correct) == expected(b"".join(other))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    output = tmp_path / "c.jsonl"
    partial_of(output).write_bytes(b"something else\n")
    assert "head" in Watch(output).counts().problem


def ask(address: str, path: str = "", host: str | None = None) -> tuple[int, bytes, str]:
    request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Security-Policy"]


def test_the_page_is_for_this_machine_alone(certificate: bytes, tmp_path: Path) -> None:
    output = tmp_path / "c.jsonl"
    partial_of(output).write_bytes(certificate[:-1])
    with serving(output) as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        port = int(address.split(":")[2].strip("/"))
        status, page, policy = ask(address)
        assert status == 200 and b"<!doctype html>" in page and "default-src 'none'" in policy
        assert b"http:" not in page and b"https:" not in page and b"//" not in page
        status, content, _ = ask(address, "counts")
        assert status == 200
        assert json.loads(content)["done"] == COUNT and not json.loads(content)["finished"]
        assert ask(address, "counts", host=f"localhost:{port}")[0] == 200
        for other in (f"example.org:{port}", f"127.0.0.1.example.org:{port}", "[::1]"):
            assert ask(address, "counts", host=other)[0] == 403
        assert ask(address, "../../etc/passwd")[0] == ask(address, "c.jsonl")[0] == 404
        with (
            pytest.raises(UsageError, match=f"port {port}: .*takes a free one"),
            serving(output, port),
        ):
            pass
        with socket.socket() as elsewhere:  # any other address of this machine
            elsewhere.settimeout(5)
            assert elsewhere.connect_ex(("127.0.0.2", port)) != 0
        partial_of(output).write_bytes(certificate)  # the end, which an open page still sees
        threading.Timer(0.2, ask, (address, "counts")).start()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_does_not_exist(port: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"port {port}: a number"), serving(tmp_path / "c", port):
        pass


def test_certify_serves_and_writes_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, served = tmp_path / "plain.jsonl", tmp_path / "served.jsonl"
    command = ["certify", str(MODEL), "--data", "digits", "--eps", "0.05", "--samples", str(COUNT)]
    assert run([*command, "-o", str(plain)]) == 0
    assert "live view" not in capsys.readouterr().err
    seen: list[Counts] = []

    class Asking(Watch):
        """Asks when the run is over, as an open page does."""

        def until_shown(self) -> None:
            seen.append(self.counts())

    monkeypatch.setattr(live, "Watch", Asking)
    # The run is quicker than a page; the partial file has to have been seen once.
    monkeypatch.setattr(Asking, "_begun", property(lambda _: True, lambda *_: None), raising=False)
    assert run([*command, "-o", str(served), "--serve"]) == 0
    assert re.search(r"live view: http://127\.0\.0\.1:\d+/\n", capsys.readouterr().err)
    assert served.read_bytes() == plain.read_bytes()
    (counts,) = seen
    assert counts.finished and counts.done == counts.total == COUNT
    command[command.index("--samples") + 1] = "1"
    assert run([*command, "-o", str(tmp_path / "c"), "--serve", "--port", "99999"]) == 2
    assert "port 99999" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_tensorboard_is_served_on_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cactus_edge.train import tensorboard

    with tensorboard.serving(tmp_path / "run") as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert b"TensorBoard" in ask(address)[1]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)
    with socket.socket() as other:
        other.bind((tensorboard.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        for wanted in (port, 1 << 16):
            with (
                pytest.raises(UsageError, match=f"port {wanted}: "),
                tensorboard.serving(tmp_path / "run", wanted),
            ):
                pass
    taken = "import sys; print('a warning'); sys.exit('ERROR: could not bind to port 1')"
    with (tmp_path / "said").open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", taken], stdout=stream, stderr=stream)
    with pytest.raises(ToolError, match="does not start: ERROR: could not bind to port 1"):
        tensorboard._address(process, tmp_path / "said")
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"--serve needs .*cactus-edge\[train\]"):
        tensorboard.require()
