"""Makes the trained models of ``models/``: train, convert, certify, check, and write a card.

`python tools/zoo.py` makes all, `python tools/zoo.py mnist-0.1` one. Runs are kept in
``build/zoo`` and resumed; the data sets have to be where `CACTUS_EDGE_DATA` says.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from cactus_edge import files  # noqa: E402
from cactus_edge.certificate import Head, Summary  # noqa: E402
from cactus_edge.certificate_stream import reading  # noqa: E402
from cactus_edge.cli import run  # noqa: E402
from cactus_edge.shares import percent  # noqa: E402

BUILD, MODELS = ROOT / "build" / "zoo", ROOT / "models"


@dataclass(frozen=True)
class Entry:
    """One model: its recipe, how it is trained and converted, and what is certified."""

    title: str
    recipe: str
    data: str
    epsilon: str
    convert: tuple[str, ...]
    train: tuple[str, ...] = ()


ENTRIES = {
    "digits-0.05": Entry(
        "8x8 digits, embedded in scikit-learn", "digits", "digits", "0.05", ("--member", "2")
    ),
    "mnist-0.1": Entry("MNIST", "mnist-cactus", "mnist", "0.1", ("--sparsity", "0.95")),
    "mnist-medium-0.1": Entry(
        "MNIST, a network of 893,418 parameters", "mnist-medium", "mnist", "0.1",
        ("--sparsity", "0.8"), ("--precision", "bf16-mixed"),
    ),
    "mnist-20kb-0.1": Entry(
        "MNIST in less than 20 kB", "mnist-20kb", "mnist", "0.1", ("--bits", "4", "--plain"),
    ),
    "mnist-0.3": Entry("MNIST", "mnist-0.3", "mnist", "0.3", ("--sparsity", "0.8")),
    "mnist-0.3-long": Entry(
        "MNIST, a longer ramp", "mnist-0.3-long", "mnist", "0.3", ("--sparsity", "0.8")
    ),
    "fashion-mnist-0.1": Entry(
        "Fashion-MNIST", "fashion-quick", "fashion-mnist", "0.1", ("--sparsity", "0.5")
    ),
    "turbofan-0.01": Entry(
        "Health of turbofan engines (NASA FD001)", "turbofan", "turbofan", "0.01",
        ("--sparsity", "0.5"),
    ),
}  # fmt: skip


class Claim(msgspec.Struct, frozen=True):
    """What ``certificate.json`` holds: a certificate without its samples."""

    head: Head
    summary: Summary


class Metrics(msgspec.Struct, frozen=True):
    """What the card takes from a run's ``metrics.json``."""

    parameters: int


def call(*arguments: object) -> None:
    """A verb; the program ends where it fails."""
    code = run([str(argument) for argument in arguments])
    if code != 0:
        raise SystemExit(code)


def make(name: str) -> None:
    """Everything about one model."""
    entry, work, target = ENTRIES[name], BUILD / name, MODELS / name
    recipe = ROOT / "recipes" / f"{entry.recipe}.toml"
    call("train", recipe, *entry.train, "--output", work / "run", "--resume")
    model, certificate = work / "model.tflite", work / "certificate.jsonl"
    call("convert", work / "run", *entry.convert, "-o", model, "--force")
    samples = ("--data", entry.data, "--eps", entry.epsilon)
    call("certify", model, *samples, "-o", certificate, "--force")
    call("check", certificate, model, "--data", entry.data)
    target.mkdir(parents=True, exist_ok=True)
    for file in (model, work / "run" / "model.safetensors", work / "run" / "recipe.toml"):
        shutil.copyfile(file, target / file.name)
    with reading(certificate) as reader:
        for _ in reader.lines():
            pass
        assert reader.tail is not None  # all lines were read
        claim = Claim(reader.head, reader.tail.summary)
    summary = msgspec.json.format(msgspec.json.encode(claim), indent=2)
    files.write(target / "certificate.json", summary + b"\n", force=True)
    metrics = msgspec.json.decode((work / "run" / "metrics.json").read_bytes(), type=Metrics)
    text = card(name, entry, claim.summary, metrics, model.stat().st_size)
    files.write(target / "README.md", text.encode(), force=True)


def card(name: str, entry: Entry, summary: Summary, metrics: Metrics, size: int) -> str:
    """What the model is and what holds for it."""
    total = sum(summary.verdicts.values())
    options = shlex.join(entry.convert)
    recipe = f"recipe `recipes/{entry.recipe}.toml`"
    recipe += f", `train {shlex.join(entry.train)}`" if entry.train else ""
    return f"""# {name}: {entry.title}

| | |
| --- | --- |
| network | {metrics.parameters:,} parameters before pruning; {recipe} |
| file | `model.tflite`, {size:,} bytes, made with `convert {options}` |
| test split | {total:,} samples |
| standard accuracy | {percent(summary.standard_accuracy)} % |
| certified at {entry.epsilon} | {percent(summary.certified_accuracy)} % |

Certified are the integers of `model.tflite`, by interval bounds with elided margin: for every input
within {entry.epsilon} of a sample, in units of the input's range, each runtime that the certificate
names decides for the label. `certificate.json` has its head and summary. To make the certificate
with all its lines, and to check it:

```bash
cactus-edge certify models/{name}/model.tflite \\
    --data {entry.data} --eps {entry.epsilon} -o {name}.jsonl
cactus-edge check {name}.jsonl models/{name}/model.tflite --data {entry.data}
```

`model.safetensors` is the trained network, `recipe.toml` its resolved recipe. `python tools/zoo.py
{name}` makes everything anew. The certificate says nothing about inputs that are not near a sample
of the test split, nor about cameras and sensors in front of the network.
"""


def overview() -> str:
    """The table of all models that are there."""
    lines = [
        "# Trained models",
        "",
        "The deployed integers on the whole test split, certified by interval bounds with elided",
        "margin. Each folder has the `.tflite` file, checkpoint, recipe and card, and of the",
        "certificate the head and summary (`certificate.json`; the card says how to make it all,",
        "which `check` takes). Of one training run each; `make zoo` makes them anew.",
        "",
        "| model | data | radius | file, bytes | standard % | certified % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in ENTRIES.items():
        folder = MODELS / name
        if not (folder / "certificate.json").exists():
            continue
        claim = msgspec.json.decode((folder / "certificate.json").read_bytes(), type=Claim)
        shares = claim.summary.standard_accuracy, claim.summary.certified_accuracy
        lines.append(
            f"| [{name}]({name}/README.md) | {entry.title} | {entry.epsilon} | "
            f"{(folder / 'model.tflite').stat().st_size:,} | "
            + " | ".join(percent(share) for share in shares)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *ENTRIES], help="all, if none is given")
    for name in parser.parse_args().names or ENTRIES:
        make(name)
    files.write(MODELS / "README.md", overview().encode(), force=True)


if __name__ == "__main__":
    main()
