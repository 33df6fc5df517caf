/* Runs a generated model on this computer: host INPUT OUTPUT TRACE, files of raw integers. */
#include <stdio.h>

#include "model.h"

static FILE *trace_file;

#ifdef CACTUS_EDGE_TRACE
void cactus_edge_trace(int32_t layer, const void *data, int32_t bytes)
{
  (void)layer;
  fwrite(data, 1, (size_t)bytes, trace_file);
}
#endif

int main(int count, char **arguments)
{
  static int8_t input[CACTUS_EDGE_INPUT_BYTES], output[CACTUS_EDGE_OUTPUT_BYTES];
  if (count != 4) return 2;
  FILE *from = fopen(arguments[1], "rb"), *to = fopen(arguments[2], "wb");
  trace_file = fopen(arguments[3], "wb");
  if (!from || !to || !trace_file) return 3;
  while (fread(input, 1, sizeof input, from) == sizeof input) {
    cactus_edge_run((const void *)input, (void *)output);
    if (fwrite(output, 1, sizeof output, to) != sizeof output) return 4;
  }
  if (fclose(to) || fclose(trace_file)) return 4;
  return fclose(from) ? 3 : 0;
}
