"""``cactus-edge bench`` for people who cloned the repository; without a model, the demo's two."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cactus_edge.cli import main, run  # noqa: E402

DEMO = ROOT / "build" / "demo"


def benchmark_demo() -> int:
    """Time the demonstration's models, which are made first if they are missing."""
    models = [DEMO / "digits-int8.tflite", DEMO / "digits-int4.tflite"]
    if not all(model.exists() for model in models):
        code = run(["demo", "--output", str(DEMO)])
        if code:
            return code
    return max(run(["bench", str(model)]) for model in models)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(["bench", *sys.argv[1:]])
    sys.exit(benchmark_demo())
