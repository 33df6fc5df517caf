/* The smallest program around a generated model: vector table, start-up, endless inference.

   A product does the same with its own input and output. The emulator lets it boot up to `ready`
   and then calls the functions of the model with these buffers. */
#include "cactus_edge.h"

extern uint32_t data_load, data_start, data_end, bss_start, bss_end, stack_top;

int8_t input_buffer[CACTUS_EDGE_INPUT_BYTES] __attribute__((aligned(4)));
#ifdef CACTUS_EDGE_CERTIFIED
cactus_edge_result output_buffer;
#else
int8_t output_buffer[CACTUS_EDGE_OUTPUT_BYTES] __attribute__((aligned(4)));
#endif
volatile int32_t status;

__attribute__((noinline, used)) void ready(void) { __asm volatile("" ::: "memory"); }

#ifdef CACTUS_EDGE_TRACE
/* The emulator stops here and reads the three arguments. */
__attribute__((noinline, used)) void cactus_edge_trace(int32_t layer, const void *data,
                                                       int32_t bytes)
{
  __asm volatile("" ::"r"(layer), "r"(data), "r"(bytes) : "memory");
}
#endif

__attribute__((noreturn)) void reset(void)
{
  const uint32_t *source = &data_load;
  for (uint32_t *target = &data_start; target < &data_end; target++) *target = *source++;
  for (uint32_t *target = &bss_start; target < &bss_end; target++) *target = 0;
  status = cactus_edge_init();
  for (;;) {
    ready();
#ifdef CACTUS_EDGE_CERTIFIED
    status = cactus_edge_predict_certified((const void *)input_buffer, 1, &output_buffer);
#endif
    status = cactus_edge_run((const void *)input_buffer, (void *)&output_buffer);
    status = cactus_edge_verify();
  }
}

__attribute__((noreturn)) static void fault(void)
{
  for (;;) {
  }
}

/* A Cortex-M reads the first two words; on RISC-V the emulator does. */
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
  &stack_top, (const void *)reset, (const void *)fault, (const void *)fault,
};
