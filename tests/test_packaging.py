"""What is shipped: the wheel's content, one version, and a lock file that fits the constraints."""

from __future__ import annotations

import re
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import import_module
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cactus_edge
from cactus_edge import certificate

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the build system of pyproject.toml, without installing anything."""
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def files_below(folder: str) -> set[str]:
    """Paths from the repository's root, without what Python and Numba keep."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    kept = (path for path in paths if "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in kept}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        others = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.testzip() is None
        scripts = archive.read(next(n for n in archive.namelist() if n.endswith("points.txt")))
    expected = files_below("cactus_edge") | files_below("firmware_sim")
    expected |= {f"cactus_edge/{name}" for name in files_below("recipes")}
    assert names == expected
    assert {"cactus_edge/py.typed", "cactus_edge/recipes/digits.toml"} <= names
    assert any(name.endswith(".c") for name in names)
    assert {"METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE"} <= others
    target = re.search(r"cactus-edge = (\S+):(\S+)", scripts.decode())
    assert target and callable(getattr(import_module(target[1]), target[2]))


def test_the_version_is_written_in_one_place(wheel: Path) -> None:
    about = metadata(wheel)
    assert about["Version"] == cactus_edge.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", about["Version"])
    assert "version" not in PROJECT
    assert set(about.get_all("Provides-Extra") or ()) == set(EXTRAS)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{about['Version']}]" in changelog or f"Becomes {about['Version']}" in changelog


def test_wheels_are_reproducible(wheel: Path, tmp_path: Path) -> None:
    (again,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(again).read_bytes() == wheel.read_bytes()


def test_an_error_names_an_extra_that_exists() -> None:
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "cactus_edge").rglob("*.py")]
    sources += [p.read_text(encoding="utf-8") for p in (ROOT / "firmware_sim").rglob("*.py")]
    call = re.compile(r'MissingExtraError\(\s*"([^"]+)",\s*"([^"]+)"')
    named = [match for text in sources for match in call.findall(text)]
    assert len(named) > 5
    for package, extra in named:
        wanted = [Requirement(text) for text in EXTRAS[extra]]
        names = {name for found in wanted for name in (found.name, *found.extras)}
        assert canonicalize_name(package) in map(canonicalize_name, names), (package, extra)


def pins(path: Path) -> dict[str, set[str]]:
    """Versions by name; several where they depend on the Python."""
    found: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            found.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return found


def test_the_lock_file_fits_the_constraints() -> None:
    path = ROOT / "requirements" / "release.txt"
    locked, held = pins(path), pins(ROOT / "constraints.txt")
    blocks = re.split(r"\n(?=[a-zA-Z])", path.read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(locked) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert {name for name in locked if not locked[name] <= held.get(name, set())} == set()
    wanted = [*PROJECT["dependencies"]]
    wanted += [text for extra in EXTRAS if extra not in ("all", "dev", "docs", "fuzz", "release")
               for text in EXTRAS[extra]]  # fmt: skip
    for text in wanted:
        requirement = Requirement(text)
        environment = {"python_version": "3.11", "platform_system": "Linux",
                       "platform_machine": "x86_64"}  # fmt: skip
        if requirement.name != "torch" and (
            requirement.marker is None or requirement.marker.evaluate(environment)
        ):
            (version,) = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), text


def test_the_dockerfile_copies_what_there_is() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.*)$", text, re.MULTILINE)
    sources = [name for line in copied for name in line.split()[:-1]]
    assert len(sources) >= 6
    assert [name for name in sources if not (ROOT / name).exists()] == []
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= set(EXTRAS)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {name.split("/")[0] for name in sources} & set(ignored)


def test_the_pages_name_the_formats_version() -> None:
    page = (ROOT / "docs" / "certificates.md").read_text(encoding="utf-8")
    assert f"`{certificate.FORMAT}`, version {certificate.VERSION}" in " ".join(page.split())
