"""A million samples certified and a million inferences: ``python -m tests.evidence.endurance``.

``certify MODEL DATA OUTPUT`` and ``infer MODEL COUNT`` each print a JSON object about their own
process, so that the caller's memory is not counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from cactus_edge import Session, datasets, inputs, profiles, read_tflite
from cactus_edge.bench import machine
from cactus_edge.certificate_stream import reading
from cactus_edge.cli import run
from cactus_edge.execute import execute

EPSILON = "0.05"
WARM = 5_000
"""Inferences after which memory may not grow."""


def write_samples(path: Path, count: int) -> None:
    """Digits with pixels moved by up to 8 of 255; the labels are those of the digits."""
    data = datasets.load("digits", "test")
    rng = np.random.default_rng(count)
    chosen = np.arange(count) % len(data.labels)
    images = np.rint(data.images * 255) if data.images.dtype != np.uint8 else data.images
    moved = images.astype(np.int16)[chosen]
    moved += rng.integers(-8, 9, moved.shape, dtype=np.int16)
    pixels, labels = np.clip(moved, 0, 255).astype(np.uint8), data.labels[chosen].astype(np.uint8)
    np.savez(path, x_train=pixels[:10], y_train=labels[:10], x_test=pixels, y_test=labels)


def peak() -> float:
    """The most that this process had in memory, MiB."""
    kib = machine.peak_kib()
    assert kib is not None
    return round(kib / 1024, 1)


def certify(model: str, data: str, output: str) -> dict[str, object]:
    """One certificate by the command line."""
    words = ["certify", model, "--data", data, "--eps", EPSILON, "--method", "interval"]
    code = run([*words, "-q", "-o", output])
    assert code in (0, 1), code
    found = {"peak": peak(), "seconds": round(time.process_time())}
    with reading(Path(output)) as reader:
        verdicts = [sample.verdict for sample in reader.samples()]
        assert reader.problems() == []
    return {**found, "samples": len(verdicts), "certified": verdicts.count("certified")}


def infer(model: str, count: int) -> dict[str, object]:
    """Single inferences, round after round on the same samples, as a service would make them."""
    graph = read_tflite(Path(model).read_bytes())
    data = datasets.load("digits", "test")
    stored = inputs.stored(graph, data.images)
    expected = execute(graph, stored, profiles.DEFAULT).reshape(len(stored), -1)
    session = Session(graph)
    samples = stored.astype(graph.tensors[graph.core_input].dtype.value)
    wanted = hashlib.sha256(expected.astype(np.int64).tobytes()).hexdigest()
    done = other = 0
    before = machine.resident_kib()
    while done < count:
        if done < WARM:
            before = machine.resident_kib()
        digest = hashlib.sha256()
        for i in range(len(samples)):
            digest.update(session.run(samples[i : i + 1]).astype(np.int64).tobytes())
        other += digest.hexdigest() != wanted
        done += len(samples)
    after = machine.resident_kib()
    assert before is not None and after is not None
    grown = round((after - before) / 1024, 1)
    seconds = round(time.process_time())
    return {"done": done, "other": other, "grown": grown, "peak": peak(), "seconds": seconds}


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    made = infer(words[0], int(words[1])) if verb == "infer" else certify(*words)
    print(json.dumps(made))
