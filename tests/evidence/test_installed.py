"""The package's own wheel in fresh environments: alone, and with each extra, as a user installs it.

``pip wheel`` builds it, pip installs it with the pinned versions, and the console script runs what
the extra is for, in a folder without the sources. Writes a section of ``docs/results/trust.md``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import __version__, datasets
from tests.evidence import trust

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TEXT = """\
`pip wheel --no-deps .`, and the wheel installed by pip, at the versions of `constraints.txt`, into
an environment of its own: alone, and with each extra. There `pip check` finds nothing, the console
script does what the extra is for, on a model and an `.npz` file in a folder without the sources,
and without it says what to install. The wheel has {} bytes. `packages` and `MiB` are those of the
whole environment without pip."""
RECIPE = """\
[data]
name = "data.npz"
[network]
name = "mlp"
[objective]
epsilon = 0.02
[optimizer]
epochs = 1
"""
WITHOUT = {"runtimes": 0}
"""Exit codes where an extra is missing, if not 2: ``validate`` shows a runtime that is absent."""

certify = "certify model.tflite --data data.npz --eps 0.02 --samples 20 --force -o"
BASE = (
    "--version",
    "supported-ops",
    "analyze model.tflite",
    f"{certify} certificate.jsonl",
    "check certificate.jsonl model.tflite --data data.npz",
    "attack model.tflite --data data.npz --eps 0.001 --samples 5",
    "twin model.tflite -o twin.tflite",
    "export-c model.tflite -o library",
    "warm-up model.tflite",
    "bench model.tflite --data data.npz --rounds 3 --no-starts",
)
NEEDS = {
    "train": ("train recipe.toml -o run", "convert run -o trained.tflite"),
    "digits": (f"{certify.replace('data.npz', 'digits')} digits.jsonl",),
    "onnx": ("export-onnx model.tflite --data data.npz -o model.onnx",),
    "report": (
        "report certificate.jsonl model.tflite --data data.npz -o report.html --bom bom.json",
    ),
    "runtimes": ("validate model.tflite --data data.npz --samples 20 --json",),
    "serial": ("validate model.tflite --data data.npz --device socket://127.0.0.1:9",),
    "sign": (
        "sign --new-key key.pem",
        "sign model.tflite --certificate certificate.jsonl --data data.npz --key key.pem"
        " -o signature.json",
        "verify-signature signature.json --key key.pub.pem --data data.npz",
    ),
    "sim": ("simulate model.tflite --data data.npz --samples 5",),
    "verify": (
        f"{certify} two.jsonl --jobs 2",
        f"{certify} complete.jsonl --method complete --budget 5 --profile tflite-micro",
        "sweep model.tflite --data data.npz --eps 0.02 --samples 20 --svg curve.svg",
    ),
}
"""What each extra is for; the first command says what to install where the extra is missing."""
MODULES = {
    "images": ("PIL.Image",),
    "docs": ("mkdocs", "material", "mkdocstrings_handlers.python"),
    "dev": ("hypothesis", "pytest", "pyright", "playwright", "importlinter", "hatchling"),
    "release": ("uv", "cyclonedx_py"),
    "fuzz": ("atheris",),
}
"""Of extras without a verb of their own, what they bring."""
ANSWERS = {"serial": 2}
"""Nobody listens at that port: the error is that of the connection, not of the installation."""


@dataclass
class Environment:
    """A fresh one, with the wheel and an extra."""

    folder: Path
    work: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._call(self.folder / "bin" / "python", *arguments)

    def script(self, words: str) -> subprocess.CompletedProcess[str]:
        return self._call(self.folder / "bin" / "cactus-edge", *words.split())

    def install(self, wheel: Path, extra: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        if extra == "train":
            assert (done := self.python(str(ROOT / "tools/install_torch.py"))).returncode == 0, done
        what = f"{wheel}[{extra}]" if extra else str(wheel)
        pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
        done = self.python(*pip, "-c", str(ROOT / "constraints.txt"), what)
        assert done.returncode == 0, done.stderr
        done = self.python("-m", "pip", "check")
        assert done.returncode == 0, done.stdout

    def packages(self) -> int:
        listed = self.python("-m", "pip", "list", "--format", "json", "--exclude", "pip")
        names = {part["name"] for part in json.loads(listed.stdout)}
        return len(names - {"setuptools"})

    def mebibytes(self) -> int:
        places = [p for p in self.folder.rglob("*") if p.is_file() and "pip" not in p.parts]
        return sum(path.stat().st_size for path in places) >> 20

    def _call(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
        return subprocess.run(
            command, cwd=self.work, env=kept, capture_output=True, text=True, check=False
        )


@pytest.mark.evidence
def test_the_wheel_in_fresh_environments(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    rows = [installed(wheel, extra, tmp_path) for extra in ("", *EXTRAS) if extra != "all"]
    text = TEXT.format(f"{wheel.stat().st_size:,}")
    trust.section("installed", "Installed from the wheel", text, rows)


def installed(wheel: Path, extra: str, folder: Path) -> dict[str, object]:
    """A row: an environment with an extra, or with none."""
    environment = Environment(folder / f"environment-{extra}", folder / f"work-{extra}")
    filled(environment.work)
    environment.install(wheel, extra)
    commands = [*BASE] if extra == "" else [*BASE[3:4], *NEEDS.get(extra, ())]
    answers = [0] * (len(commands) - 1) + [ANSWERS.get(extra, 0)]
    for words, wanted in zip(commands, answers, strict=True):
        done = environment.script(words)
        assert done.returncode == wanted, (extra, words, done.stdout, done.stderr)
        assert not wanted or "pip install" not in done.stderr, (extra, words, done.stderr)
    assert environment.script("--version").stdout.split()[-1] == __version__
    for module in MODULES.get(extra, ()):
        done = environment.python("-c", f"import {module}")
        assert done.returncode == 0, (extra, module, done.stderr)
    others = [name for name in NEEDS if extra == "" and name != extra]
    for name in others:
        done = environment.script(NEEDS[name][0])
        assert done.returncode == WITHOUT.get(name, 2), (name, done)
        assert f"cactus-edge[{name}]" in done.stdout + done.stderr, (name, done)
    row = {
        "extra": extra or "none",
        "packages": environment.packages(),
        "MiB": environment.mebibytes(),
        "commands": ", ".join(dict.fromkeys(f"`{words.split()[0]}`" for words in commands)),
        "modules": ", ".join(f"`{name}`" for name in MODULES.get(extra, ())) or "-",
        "says what to install without": ", ".join(f"`{name}`" for name in others) or "-",
    }
    shutil.rmtree(environment.folder)  # with torch, a gigabyte
    return row


def filled(work: Path) -> None:
    """A user's folder."""
    work.mkdir()
    model = ROOT / "models" / "digits-0.05" / "model.tflite"
    (work / "model.tflite").write_bytes(model.read_bytes())
    (work / "recipe.toml").write_text(RECIPE)
    parts = {name: datasets.load("digits", name) for name in ("train", "test")}
    arrays = {f"x_{name}": np.asarray(part.images) for name, part in parts.items()}
    arrays |= {f"y_{name}": np.asarray(part.labels) for name, part in parts.items()}
    np.savez(work / "data.npz", **arrays)
