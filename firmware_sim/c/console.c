/* A board whose serial port has the console on it: start-up, the driver of the port, endless loop.

   The port is the APB UART of Arm's Cortex-M System Design Kit (Technical Reference Manual, DDI
   0479, 4.3), as in QEMU's mps2 machines; a real board has its own registers in the same places of
   this text. */
#include "${prefix}_console.h"

extern uint32_t data_load, data_start, data_end, bss_start, bss_end, stack_top;

static volatile uint32_t *const uart = (volatile uint32_t *)$uart;
enum { DATA, STATE, CONTROL, INTERRUPTS, DIVIDER };
enum { TRANSMITTER_FULL = 1, RECEIVER_FULL = 2, TRANSMIT = 1, RECEIVE = 2 };

volatile int32_t status;

__attribute__((noinline, used)) void ready(void) { __asm volatile("" ::: "memory"); }

void ${prefix}_console_write(uint8_t byte)
{
  while (uart[STATE] & TRANSMITTER_FULL) {
  }
  uart[DATA] = byte;
}

static uint8_t received(void)
{
  while (!(uart[STATE] & RECEIVER_FULL)) {
  }
  return (uint8_t)uart[DATA];
}

__attribute__((noreturn)) void reset(void)
{
  const uint32_t *source = &data_load;
  for (uint32_t *target = &data_start; target < &data_end; target++) *target = *source++;
  for (uint32_t *target = &bss_start; target < &bss_end; target++) *target = 0;
  uart[DIVIDER] = 16;
  uart[CONTROL] = TRANSMIT | RECEIVE;
  status = ${prefix}_console_start(&bss_end);
  ready();
  for (;;) ${prefix}_console_receive(received());
}

__attribute__((noreturn)) static void fault(void)
{
  for (;;) {
  }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
  &stack_top, (const void *)reset, (const void *)fault, (const void *)fault,
};
