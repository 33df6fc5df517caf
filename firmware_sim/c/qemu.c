/* A generated model under QEMU, which reads and writes files of this computer by semihosting.

   input.bin holds inputs; output.bin gets their outputs, or with a self-certifying model and
   levels.bin (an int32_t for each input) their results; ticks.bin gets a uint32_t for each: ticks
   of the system timer, which QEMU derives from a count of instructions if told so. The exit code is
   0, or 10 plus the error of the model. */
#include "cactus_edge.h"

extern uint32_t data_load, data_start, data_end, bss_start, bss_end, stack_top;

enum { OPEN = 1, CLOSE = 2, WRITE = 5, READ = 6, EXIT = 0x20, STOPPED = 0x20026 };
enum { READ_BINARY = 1, WRITE_BINARY = 5 };

static int32_t host(int32_t operation, const void *block)
{
  register int32_t code __asm("r0") = operation;
  register const void *argument __asm("r1") = block;
  __asm volatile("bkpt 0xab" : "+r"(code) : "r"(argument) : "memory");
  return code;
}

static int32_t opened(const char *name, uint32_t length, uint32_t mode)
{
  const uint32_t block[3] = {(uint32_t)name, mode, length};
  return host(OPEN, block);
}

/* 0 if all bytes were moved. */
static int32_t moved(int32_t operation, int32_t file, void *data, uint32_t bytes)
{
  const uint32_t block[3] = {(uint32_t)file, (uint32_t)data, bytes};
  return host(operation, block);
}

enum { TICK_MASK = 0xffffff };
static volatile uint32_t *const timer = (volatile uint32_t *)0xe000e010;

static int32_t run(void)
{
  static int8_t input[CACTUS_EDGE_INPUT_BYTES] __attribute__((aligned(4)));
  static int8_t output[CACTUS_EDGE_OUTPUT_BYTES] __attribute__((aligned(4)));
  const int32_t from = opened("input.bin", 9, READ_BINARY);
  const int32_t to = opened("output.bin", 10, WRITE_BINARY);
  const int32_t radii = opened("levels.bin", 10, READ_BINARY);
  const int32_t log = opened("ticks.bin", 9, WRITE_BINARY);
  int32_t status = cactus_edge_init();
  if (from < 0 || to < 0 || log < 0) return 2;
  timer[1] = TICK_MASK;
  timer[0] = 5; /* count down, by the processor's clock */
  while (!status && moved(READ, from, input, sizeof input) == 0) {
    void *result = output;
    uint32_t bytes = sizeof output, start = timer[2], ticks;
#ifdef CACTUS_EDGE_CERTIFIED
    static cactus_edge_result certified;
    int32_t levels;
    if (radii >= 0) {
      if (moved(READ, radii, &levels, sizeof levels)) return 3;
      start = timer[2];
      status = cactus_edge_predict_certified((const void *)input, levels, &certified);
      result = &certified;
      bytes = sizeof certified;
    } else
#endif
      status = cactus_edge_run((const void *)input, (void *)output);
    ticks = (start - timer[2]) & TICK_MASK;
    if (moved(WRITE, to, result, bytes) || moved(WRITE, log, &ticks, sizeof ticks)) return 4;
  }
  (void)radii;
  host(CLOSE, &to);
  host(CLOSE, &log);
  return status ? 10 + status : 0;
}

static void leave(int32_t code)
{
  const uint32_t block[2] = {STOPPED, (uint32_t)code};
  host(EXIT, block);
  for (;;) {
  }
}

__attribute__((noreturn)) static void fault(void)
{
  leave(9);
  for (;;) {
  }
}

__attribute__((noreturn)) void reset(void)
{
#ifdef __ARM_FEATURE_MVE
  /* Coprocessors 10 and 11 hold the vector registers. */
  *(volatile uint32_t *)0xe000ed88 |= 0xfu << 20;
  __asm volatile("dsb\n\tisb");
#endif
  const uint32_t *source = &data_load;
  for (uint32_t *target = &data_start; target < &data_end; target++) *target = *source++;
  for (uint32_t *target = &bss_start; target < &bss_end; target++) *target = 0;
  leave(run());
  for (;;) {
  }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
  &stack_top, (const void *)reset, (const void *)fault, (const void *)fault,
  (const void *)fault, (const void *)fault, (const void *)fault, (const void *)fault,
};
