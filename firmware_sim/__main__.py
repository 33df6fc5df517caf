"""``python -m firmware_sim serve FOLDER --board BOARD``: an emulated board on a serial port."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cactus_edge.errors import CactusEdgeError
from firmware_sim.boards import BOARDS, board_named
from firmware_sim.console import PseudoTerminal, Served, console_texts, listening


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it until it is interrupted; the exit code, see ``cactus_edge.errors``."""
    parser = argparse.ArgumentParser(prog="python -m firmware_sim", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    serve = verbs.add_parser("serve", help="Emulate a board and offer its serial port.")
    serve.add_argument("folder", type=Path, help="what `cactus-edge export-c --console` wrote")
    serve.add_argument("--board", default="STM32F405", help=f"one of {', '.join(BOARDS)}")
    serve.add_argument("--layers", action="store_true", help="build it to tell every layer")
    serve.add_argument("--listen", metavar="HOST:PORT", help="a TCP socket, not a pseudo terminal")
    given = parser.parse_args(arguments)
    try:
        _serve(given)
    except CactusEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def _serve(given: argparse.Namespace) -> None:
    board, texts = board_named(given.board), console_texts(given.folder)
    line = listening(given.listen) if given.listen else PseudoTerminal()
    try:
        served = Served(texts, board, line, layers=given.layers)
        print(line.address, flush=True)
        print(f"an emulated {board.name} answers there; Ctrl-C ends it", file=sys.stderr)
        served.run()
    finally:
        line.close()


if __name__ == "__main__":
    sys.exit(main())
