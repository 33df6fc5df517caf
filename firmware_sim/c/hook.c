/* The emulator calls `count_block` for each basic block that it enters: a histogram by address,
   with no interpreter in the loop. */
#include <stdint.h>

struct histogram {
  uint64_t origin; /* first address of the flash */
  uint64_t slots;  /* one for each halfword of it */
  uint64_t *entries;
  uint32_t *sizes;  /* bytes of the block that starts here */
  uint64_t strange; /* blocks outside the flash, or of a size that changed */
  uint64_t jumps;   /* blocks that do not lie behind the one before */
  uint64_t behind;  /* the address behind the block that was entered last */
};

void count_block(void *engine, uint64_t address, uint32_t size, void *user)
{
  struct histogram *histogram = user;
  const uint64_t slot = (address - histogram->origin) >> 1;
  (void)engine;
  if (address < histogram->origin || slot >= histogram->slots) {
    histogram->strange++;
    return;
  }
  if (histogram->sizes[slot] == 0) histogram->sizes[slot] = size;
  histogram->strange += histogram->sizes[slot] != size;
  histogram->entries[slot]++;
  histogram->jumps += address != histogram->behind;
  histogram->behind = address + size;
}

struct trigger {
  uint64_t until; /* instructions before the fault */
  uint64_t limit; /* instructions before the run counts as endless */
  uint64_t steps;
  void (*fault)(void);
  void (*endless)(void);
};

/* Called before each instruction. */
void count_step(void *engine, uint64_t address, uint32_t size, void *user)
{
  struct trigger *trigger = user;
  (void)engine, (void)address, (void)size;
  if (trigger->steps == trigger->until) trigger->fault();
  if (trigger->steps == trigger->limit) trigger->endless();
  trigger->steps++;
}
