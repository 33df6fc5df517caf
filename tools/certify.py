"""``cactus-edge certify``, for people who cloned the repository instead of installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cactus_edge.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["certify", *sys.argv[1:]])
