"""What was done to break it, for ``docs/results/trust.md``: kills, faults, bytes, endurance.

Each test writes its section, see ``trust``.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cactus_edge import datasets, signing
from cactus_edge.certificate_stream import Reader
from cactus_edge.certify.run import Request, certify
from cactus_edge.check import check
from cactus_edge.cli import run
from cactus_edge.errors import CactusEdgeError
from cactus_edge.inputs import Perturbation
from cactus_edge.signing import Evidence
from tests.evidence import emulator, endurance, kills, remade, trust
from tests.test_signing import flips, key_of, made  # noqa: F401
from tests.train.killed import RECIPE

ROOT = Path(__file__).resolve().parents[2]
TIER = "neon-dotprod"
KILLED = """\
SIGKILL to `train`, `convert`, `certify` (by intervals and by linear bounds) and `report` on
digits, {} times, each after a drawn share of the processor time that the undisturbed command
took, or right before a drawn one of its operations on files: opening, renaming, linking,
removing. Each command was killed up to six times and then gone on with, `train` and `certify` by
`--resume`. A file that was not whole would be one under its final name that cannot be read, or
that differs from the undisturbed one; of a run's files, the history has to be a beginning of the
undisturbed one, and so has the `.partial` of a certificate."""
DISTURBED = """\
What happens around a command, and the tests that make it happen; `cases` are what they were run
with, such as each verb that writes a file."""
CHANGED = """\
Every byte of each file with one of its bits changed, each bit in turn: signed files, their data
and the signature by `verify-signature`; without any signature, a certificate of one sample and
its model by `check`, which derives the certificate again."""
REMADE = """\
SHA-256, shortened, of what is made from the same recipe, or the same ONNX file, and data: twice
on this machine, each time in a process of its own, and once by Python for 64-bit Arm ({}, under
qemu-user). Certificates are by the library's `certify` on digits; the Arm side converts the ONNX
file and certifies, it does not train."""
ENDURED = """\
A certificate by intervals of made-up samples, digits with every pixel moved by up to 8 of 255, from
one `.npz` file by `certify`; and single inferences by `cactus_edge.Session`, round after round on
the {} digits of the test set as a service would make them, each round's logits compared, by
SHA-256, with those of the reference executor. Each row is a process of its own; of all samples at
once only the labels, up to eight bytes each, are in memory."""
LONG, SHORT = 1_000_000, 10_000
FAULTS = {
    "disk full": (
        "exit code 2, nothing under the final name; certificates and runs go on",
        "tests/test_disturbances.py",
        (
            "test_a_full_disk_and_a_closed_folder",
            "test_a_disk_that_fills_up_costs_nothing_that_was_done",
            "test_an_old_file_stays_where_the_new_one_does_not_fit",
            "test_training_is_disturbed",
        ),
    ),
    "folder closed to this user": (
        "exit code 2, names the folder",
        "tests/test_disturbances.py",
        ("test_a_full_disk_and_a_closed_folder", "test_training_is_disturbed"),
    ),
    "user without a home": (
        "works without data sets; says what to set with them",
        "tests/test_disturbances.py",
        ("test_a_user_without_a_home",),
    ),
    "two processes, one file": (
        "one wins, the other is told; nothing is overwritten unasked",
        "tests/test_disturbances.py",
        ("test_of_two_that_write_one_file_one_wins", "test_a_file_system_without_links"),
    ),
    "two processes, one certificate": (
        "exit code 2, the other's work is not touched",
        "tests/certify/test_parallel.py",
        ("test_two_processes_never_write_one_file",),
    ),
    "two processes, one training folder": (
        "exit code 2; free again when its owner was killed",
        "tests/test_disturbances.py",
        ("test_a_folder_has_one_owner", "test_training_is_disturbed"),
    ),
    "clock set back": (
        "the same bytes, also of what goes on; no module asks for the time of day",
        "tests/test_disturbances.py",
        (
            "test_the_clock_is_set_back",
            "test_training_is_disturbed",
            "test_no_result_depends_on_the_clock",
            "test_wall_clocks_are_found",
        ),
    ),
    "cache of kernels damaged": (
        "found by SHA-256 and compiled again",
        "tests/kernels/test_bad_input.py",
        ("test_damaged_files_are_compiled_again",),
    ),
    "cache of kernels deleted while running": (
        "made again",
        "tests/kernels/test_bad_input.py",
        ("test_a_cache_that_is_deleted_meanwhile",),
    ),
    "cache of kernels not writable": (
        "a warning, and compiled each time",
        "tests/kernels/test_bad_input.py",
        ("test_a_cache_that_cannot_be_written",),
    ),
    "worker killed, as for want of memory": (
        "its task is done again; what kills every worker is an error",
        "tests/certify/test_pool.py",
        (
            "test_a_killed_process_costs_nothing",
            "test_what_kills_every_process_is_an_error",
            "test_workers_end_with_the_process_they_work_for",
        ),
    ),
    "one of several training processes killed": (
        "exit code 5 at once, and how to go on from the checkpoint",
        "tests/train/test_processes.py",
        ("test_a_killed_process_ends_the_run_and_says_how_to_go_on",),
    ),
    "Dask worker killed": (
        "its tasks are done by another",
        "tests/certify/test_parallel.py",
        ("test_a_killed_dask_worker_costs_nothing",),
    ),
    "power cut at any byte of a certificate": (
        "--resume ends in the same bytes",
        "tests/certify/test_parallel.py",
        ("test_resuming_at_every_byte",),
    ),
}


@pytest.mark.evidence
def test_kills(tmp_path: Path) -> None:
    rows = printed("tests.evidence.kills", tmp_path)
    text = KILLED.format(sum(row["kills"] for row in rows))
    trust.section("kills", "Killed at any moment", text, rows)
    for row in rows:
        assert row["kills"] >= kills.KILLS and row["before an operation on files"] > 0
        assert row["files of theirs with other bytes"] == row["files that were not whole"] == 0


@pytest.mark.evidence
def test_faults(tmp_path: Path) -> None:
    tests = sorted({f"{file}::{name}" for _, file, names in FAULTS.values() for name in names})
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "evidence or not evidence"]
    subprocess.run([*command, f"--junitxml={report}", *tests], cwd=ROOT, check=False)
    outcomes: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes.setdefault(name, Counter())[kinds[0] if kinds else "passed"] += 1
    rows: list[dict[str, object]] = []
    for fault, (what, file, names) in FAULTS.items():
        total = sum((outcomes[name] for name in names), Counter[str]())
        rows.append(
            {
                "fault": fault,
                "what happens": what,
                "tests": f"`{file}`: " + ", ".join(f"`{name}`" for name in names),
                "cases": total.total(),
                "passed": total["passed"],
            }
        )
    trust.section("faults", "Disturbed from outside", DISTURBED, rows)
    assert all(row["cases"] == row["passed"] for row in rows)


@pytest.mark.evidence
def test_endurance(tmp_path: Path) -> None:
    model = str(ROOT / "models" / "digits-0.05" / "model.tflite")
    module, rows = "tests.evidence.endurance", list[dict[str, object]]()
    runs: list[dict[str, Any]] = []
    for count in (SHORT, LONG):
        data = tmp_path / f"{count}.npz"
        endurance.write_samples(data, count)
        runs.append(printed(module, "certify", model, data, tmp_path / f"{count}.jsonl"))
        assert runs[-1]["samples"] == count
        share = 100 * runs[-1]["certified"] / count
        rows.append(endured("samples certified", count, runs[-1], f"{share:.1f} % certified"))
    for count in (SHORT, LONG):
        runs.append(printed(module, "infer", model, count))
        assert runs[-1]["other"] == 0 and runs[-1]["done"] >= count
        result = f"every round equal, {runs[-1]['grown']} MiB more than after {endurance.WARM:,}"
        rows.append(endured("inferences", runs[-1]["done"], runs[-1], result))
    text = ENDURED.format(len(datasets.load("digits", "test").labels))
    trust.section("endurance", "Endurance", text, rows)
    for short, long in (runs[:2], runs[2:]):
        assert long["peak"] - short["peak"] < 32, "MiB"
    assert runs[3]["grown"] < 1


def endured(what: str, count: int, figures: dict[str, Any], result: str) -> dict[str, object]:
    """A row of the section."""
    return {
        "what": what,
        "number": f"{count:,}",
        "peak memory, MiB": figures["peak"],
        "processor seconds": figures["seconds"],
        "result": result,
    }


def printed(module: str, *arguments: object) -> Any:
    """The JSON that a module prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.evidence
def test_changed_bytes(made: Path, tmp_path: Path) -> None:  # noqa: F811
    key, signature = key_of(made), (made / "signature.json").read_bytes()
    statement = signing.opened(signature, key, "it")
    rows: list[dict[str, object]] = []
    for subject in statement.subject:
        (tmp_path / subject.name).write_bytes((made / subject.name).read_bytes())
    for subject in statement.subject:
        path = tmp_path / subject.name
        content = path.read_bytes()

        def differs(other: bytes, path: Path = path) -> bool:
            path.write_bytes(other)
            return bool(list(signing.problems(statement, tmp_path, Evidence())))

        rows.append(counted(subject.name, "`verify-signature`", content, differs))
        path.write_bytes(content)
    data = datasets.load(made / "data.npz", "test")
    path, content = tmp_path / "data.npz", (made / "data.npz").read_bytes()

    def other_data(other: bytes) -> bool:
        path.write_bytes(other)
        return bool(list(signing.problems(statement, made, Evidence(data, path))))

    def other_signature(other: bytes) -> bool:
        try:
            signing.opened(other, key, "it")
        except CactusEdgeError:
            return True
        return False

    rows.append(counted("data.npz", "`verify-signature`", content, other_data))
    rows.append(counted("signature.json", "`verify-signature`", signature, other_signature))
    rows += checked(made, data)
    trust.section("changed-bytes", "Changed bytes", CHANGED, rows)
    assert all(row["changed bytes"] == row["found"] for row in rows)


def counted(
    name: str, by: str, content: bytes, differs: Callable[[bytes], bool]
) -> dict[str, object]:
    """A row: how many changes of a file's bytes are found."""
    return {
        "file": name,
        "by": by,
        "changed bytes": len(content),
        "found": sum(differs(other) for _, other in flips(content)),
    }


def checked(folder: Path, data: datasets.Dataset) -> list[dict[str, object]]:
    """Rows of ``check``, for a certificate of one sample and profile: it derives each again."""
    model = (folder / "model.tflite").read_bytes()
    request = Request(
        data=data,
        perturbation=Perturbation.levels(1),
        count=1,
        profiles=("tflite-micro",),
        models=(("model.tflite", model),),
    )
    stream = io.BytesIO()
    certify(request, stream)
    claim = stream.getvalue()

    def refused(claim: bytes, model: bytes) -> bool:
        try:
            return not check(Reader(io.BytesIO(claim), "it"), [model], data).agrees
        except CactusEdgeError:
            return True

    assert not refused(claim, model)
    return [
        counted("a certificate", "`check`", claim, lambda other: refused(other, model)),
        counted("its model", "`check`", model, lambda other: refused(claim, other)),
    ]


@pytest.mark.evidence
def test_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    train = ("train", str(recipe), "--device", "cpu", "-q", "-o")
    model = str(tmp_path / "trained.tflite")
    for words in (
        [*train, str(tmp_path / "run")],
        ["convert", str(tmp_path / "run"), "-q", "-o", model],
        ["export-onnx", model, "--float", "-q", "-o", str(tmp_path / "model.onnx")],
    ):
        assert run(words) == 0
    again = tmp_path / "again.tflite"
    program = "import sys; from cactus_edge.cli import run; sys.exit(run(sys.argv[1:]))"
    for words in (
        [*train, str(tmp_path / "second")],
        ["convert", str(tmp_path / "second"), "-q", "-o", str(again)],
    ):
        subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, check=True)
    parts = {name: datasets.load("digits", name) for name in ("train", "test")}
    arrays = {f"x_{name}": part.images for name, part in parts.items()}
    arrays |= {f"y_{name}": np.asarray(part.labels) for name, part in parts.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    command = ("tests.evidence.remade", str(tmp_path), *remade.METHODS)
    first = printed(*command)
    again.replace(model)
    second = printed(*command)
    assert first == second
    try:
        emulator.prepare()
    except emulator.Unavailable as error:
        pytest.skip(str(error))
    arm = json.loads(emulator.run(TIER, ["-m", *command], 4 * 3600))
    rows = [
        {
            "made": name,
            "here": digest[:16],
            "here again": second[name][:16],
            "on Arm": arm[name][:16],
            "the same": digest == second[name] == arm[name],
        }
        for name, digest in first.items()
    ]
    text = REMADE.format(emulator.CPUS[TIER])
    trust.section("same-bytes", "The same bytes, again and elsewhere", text, rows)
    assert all(row["the same"] for row in rows)
