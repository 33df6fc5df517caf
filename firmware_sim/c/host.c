/* Runs a generated model on this computer: host INPUT OUTPUT TRACE [LEVELS], files of raw integers.

   With LEVELS, an int32_t for each input, the output is a cactus_edge_result for each. Exit status 10 and above: the
   error of the model, plus 10. */
#include <stdio.h>

#include "cactus_edge.h"

static FILE *trace_file;

#ifdef CACTUS_EDGE_TRACE
void cactus_edge_trace(int32_t layer, const void *data, int32_t bytes)
{
  (void)layer;
  fwrite(data, 1, (size_t)bytes, trace_file);
}
#endif

#ifdef CACTUS_EDGE_CERTIFIED
static int32_t certified(const void *input, int32_t levels, FILE *to)
{
  static cactus_edge_result result;
  const int32_t status = cactus_edge_predict_certified(input, levels, &result);
  return fwrite(&result, sizeof result, 1, to) == 1 ? status : -6;
}
#endif

int main(int count, char **arguments)
{
  static int8_t input[CACTUS_EDGE_INPUT_BYTES], output[CACTUS_EDGE_OUTPUT_BYTES];
  if (count != 4 && count != 5) return 2;
  FILE *from = fopen(arguments[1], "rb"), *to = fopen(arguments[2], "wb");
  trace_file = fopen(arguments[3], "wb");
  if (!from || !to || !trace_file) return 3;
#ifdef CACTUS_EDGE_CERTIFIED
  FILE *radii = count == 5 ? fopen(arguments[4], "rb") : 0;
  if (count == 5 && !radii) return 3;
#endif
  int32_t status = cactus_edge_init();
  if (status) return 10 + status;
  while (fread(input, 1, sizeof input, from) == sizeof input) {
#ifdef CACTUS_EDGE_CERTIFIED
    if (count == 5) {
      int32_t levels;
      if (fread(&levels, sizeof levels, 1, radii) != 1) return 3;
      status = certified((const void *)input, levels, to);
      if (status) return 10 + status;
      continue;
    }
#endif
    status = cactus_edge_run((const void *)input, (void *)output);
    if (status) return 10 + status;
    if (fwrite(output, 1, sizeof output, to) != sizeof output) return 4;
  }
  if (fclose(to) || fclose(trace_file)) return 4;
  return fclose(from) ? 3 : 0;
}
