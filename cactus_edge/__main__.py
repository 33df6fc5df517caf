"""``python -m cactus_edge`` and the command ``cactus-edge``; Ctrl-C never shows a traceback."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with the project's code."""
    for name in ("stdout", "stderr"):  # a service may be started without them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        from cactus_edge.cli import run

        sys.exit(run())
    except KeyboardInterrupt:  # while the modules are loaded
        sys.exit(130)


if __name__ == "__main__":
    main()
