"""CRC-32 over every constant table, and the flag without which nothing runs.

The polynomial and the bit order are zlib's, so ``zlib.crc32`` over the tables' little-endian bytes,
in the order of ``Needs.tables``, is the number that the device has to find. A CRC of 32 bits
detects every single flipped bit and every burst of up to 32 bits, wherever it is. Constants that
are part of instructions (a multiplier that all channels share, say) are not covered.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

_POLYNOMIAL = 0xEDB88320


def crc32(tables: Mapping[str, bytes]) -> int:
    """Of all tables, in order."""
    return zlib.crc32(b"".join(tables.values()))


def functions(prefix: str, tables: Mapping[str, bytes]) -> str:
    """C text: ``<prefix>_init`` and ``<prefix>_verify``; behind the tables."""
    upper = prefix.upper()
    calls = "".join(f"  crc = crc_of(crc, {name}, sizeof {name});\n" for name in tables)
    return f"""\
/* Set by a CRC that was right, to a number that no flipped bit makes of another state. */
#define CHECKED 0x5ac3961eu
static uint32_t checked;

{_crc_of() if tables else ""}int32_t {prefix}_verify(void)
{{
  uint32_t crc = 0xffffffffu;
{calls}  if ((crc ^ 0xffffffffu) == {upper}_CRC32) return {upper}_OK;
  checked = 0;
  return {upper}_ERROR_CRC;
}}

int32_t {prefix}_init(void)
{{
  const int32_t status = {prefix}_verify();
  checked = status == {upper}_OK ? CHECKED : 0;
  return status;
}}
"""


def _crc_of() -> str:
    """C text of the function that continues a CRC over some bytes."""
    steps = ", ".join(f"0x{_step(nibble):08x}u" for nibble in range(16))
    return f"""\
/* Compilers put a copy of the function in place of each call, kilobytes in all. A loop over a list
   of tables would keep the list in flash, where a flipped bit of a length makes it run on. */
#if defined(__GNUC__)
__attribute__((noinline))
#endif
/* zlib's CRC-32, half a byte at a time. Reads are volatile: what counts is what lies in flash. */
static uint32_t crc_of(uint32_t crc, const volatile void *data, uint32_t bytes)
{{
  static const uint32_t steps[16] = {{
    {steps[: len(steps) // 2 + 1].strip()}
    {steps[len(steps) // 2 + 1 :].strip()}
  }};
  const volatile uint8_t *at = (const volatile uint8_t *)data;
  for (uint32_t n = 0; n < bytes; n++) {{
    crc ^= at[n];
    crc = (crc >> 4) ^ steps[crc & 15u];
    crc = (crc >> 4) ^ steps[crc & 15u];
  }}
  return crc;
}}

"""


def _step(nibble: int) -> int:
    """What four bits of the register add when they are shifted out."""
    for _ in range(4):
        nibble = nibble >> 1 ^ (_POLYNOMIAL if nibble & 1 else 0)
    return nibble
