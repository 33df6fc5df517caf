/* Flips bits of the tables of a generated model on this computer: flips FLIPS INPUTS RESULTS.

   FLIPS are pairs of int32_t: a byte, counted through all tables in the order of the CRC, and a
   bit. For each of them RESULTS gets what cactus_edge_verify returned, one byte, and the label of
   each input with the flip in place and no check of the CRC, one byte each; 255 where it reads
   outside the memory of the process. First of all come the labels without any flip. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>

/* Tables have to be writable here; reads through volatile pointers see every flip. */
#define const
#include "cactus_edge.c"
#undef const

static struct {
  void *data;
  uint32_t bytes;
} tables[] = {
#include "tables.inc"
};

static uint8_t *byte_of(int32_t offset)
{
  uint32_t left = (uint32_t)offset;
  for (uint32_t n = 0; n < sizeof tables / sizeof tables[0]; n++) {
    if (left < tables[n].bytes) return (uint8_t *)tables[n].data + left;
    left -= tables[n].bytes;
  }
  return 0;
}

static sigjmp_buf before;

/* A flip in a sparse table can send a pointer anywhere. Only reads follow it. */
static void stopped(int number)
{
  (void)number;
  siglongjmp(before, 1);
}

static int label_of(void *input)
{
  static int8_t output[CACTUS_EDGE_OUTPUT_BYTES];
  int label = 0;
  if (sigsetjmp(before, 1) || cactus_edge_run(input, (void *)output)) return 255;
  for (int n = 1; n < CACTUS_EDGE_OUTPUT_BYTES; n++)
    if (output[n] > output[label]) label = n;
  return label;
}

int main(int count, char **arguments)
{
  static int8_t input[CACTUS_EDGE_INPUT_BYTES];
  int32_t flip[2];
  if (count != 4) return 2;
  struct sigaction action = {.sa_handler = stopped};
  sigaction(SIGSEGV, &action, 0);
  sigaction(SIGBUS, &action, 0);
  FILE *flips = fopen(arguments[1], "rb"), *to = fopen(arguments[3], "wb");
  FILE *inputs = fopen(arguments[2], "rb");
  if (!flips || !inputs || !to || cactus_edge_init()) return 3;
  for (int first = 1; first || fread(flip, sizeof flip, 1, flips) == 1; first = 0) {
    uint8_t *byte = first ? 0 : byte_of(flip[0]);
    if (!first && !byte) return 4;
    if (byte) *byte ^= (uint8_t)(1u << flip[1]);
    rewind(inputs);
    if (!first) fputc(cactus_edge_verify(), to);
    checked = CHECKED;
    while (fread(input, 1, sizeof input, inputs) == sizeof input) fputc(label_of(input), to);
    if (byte) *byte ^= (uint8_t)(1u << flip[1]);
  }
  return fclose(to) ? 5 : 0;
}
