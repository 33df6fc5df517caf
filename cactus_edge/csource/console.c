/* A console for a serial line: frames with requests come in byte by byte, frames with answers go
   out. The protocol: docs/console.md of cactus_edge. No heap, no library, no clock. */
#include "cactus_edge_console.h"

#define HEADER_BYTES 8u
#define CRC_BYTES 4u
#define LEVELS_BYTES 4u
#define BUFFER_BYTES (HEADER_BYTES + LEVELS_BYTES + CACTUS_EDGE_INPUT_BYTES + CRC_BYTES)
#define PATTERN 0xc5u
/* Of the stack, what the function that paints it may have in use itself; it counts as used. */
#define UNPAINTED 128u

/* The model's elements are bytes; words are there for the alignment of the input. */
static union {
  uint32_t words[(BUFFER_BYTES + 3u) / 4u];
  uint8_t bytes[BUFFER_BYTES];
} request;

static uint32_t received; /* bytes of this frame, BUFFER_BYTES + 1 if there are more */
static uint8_t block_left, zero_follows, begun;

static uint8_t block[254];
static uint8_t block_count;
static uint32_t sent_crc;

static uint8_t *stack_lowest, *stack_limit, *stack_top;

static uint32_t crc_of(uint32_t crc, uint8_t byte)
{
  crc ^= byte;
  for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1u)));
  return crc;
}

static uint32_t word(const uint8_t *at)
{
  return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Consistent overhead byte stuffing: a block of up to 254 bytes without a zero, behind its length
   and one. */
static void end_block(uint8_t code)
{
  cactus_edge_console_write(code);
  for (uint32_t n = 0; n < block_count; n++) cactus_edge_console_write(block[n]);
  block_count = 0;
}

static void stuff(uint8_t byte)
{
  if (byte == 0) {
    end_block((uint8_t)(block_count + 1u));
    return;
  }
  block[block_count++] = byte;
  if (block_count == sizeof block) end_block(255);
}

static void send(uint32_t value, uint32_t bytes)
{
  for (uint32_t n = 0; n < bytes; n++) {
    const uint8_t byte = (uint8_t)(value >> 8 * n);
    sent_crc = crc_of(sent_crc, byte);
    stuff(byte);
  }
}

static void send_bytes(const void *data, uint32_t bytes)
{
  const uint8_t *const at = (const uint8_t *)data;
  for (uint32_t n = 0; n < bytes; n++) send(at[n], 1);
}

/* A header; `length` bytes have to follow, then `end`. */
static void begin(uint8_t kind, int32_t status, uint32_t length)
{
  sent_crc = 0xffffffffu;
  block_count = 0;
  send(kind, 1);
  send((uint32_t)status, 1);
  send(request.bytes[2], 1);
  send(request.bytes[3], 1);
  send(length, 4);
}

static void end(void)
{
  send(sent_crc ^ 0xffffffffu, CRC_BYTES);
  end_block((uint8_t)(block_count + 1u));
  cactus_edge_console_write(0);
}

static void answer(int32_t status)
{
  begin(request.bytes[0] | CACTUS_EDGE_CONSOLE_ANSWER, status, 0);
  end();
}

static uint32_t ticks(void)
{
#ifdef CACTUS_EDGE_CONSOLE_TICKS
  return cactus_edge_console_ticks();
#else
  return 0;
#endif
}

#ifdef CACTUS_EDGE_TRACE
static uint8_t reporting;

void cactus_edge_trace(int32_t layer, const void *data, int32_t bytes)
{
  if (!reporting) return;
  begin(CACTUS_EDGE_CONSOLE_LAYER, CACTUS_EDGE_OK, 4u + (uint32_t)bytes);
  send((uint32_t)layer, 4);
  send_bytes(data, (uint32_t)bytes);
  end();
}
#endif

static void hello(void)
{
  static const char text[] = CACTUS_EDGE_CONSOLE_TEXT;
  uint32_t features = 0, rate = 0;
#ifdef CACTUS_EDGE_CERTIFIED
  features |= CACTUS_EDGE_CONSOLE_HAS_CERTIFY;
#endif
#ifdef CACTUS_EDGE_TRACE
  features |= CACTUS_EDGE_CONSOLE_HAS_LAYERS;
#endif
#ifdef CACTUS_EDGE_CONSOLE_TICKS
  rate = CACTUS_EDGE_CONSOLE_TICKS;
#endif
  begin(CACTUS_EDGE_CONSOLE_HELLO | CACTUS_EDGE_CONSOLE_ANSWER, CACTUS_EDGE_OK, 36u + (uint32_t)sizeof text - 1u);
  send(CACTUS_EDGE_CONSOLE_PROTOCOL, 2);
  send(features, 2);
  send(CACTUS_EDGE_INPUT_BYTES, 4);
  send(CACTUS_EDGE_OUTPUT_BYTES, 4);
  send(CACTUS_EDGE_CONSOLE_OPERATORS, 4);
  send(CACTUS_EDGE_ARENA_BYTES, 4);
  send(CACTUS_EDGE_ARENA_LOWER_BOUND, 4);
  send(CACTUS_EDGE_TABLE_BYTES, 4);
  send(CACTUS_EDGE_CRC32, 4);
  send(rate, 4);
  send_bytes(text, (uint32_t)sizeof text - 1u);
  end();
}

static void run(void)
{
  static int8_t output[CACTUS_EDGE_OUTPUT_BYTES];
  const uint32_t start = ticks();
  const int32_t status =
    cactus_edge_run((const void *)(request.bytes + HEADER_BYTES), (void *)output);
  const uint32_t taken = ticks() - start;
  if (status) {
    answer(status);
    return;
  }
  begin(request.bytes[0] | CACTUS_EDGE_CONSOLE_ANSWER, status, 4u + CACTUS_EDGE_OUTPUT_BYTES);
  send(taken, 4);
  send_bytes(output, sizeof output);
  end();
}

#ifdef CACTUS_EDGE_CERTIFIED
static void certify(void)
{
  static cactus_edge_result result;
  const uint8_t *const payload = request.bytes + HEADER_BYTES;
  const uint32_t start = ticks();
  const int32_t status = cactus_edge_predict_certified((const void *)(payload + LEVELS_BYTES),
                                                       (int32_t)word(payload), &result);
  const uint32_t taken = ticks() - start;
  if (status) {
    answer(status);
    return;
  }
  begin(request.bytes[0] | CACTUS_EDGE_CONSOLE_ANSWER, status, 12u + 15u * CACTUS_EDGE_OUTPUT_BYTES);
  send(taken, 4);
  send((uint32_t)result.label, 4);
  send((uint32_t)result.certified, 4);
  send_bytes(result.logits, CACTUS_EDGE_OUTPUT_BYTES);
  send_bytes(result.lower, CACTUS_EDGE_OUTPUT_BYTES);
  send_bytes(result.upper, CACTUS_EDGE_OUTPUT_BYTES);
  for (uint32_t n = 0; n < CACTUS_EDGE_OUTPUT_BYTES; n++) send((uint32_t)result.leads[n], 4);
  for (uint32_t n = 0; n < CACTUS_EDGE_OUTPUT_BYTES; n++) {
    const uint64_t margin = (uint64_t)result.margins[n];
    send((uint32_t)margin, 4);
    send((uint32_t)(margin >> 32), 4);
  }
  end();
}
#endif

static void memory(void)
{
  const uint8_t *at = stack_lowest;
  while (at < stack_limit && *at == PATTERN) at++;
  begin(CACTUS_EDGE_CONSOLE_MEMORY | CACTUS_EDGE_CONSOLE_ANSWER, CACTUS_EDGE_OK, 8);
  send((uint32_t)(stack_top - at), 4);
  send((uint32_t)(stack_top - stack_lowest), 4);
  end();
}

static int32_t expects(uint32_t bytes)
{
  if (word(request.bytes + 4) == bytes) return 1;
  answer(CACTUS_EDGE_CONSOLE_ERROR_LENGTH);
  return 0;
}

static void serve(void)
{
  switch (request.bytes[0]) {
  case CACTUS_EDGE_CONSOLE_HELLO:
    if (expects(0)) hello();
    return;
  case CACTUS_EDGE_CONSOLE_VERIFY:
    if (expects(0)) answer(cactus_edge_verify());
    return;
  case CACTUS_EDGE_CONSOLE_RUN:
    if (expects(CACTUS_EDGE_INPUT_BYTES)) run();
    return;
  case CACTUS_EDGE_CONSOLE_LAYERS:
#ifdef CACTUS_EDGE_TRACE
    if (!expects(CACTUS_EDGE_INPUT_BYTES)) return;
    reporting = 1;
    run();
    reporting = 0;
#else
    answer(CACTUS_EDGE_CONSOLE_ERROR_ABSENT);
#endif
    return;
  case CACTUS_EDGE_CONSOLE_CERTIFY:
#ifdef CACTUS_EDGE_CERTIFIED
    if (expects(LEVELS_BYTES + CACTUS_EDGE_INPUT_BYTES)) certify();
#else
    answer(CACTUS_EDGE_CONSOLE_ERROR_ABSENT);
#endif
    return;
  case CACTUS_EDGE_CONSOLE_MEMORY:
    if (expects(0)) memory();
    return;
  default:
    answer(CACTUS_EDGE_CONSOLE_ERROR_KIND);
  }
}

static int32_t whole(void)
{
  uint32_t crc = 0xffffffffu;
  if (block_left || received < HEADER_BYTES + CRC_BYTES || received > BUFFER_BYTES) return 0;
  for (uint32_t n = 0; n < received - CRC_BYTES; n++) crc = crc_of(crc, request.bytes[n]);
  if ((crc ^ 0xffffffffu) != word(request.bytes + received - CRC_BYTES)) return 0;
  return word(request.bytes + 4) == received - HEADER_BYTES - CRC_BYTES;
}

static void put(uint8_t byte)
{
  if (received < BUFFER_BYTES) request.bytes[received] = byte;
  if (received <= BUFFER_BYTES) received++;
}

void cactus_edge_console_receive(uint8_t byte)
{
  if (byte == 0) {
    if (begun && whole()) {
      serve();
    } else if (begun) {
      for (uint32_t n = 0; n < HEADER_BYTES; n++) request.bytes[n] = 0;
      answer(CACTUS_EDGE_CONSOLE_ERROR_FRAME);
    }
    received = 0;
    block_left = zero_follows = begun = 0;
  } else if (block_left) {
    block_left--;
    put(byte);
  } else {
    if (zero_follows) put(0);
    begun = 1;
    block_left = (uint8_t)(byte - 1u);
    zero_follows = byte != 255;
  }
}

int32_t cactus_edge_console_start(void *lowest)
{
  volatile uint8_t here = 0;
  const uintptr_t top = (uintptr_t)&here;
  stack_lowest = stack_limit = stack_top = 0;
  if (lowest && (uintptr_t)lowest + UNPAINTED < top) {
    stack_lowest = (uint8_t *)lowest;
    stack_top = (uint8_t *)top;
    stack_limit = (uint8_t *)(top - UNPAINTED);
    for (volatile uint8_t *at = stack_lowest; at < stack_limit; at++) *at = PATTERN;
  }
  return cactus_edge_init();
}
