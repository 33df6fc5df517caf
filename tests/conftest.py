"""What every test runs under: NumPy's error state, Hypothesis profiles, the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# A failure has to be repeatable, whatever else a machine does, and compilation by Numba makes first
# examples slow. The pytest option --hypothesis-profile=NAME chooses another one.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", untimed, derandomize=True, max_examples=25)
settings.register_profile("random", untimed)
settings.register_profile("deep", untimed, max_examples=5000)
settings.load_profile("ci")


def pytest_configure() -> None:
    """Silent overflow is the error this package exists to exclude."""
    np.seterr(divide="raise", over="raise", invalid="raise", under="ignore")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder that holds mnist/, fashion-mnist/, cifar10/ and so on."""
    folder = os.environ.get("CACTUS_EDGE_DATA")
    if not folder:
        pytest.skip("CACTUS_EDGE_DATA names no folder with data sets")
    path = Path(folder)
    assert path.is_dir(), f"CACTUS_EDGE_DATA is {folder}, which is no folder"
    return path
