"""A serial console for the library: what a board has to say and to answer, see docs/console.md.

The numbers of the protocol stand here, once: the header gets them, and the host reads them.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from importlib import resources

from cactus_edge.graph import Graph

PROTOCOL = 1


class Kind(IntEnum):
    """What a request asks for; its answer has ``ANSWER`` added. ``LAYER`` comes in between."""

    HELLO = 1
    VERIFY = 2
    RUN = 3
    LAYERS = 4
    CERTIFY = 5
    MEMORY = 6
    LAYER = 0x47


ANSWER = 0x80


class Status(IntEnum):
    """Of an answer: 0 and the errors of the model itself, see its header; those of the console."""

    OK = 0
    CRC = 1
    NOT_READY = 2
    LEVELS = 3
    FRAME = 64
    KIND = 65
    LENGTH = 66
    ABSENT = 67


class Feature(IntFlag):
    """What a board can do besides inference."""

    CERTIFY = 1
    LAYERS = 2


_KINDS = {
    Kind.HELLO: "which model this is, its sizes, and what the console can do",
    Kind.VERIFY: "check the CRC of all weights and tables",
    Kind.RUN: "one inference: the input; ticks and output",
    Kind.LAYERS: "the same; a frame for each layer comes before the answer",
    Kind.CERTIFY: "radius and input; ticks and all fields of the result",
    Kind.MEMORY: "deepest stack since the start, and how much there is",
    Kind.LAYER: "index and output of a layer",
}
_ERRORS = {
    Status.FRAME: "a frame was damaged: its stuffing, its CRC or its length",
    Status.KIND: "no such request",
    Status.LENGTH: "not the number of bytes that this request has",
    Status.ABSENT: "the firmware was built without it",
}


def files(graph: Graph, prefix: str, profile: str) -> dict[str, str]:
    """``<prefix>_console.h`` and ``.c`` for a resolved graph, and ``main_console.c``."""
    text = (resources.files("cactus_edge.csource") / "console.c").read_text(encoding="utf-8")
    upper = prefix.upper()
    renamed = text.replace("CACTUS_EDGE_", f"{upper}_").replace("cactus_edge_", f"{prefix}_")
    return {
        f"{prefix}_console.h": _header(graph, prefix, profile),
        f"{prefix}_console.c": renamed,
        "main_console.c": _example(prefix),
    }


def _header(graph: Graph, prefix: str, profile: str) -> str:
    upper = prefix.upper()
    kinds = "\n".join(
        f"  {upper}_CONSOLE_{kind.name} = {kind.value}, /* {meaning} */"
        for kind, meaning in _KINDS.items()
    )
    errors = ",\n".join(
        f"  {upper}_CONSOLE_ERROR_{status.name} = {status.value} /* {meaning} */"
        for status, meaning in _ERRORS.items()
    )
    features = ", ".join(
        f"{upper}_CONSOLE_HAS_{feature.name} = {feature.value}" for feature in Feature
    )
    return f"""\
/* A console for {prefix} on a serial line; `cactus-edge validate --device` talks to it.

   A board defines {prefix}_console_write and hands every byte that it receives to
   {prefix}_console_receive; answers are written before that returns. */
#ifndef {upper}_CONSOLE_H
#define {upper}_CONSOLE_H

#include "{prefix}.h"

enum {{
{kinds}
  {upper}_CONSOLE_ANSWER = {ANSWER}
}};
enum {{
{errors}
}};
enum {{ {features} }};
enum {{ {upper}_CONSOLE_PROTOCOL = {PROTOCOL} }};

/** Operators of the model. */
#define {upper}_CONSOLE_OPERATORS {len(graph.core)}
/** Fingerprint of the graph, and the rounding profile. */
#define {upper}_CONSOLE_TEXT "{graph.fingerprint()}{profile}"

#ifdef __cplusplus
extern "C" {{
#endif

/** Call it once, before all else; it checks the CRC and initializes the model.
    @param lowest where the stack may grow down to, to measure its depth; a null pointer if unknown
    @return what {prefix}_init returns; the console answers in any case */
int32_t {prefix}_console_start(void *lowest);

/** Take one byte from the line; writes an answer if a request ends with it. */
void {prefix}_console_receive(uint8_t byte);

/** To be defined by the board: put one byte on the line, waiting while it is busy. */
void {prefix}_console_write(uint8_t byte);

#ifdef {upper}_CONSOLE_TICKS
/** To be defined by the board if {upper}_CONSOLE_TICKS is the frequency of a counter that wraps at
    2^32, in Hz: its value. */
uint32_t {prefix}_console_ticks(void);
#endif

#ifdef __cplusplus
}}
#endif

#endif
"""


def _example(prefix: str) -> str:
    return f"""\
/* The console on standard input and output of a computer, as a board has it on its serial port:
   socat TCP-LISTEN:5000,reuseaddr,fork EXEC:./console

   On a board, `main` initializes the port and hands received bytes over in an endless loop. */
#include <stdio.h>

#include "{prefix}_console.h"

void {prefix}_console_write(uint8_t byte)
{{
  putchar(byte);
}}

int main(void)
{{
  {prefix}_console_start(0);
  for (int byte; (byte = getchar()) != EOF;) {{
    {prefix}_console_receive((uint8_t)byte);
    if (byte == 0) fflush(stdout);
  }}
  return 0;
}}
"""
