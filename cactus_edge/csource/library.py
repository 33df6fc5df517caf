"""What makes a library folder of header and source: an example, two build files, a few words."""

from __future__ import annotations

from cactus_edge.csource.text import c_type
from cactus_edge.graph import Graph


def surroundings(
    graph: Graph, prefix: str, profile: str, *, certified: bool, serial: bool
) -> dict[str, str]:
    """``main.c``, ``Makefile``, ``CMakeLists.txt`` and ``README.md``."""
    makefile, cmake = _MAKEFILE, _CMAKE
    if serial:
        for part, changed in _MAKE_CONSOLE.items():
            makefile = makefile.replace(part, changed)
        cmake += _CMAKE_CONSOLE
    return {
        "main.c": _example(graph, prefix, certified=certified),
        "Makefile": makefile.replace("MODEL", prefix.upper()).replace("model", prefix),
        "CMakeLists.txt": cmake.replace("model", prefix),
        "README.md": _readme(graph, prefix, profile, certified=certified, serial=serial),
    }


def _example(graph: Graph, prefix: str, *, certified: bool) -> str:
    upper = prefix.upper()
    given, result = (c_type(graph.tensors[i].dtype) for i in (graph.core_input, graph.logits))
    declared, proof, end = "", "", r"\n"
    if certified:
        declared, end = f"\n  static {prefix}_result result;", ""
        proof = f"""
    if ({prefix}_predict_certified(input, 1, &result) != {upper}_OK) return 3;
    printf(" %s\\n", result.certified ? "certified" : "not certified");"""
    return f"""\
/* Labels of inputs from a file of stored integers, {upper}_INPUT_BYTES each: example < inputs.bin

   On a board, fill `input` from your sensor and call the same functions. */
#include <stdio.h>

#include "{prefix}.h"

int main(void)
{{
  static {given} input[{upper}_INPUT_BYTES];
  static {result} output[{upper}_OUTPUT_BYTES];{declared}
  if ({prefix}_init() != {upper}_OK) return 1;
  while (fread(input, 1, sizeof input, stdin) == sizeof input) {{
    if ({prefix}_run(input, output) != {upper}_OK) return 2;
    int32_t label = 0;
    for (int32_t n = 1; n < {upper}_OUTPUT_BYTES; n++)
      if (output[n] > output[label]) label = n;
    printf("%d{end}", (int)label);{proof}
  }}
  return 0;
}}
"""


_MAKEFILE = """\
CC ?= cc
AR ?= ar
CFLAGS ?= -O2 -Wall -Wextra

all: libmodel.a example

model.o: model.c model.h
\t$(CC) -std=c99 $(CFLAGS) -c model.c -o $@

libmodel.a: model.o
\t$(AR) rcs $@ model.o

example: main.c libmodel.a
\t$(CC) -std=c99 $(CFLAGS) main.c libmodel.a -o $@

clean:
\trm -f model.o libmodel.a example

.PHONY: all clean
"""

_CMAKE = """\
cmake_minimum_required(VERSION 3.13)
project(model C)

add_library(model STATIC model.c)
set_target_properties(model PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
target_include_directories(model PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})

# The example needs an operating system; the library does not.
if(NOT CMAKE_CROSSCOMPILING)
  add_executable(model_example main.c)
  target_link_libraries(model_example PRIVATE model)
endif()
"""

# What becomes of parts of the Makefile, by what they are without a console.
_MAKE_CONSOLE = {
    "clean:\n": """\
console: main_console.c model_console.c model_console.h model.c model.h
\t$(CC) -std=c99 $(CFLAGS) -DMODEL_TRACE main_console.c model_console.c model.c -o $@

clean:
""",
    "libmodel.a example\n": "libmodel.a example console\n",
}

_CMAKE_CONSOLE = """
# Link it beside the library where a serial port is; see model_console.h.
add_library(model_console STATIC model_console.c)
set_target_properties(model_console PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
target_link_libraries(model_console PUBLIC model)
"""


def _readme(graph: Graph, prefix: str, profile: str, *, certified: bool, serial: bool) -> str:
    given, result = (graph.tensors[i] for i in (graph.core_input, graph.logits))
    proof = (
        f"`{prefix}_predict_certified` also proves the label for all inputs within a radius.\n"
        if certified
        else ""
    )
    line = (
        f"`{prefix}_console.h` and `.c` answer requests on a serial line: `cactus-edge validate "
        "MODEL --data DATA --device /dev/ttyACM0` compares the board with the model. "
        "`make console` builds them for this computer.\n"
        if serial
        else ""
    )
    return f"""\
# {prefix}

A quantized network as freestanding C99: `{prefix}.h` says what each function does. Call
`{prefix}_init` once (it checks a CRC-32 of all weights), then `{prefix}_run`.
{proof}{line}
Input: {list(given.shape[1:])} `{c_type(given.dtype)}`, output: {list(result.shape[1:])} \
`{c_type(result.dtype)}`, stored integers. Rounding: {profile}.
`make` builds `lib{prefix}.a` and an example; with CMake, `add_subdirectory` and link `{prefix}`.
Graph {graph.fingerprint()}.
"""
