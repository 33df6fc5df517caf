"""``cactus-edge bench`` for people who cloned the repository; without a model, the demo's two.

    python tools/benchmark.py [MODEL...] [options of `cactus-edge bench`]
    python tools/benchmark.py --pi [--runs 5] [--threads 1] [--rounds 50] [-o FILE] MODEL

``--pi`` is the protocol for a Raspberry Pi (``cactus_edge/bench/pi.py``). On another machine it
says what is missing and goes on.
"""

import argparse
import functools
import logging
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cactus_edge import files, flatbuffer  # noqa: E402
from cactus_edge.bench import benchmark, pi  # noqa: E402
from cactus_edge.cli import main, run  # noqa: E402
from cactus_edge.errors import CactusEdgeError  # noqa: E402

DEMO = ROOT / "build" / "demo"


def benchmark_demo() -> int:
    """Time the demonstration's models, which are made first if they are missing."""
    models = [DEMO / "digits-int8.tflite", DEMO / "digits-int4.tflite"]
    if not all(model.exists() for model in models):
        code = run(["demo", "--output", str(DEMO)])
        if code:
            return code
    return run(["bench", *map(str, models)])


def benchmark_pi(arguments: list[str]) -> int:
    """The Raspberry Pi's protocol on one model; the report goes to a file or to the terminal."""
    parser = argparse.ArgumentParser(prog="benchmark.py --pi")
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=5, help="repetitions")
    parser.add_argument("--threads", type=int, default=1, help="threads and pinned cores")
    parser.add_argument("--rounds", type=int, default=50, help="turns of each runtime in a run")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        graph, content = flatbuffer.load(options.model)
        measure = functools.partial(
            benchmark,
            graph,
            model=content,
            rounds=options.rounds,
            threads=options.threads,
            starts=False,
        )
        report = pi.protocol(measure, runs=options.runs, threads=options.threads)
        text = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
        if options.output is None:
            sys.stdout.write(text.decode())
        else:
            files.write(options.output, text, force=True)
    except CactusEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    if "--pi" in given:
        sys.exit(benchmark_pi([argument for argument in given if argument != "--pi"]))
    if given:
        main(["bench", *given])
    sys.exit(benchmark_demo())
