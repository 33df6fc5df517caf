"""What pages of reference need that is their readers' own: models, runs and small data.

Tutorials bring all that they need. The blocks of the pages in ``STAND_INS`` run with files that are
put there before, and with words replaced by ones that take less time; they are parsed as they
stand, too. ``NOT_RUN`` lists all commands and blocks that do not run, and why.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "models" / "digits-0.05"
MODEL = RUN / "model.tflite"
DATA = "small.npz"
_SAMPLES = 6

_TRAINS = "trains for minutes; tests/train does, and docs/tutorials/train-your-own.md"
_RUNTIMES = "starts every installed runtime; tests/test_validate.py does"
_TIMES = "times kernels and runtimes for a minute; tests/bench does"
_SEARCHES = "converts and certifies dozens of models; tests/test_search.py does, on less"
_BUILDS = "builds an environment, or measures for long"
_CARD = "is that of models/digits-0.05/README.md, on larger images"
_BOARD = "needs a board; tests/test_console.py has an emulated one"
_FOREIGN = "needs a file of ONNX Runtime's quantizer; tests/onnx_io/test_quantized.py makes one"
_PI = "is typed on a Raspberry Pi; tests/evidence/test_raspberry_pi.py emulates one"

NOT_RUN: Mapping[str, Mapping[str, str]] = {
    "CONTRIBUTING.md": {"make ": _BUILDS},
    "README.md": {
        "make ": _BUILDS,
        "cactus-edge train": _TRAINS,
        "cactus-edge validate": _RUNTIMES,
    },
    "docs/certification.md": {
        "cactus-edge train": _TRAINS,
        "cactus-edge certify digits.tflite --data digits --eps 0.05 --method linear --jobs 2": "is "
        "to be stopped; what goes on with it runs",
        "dask ": "starts a cluster; tests/certify/test_parallel.py has one",
        "cactus-edge certify digits.tflite --data digits --eps 0.05 --method linear \\": "needs a "
        "cluster; tests/certify/test_parallel.py has one",
    },
    "docs/console.md": {"cactus-edge validate": _BOARD, "python -m firmware_sim": _BOARD},
    "docs/importing.md": {"cactus-edge validate": _RUNTIMES},
    "docs/kernels.md": {
        "cactus-edge bench": _TIMES,
        "cactus-edge explain": "measures the machine for seconds; tests/test_cli.py runs it",
    },
    "docs/onnx.md": {"cactus-edge convert quantized.onnx": _FOREIGN},
    "docs/raspberry-pi.md": {
        "python3 -m venv": _PI,
        "source ": _PI,
        "pip install": _PI,
        "cactus-edge validate": _RUNTIMES,
        "cactus-edge bench": _TIMES,
        "python tools/benchmark.py": _PI,
    },
    "docs/report.md": {"cactus-edge validate": _RUNTIMES, "cactus-edge bench": _TIMES},
    "docs/search.md": {
        "cactus-edge train": _TRAINS,
        "cactus-edge search": _SEARCHES,
        "from pathlib import Path": _SEARCHES,
    },
    "docs/training.md": {
        "from pathlib import Path\nfrom cactus_edge.train": _TRAINS,
        "for ": _TRAINS,
    },
    **{
        f"models/{name}/README.md": {"cactus-edge ": _CARD}
        for name in (
            "fashion-mnist-0.1",
            *("mnist-0.1", "mnist-medium-0.1", "mnist-20kb-0.1", "mnist-0.3", "mnist-0.3-long"),
        )
    },
    "docs/tutorials/certify-a-model-of-others.md": {"cactus-edge validate": _RUNTIMES},
    "docs/tutorials/raspberry-pi.md": {
        "scp ": _PI,
        "python3 -m venv": _PI,
        "venv/bin/pip": _PI,
        "source ": _PI,
        "cactus-edge warm-up": _PI,
        "cactus-edge explain": _PI,
    },
}  # fmt: skip
"""By page: how a command, or a block of Python, begins; and why it does not run."""


@dataclass(frozen=True)
class StandIn:
    """``prepare`` writes files into the current directory.

    ``words`` are patterns in commands and Python, and what stands for them.
    """

    prepare: Callable[[], None]
    words: tuple[tuple[str, str], ...] = ()


_LESS = (
    (r"models/mnist-0\.1/model\.tflite", "models/digits-0.05/model.tflite"),
    (r"--data (?:mnist|fashion-mnist|turbofan|digits)\b", f"--data {DATA}"),
    (r"--samples \d+", "--samples 1"),
    (r" --jobs 2", ""),
    (r'load\("mnist", "test"\)\.images\[:100\]', 'load("digits", "test").images[:1]'),
)


def of(page: Path) -> StandIn | None:
    """What stands in for the reader's files on a page."""
    return STAND_INS.get(page.relative_to(ROOT).as_posix()) if ROOT in page.parents else None


def why_not(page: Path, text: str) -> str:
    """Why a command, or a block of Python, is not run; empty where it is."""
    if ROOT not in page.parents:
        return ""
    reasons = NOT_RUN.get(page.relative_to(ROOT).as_posix(), {})
    return next((why for begin, why in reasons.items() if text.startswith(begin)), "")


def replaced(page: Path, text: str) -> str:
    """A command, or a block of Python, of a page as it is run here."""
    here = of(page)
    for pattern, less in () if here is None else (*here.words, *_LESS):
        text = re.sub(pattern, less, text)
    return text


def data(name: str = DATA) -> None:
    """A few digits."""
    import numpy as np

    from cactus_edge import datasets

    train, test = (datasets.load("digits", part) for part in ("train", "test"))
    np.savez(
        name,
        x_train=train.images[:80],
        y_train=train.labels[:80],
        x_test=test.images[:_SAMPLES],
        y_test=test.labels[:_SAMPLES],
    )


def _model(name: str = "model.tflite") -> None:
    data()
    shutil.copy(MODEL, name)


def _run(name: str) -> None:
    data()
    shutil.copytree(RUN, name)


def _cli(command: str) -> None:
    from cactus_edge.cli import run

    assert run([*command.split(), "--quiet"]) == 0, command


def _onnx() -> None:
    _model("of-digits.tflite")
    data("data.npz")
    _cli("export-onnx of-digits.tflite --float -o model.onnx")


def _twin() -> None:
    _model()
    _cli("twin model.tflite -o twin.tflite")


def _card(name: str) -> StandIn:
    """A model of the repository on random samples; the digits on their own."""

    def prepare() -> None:
        import numpy as np

        from cactus_edge.flatbuffer import read_tflite

        graph = read_tflite((ROOT / "models" / name / "model.tflite").read_bytes())
        shape = graph.tensors[graph.core_input].shape[1:]
        images = np.random.default_rng(0).random((4, *shape), np.float32)
        labels = np.arange(4) % 2
        np.savez(DATA, x_train=images, y_train=labels, x_test=images, y_test=labels)

    return StandIn(prepare)


STAND_INS: Mapping[str, StandIn] = {
    "README.md": StandIn(lambda: _run("runs/mnist")),
    "docs/certification.md": StandIn(
        lambda: _run("runs/digits"),
        ((r"--budget 10", "--budget 0.5"), (r"(-o long.jsonl) --serve", r"\1 --serve --force"),
            (r"--samples 20 --eps 0.05", "--samples 1 --levels 1"),
        ),
    ),
    "docs/compare.md": StandIn(
        data, ((r"compare models", "compare --no-costs -n 20 models"),)
    ),
    "docs/console.md": StandIn(data),
    "docs/faults.md": StandIn(data),
    "docs/firmware.md": StandIn(data),
    "docs/importing.md": StandIn(data),
    "docs/kernels.md": StandIn(data),
    "docs/onnx.md": StandIn(_onnx, ((r"edge (convert|export-onnx) ", r"edge \1 --force "),)),
    "docs/properties.md": StandIn(data),
    "docs/raspberry-pi.md": StandIn(_model),
    "docs/report.md": StandIn(data),
    "docs/signing.md": StandIn(data),
    "docs/training.md": StandIn(
        lambda: _run("runs/mine"), ((r"convert runs/mine", "convert runs/mine --force"),)
    ),
    "docs/twin.md": StandIn(_twin),
    **{
        f"models/{name}/README.md": _card(name)
        for name in ("digits-0.05", "turbofan-0.01")
    },
}  # fmt: skip
