"""``python -m cactus_edge`` and the command ``cactus-edge``; Ctrl-C never shows a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with the project's code."""
    try:
        from cactus_edge.cli import run

        sys.exit(run())
    except KeyboardInterrupt:  # while the modules are loaded
        sys.exit(130)


if __name__ == "__main__":
    main()
