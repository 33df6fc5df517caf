"""Probing tells every two profiles apart, and finds the one that a runtime follows."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from cactus_edge import cli, profiles
from cactus_edge.errors import ToolError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.profiles import PROFILES
from cactus_edge.validate import Peer, learn
from cactus_edge.validate.learning import references
from cactus_edge.validate.probes import probes

Part = tuple[Graph, Int64Array]


def imitator(name: str) -> Peer:
    """A runtime that is not there: ``monkeypatch`` decides what it computes."""
    return Peer(f"like {name}", "numpy", "numpy", "runtimes", "AUTO", name)


def test_probes_tell_every_two_profiles_apart() -> None:
    asked, outputs = references()
    assert all(len(by_profile) >= len(PROFILES) - 2 for by_profile in outputs)
    for a, b in itertools.combinations(PROFILES, 2):
        differing = sum(int((o[a] != o[b]).sum()) for o in outputs if a in o and b in o)
        assert differing > 10, (a, b)
    again = list(probes())
    assert all(np.array_equal(p.inputs, q.inputs) for p, q in zip(asked, again, strict=True))


@pytest.mark.parametrize("followed", ["tflite-arm", "litert-xnnpack-arm", "single-rounding"])
def test_what_a_runtime_follows_is_found(monkeypatch: pytest.MonkeyPatch, followed: str) -> None:
    """Of runtimes that this machine does not have, too."""

    def runner(peer: Peer) -> object:
        def run(parts: list[Part]) -> list[Int64Array]:
            outside = [graph for graph, _ in parts if followed in profiles.uncovered(graph)]
            if outside:
                raise ToolError("an operator that it does not have")
            return [execute(graph, batch, followed).astype(np.int64) for graph, batch in parts]

        return run

    monkeypatch.setattr("cactus_edge.validate.learning.runner", runner)
    [found] = learn([imitator("tflite-x86")])
    assert found.fitting == (followed,) and found.status == "fits"
    assert found.documented == "tflite-x86"
    wrong = next(fit for fit in found.fits if fit.profile == "tflite-x86")
    assert 0 < wrong.mismatches < wrong.elements and wrong.differing
    assert bool(found.refused) is (followed == "litert-xnnpack-arm")


def test_no_profile_fits_a_runtime_that_rounds_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(peer: Peer) -> object:
        def run(parts: list[Part]) -> list[Int64Array]:
            outputs = [execute(graph, batch).astype(np.int64) for graph, batch in parts]
            outputs[0][0].flat[0] += 1 if outputs[0][0].flat[0] < 127 else -1  # one integer off
            return outputs

        return run

    monkeypatch.setattr("cactus_edge.validate.learning.runner", runner)
    [found] = learn([imitator("tflite-micro")])
    assert found.status == "none fits" and not found.fitting
    nearest = next(fit for fit in found.fits if fit.profile == "tflite-micro")
    assert nearest.mismatches == 1


def test_a_runtime_that_runs_nothing_is_an_error() -> None:
    ghost = Peer("ghost", "no-such-package", "no_such_module", "runtimes", "AUTO", "tflite-x86")
    broken = Peer("broken", "numpy", "numpy", "runtimes", "AUTO", "tflite-x86")
    absent, failing = learn([ghost, broken])
    assert absent.status == "absent" and "pip install" in absent.message
    assert failing.status == "error" and failing.message and not failing.fits


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """Every installed runtime follows the profile that is documented for it."""
    assert cli.run(["validate", "--learn-profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    installed = [runtime for runtime in found if runtime["status"] != "absent"]
    assert installed and all([r["documented"]] == r["fitting"] for r in installed)
    assert cli.run(["validate", "--learn-profile", "--data", "digits"]) == 2
    assert cli.run(["validate"]) == 2
    assert "--learn-profile" in capsys.readouterr().err
