/* The C interface of megamem's compiled core. No C++ type crosses it, and no exception.
 *
 * Planning. A problem of n buffers comes as three arrays: buffer i wants size[i] units in the sections first[i] .. last[i] - 1.
 * A section is a maximal set of buffers that are live together (see planner/allocation/sweep.py), so two buffers
 * conflict exactly when they share a section. Nothing is kept between calls; calls may run in parallel.
 */
#ifndef MEGAMEM_H_
#define MEGAMEM_H_

#include <stddef.h>
#include <stdint.h>

/* Raised with every change of a signature or meaning below. */
#define MEGAMEM_ABI 3

#ifdef __cplusplus
extern "C" {
#endif

/* Called now and then from a long computation with the nodes visited so far; other than 0 asks it to stop. */
typedef int32_t (*megamem_poll)(uint64_t nodes);

enum megamem_status {
  MEGAMEM_FOUND = 0,     /* offset[] is complete */
  MEGAMEM_NONE = 1,      /* proven: there is no solution */
  MEGAMEM_LIMIT = 2,     /* the limit of nodes was reached */
  MEGAMEM_STOPPED = 3,   /* poll asked for it */
  MEGAMEM_NO_MEMORY = 4, /* the computation needs more memory than there is */
};

int32_t megamem_abi(void);

/* Place buffers one after the other, in `order` (a permutation of 0 .. n-1), each into a gap between those placed
 * before: the lowest that is large enough or, with best_fit, the smallest. Writes offset[n]. */
int32_t megamem_first_fit(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size,
                          const int32_t* order, int32_t best_fit, int64_t* offset, megamem_poll poll);

/* Search for offsets below `capacity`, exhaustively unless `max_nodes` placements were tried before.
 * `preorder` (a permutation) breaks ties: earlier means tried first. With `fullest_first` it comes second to the size of
 * what waits in the fullest section of a buffer. Writes offset[n] if FOUND, and *nodes. */
int32_t megamem_canonical_search(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size,
                                 int64_t capacity, const int32_t* preorder, int32_t fullest_first, uint64_t max_nodes,
                                 int64_t* offset, uint64_t* nodes, megamem_poll poll);

/* Serving. An arena hands out planned requests at their places; for others, and whenever it is in doubt, it returns
 * NULL and the caller asks the native allocator. All functions may be called from any thread at any time. */
typedef struct megamem_arena megamem_arena;

/* Where the arena's bytes come from. `reserve` returns NULL when there are none. The others may be NULL: without `fill`
 * nothing is poisoned, without `is_filled` poison is not looked at, and without events (`mark` after the work that is
 * queued on a stream, `is_done`, which also disposes of a mark that is) a block that a second stream used is kept for
 * good. */
typedef struct megamem_device {
  void* (*reserve)(size_t nbytes);
  void (*release)(void* at, size_t nbytes);
  void (*fill)(void* at, int value, size_t nbytes, uint64_t stream);
  int32_t (*is_filled)(const void* at, int value, size_t nbytes);
  void* (*mark)(uint64_t stream);
  int32_t (*is_done)(void* mark);
} megamem_device;

/* In place of an offset: the native allocator serves the request; with OPTIONAL it may also not come. */
#define MEGAMEM_NATIVE (-1)
#define MEGAMEM_OPTIONAL (-2)

enum megamem_arena_status {
  MEGAMEM_OK = 0,
  MEGAMEM_BAD_PLAN = 1,    /* an offset or size that cannot be, or no such plan */
  MEGAMEM_NO_ROOM = 2,     /* `reserve` failed; nothing is served */
};

enum megamem_event_kind {
  MEGAMEM_EVENT_MALLOC = 0,
  MEGAMEM_EVENT_FREE = 1,
  MEGAMEM_EVENT_USE = 2, /* by `stream`, which is not the block's own */
  MEGAMEM_EVENT_STEP = 3, /* a step begins */
};

typedef struct megamem_event {
  int64_t kind;
  uint64_t address;
  int64_t size; /* of a malloc, as asked for */
  uint64_t stream;
  int64_t time_ns; /* since the epoch */
} megamem_event;

/* Requests while a plan is served, by what became of them: their number and, at the same place in the second half,
 * their bytes. */
enum megamem_counter {
  MEGAMEM_SERVED = 0,   /* from the arena */
  MEGAMEM_UNPLANNED = 1, /* by plan not from the arena */
  MEGAMEM_MISSED = 2,   /* not the request that the plan has next, or none it has */
  MEGAMEM_CONFLICT = 3, /* its place was still taken */
  MEGAMEM_SMALL = 4,    /* below the plan's least size */
  MEGAMEM_ELSEWHERE = 5, /* on another stream */
  MEGAMEM_NUM_FATES = 6,
  /* totals, after the 2 x NUM_FATES numbers above */
  MEGAMEM_LIVE_BYTES = 12,
  MEGAMEM_PEAK_BYTES = 13,
  MEGAMEM_CAPACITY = 14,
  MEGAMEM_LOSSES = 15,   /* how often the matcher lost its place */
  MEGAMEM_DEFERRED = 16, /* blocks that were kept for a second stream */
  MEGAMEM_STAINED = 17,  /* blocks whose poison was gone when they were handed out: written to after their free */
  MEGAMEM_UNKNOWN = 18,  /* frees of addresses inside the arena where no block began */
  MEGAMEM_DROPPED = 19,  /* events that did not fit into the log */
  MEGAMEM_RETIRED = 20,  /* former arenas that still hold a block */
  MEGAMEM_NUM_COUNTERS = 21
};

megamem_arena* megamem_arena_create(const megamem_device* device); /* NULL without memory */
/* An arena over ordinary host memory. */
megamem_arena* megamem_arena_create_host(void);
void megamem_arena_destroy(megamem_arena* arena);

/* Plan `plan` (0 or more) is these n requests in order; it replaces one of that number. Offsets are multiples of 512.
 * A size of 0 stands for any size. Requests below `min_size` are in no plan and are left to the native allocator. */
int32_t megamem_arena_load(megamem_arena* arena, int32_t plan, int32_t n, const int64_t* size, const int64_t* offset,
                           int64_t min_size);
/* A step begins: serve `plan` to requests on `stream`; -1: none. */
int32_t megamem_arena_begin(megamem_arena* arena, int32_t plan, uint64_t stream);
/* Serve no more until the next begin. */
void megamem_arena_end(megamem_arena* arena);
/* Forget all plans and give the memory back, that of live blocks with the last of them. */
void megamem_arena_reset(megamem_arena* arena);
/* Give the memory back until the next begin, if no block is live: whether it did. */
int32_t megamem_arena_shrink(megamem_arena* arena);

void* megamem_arena_malloc(megamem_arena* arena, size_t size, uint64_t stream);
int32_t megamem_arena_free(megamem_arena* arena, void* at);
int32_t megamem_arena_record_use(megamem_arena* arena, void* at, uint64_t stream);

/* Log every malloc and free, the native allocator's too, until `max_events` are in it; switching on empties the log. */
void megamem_arena_watch(megamem_arena* arena, int32_t on, int64_t max_events);
void megamem_arena_note_malloc(megamem_arena* arena, void* at, size_t size, uint64_t stream);
void megamem_arena_note_free(megamem_arena* arena, void* at);
int64_t megamem_arena_num_events(megamem_arena* arena);
int64_t megamem_arena_read_events(megamem_arena* arena, megamem_event* out, int64_t max);

/* Fill with 0xFF (NaN) whatever is free of the arena, always. */
void megamem_arena_poison(megamem_arena* arena, int32_t on);
void megamem_arena_counters(megamem_arena* arena, int64_t* out);
/* The live blocks by offset: how many there are; at most `max` are written. */
int64_t megamem_arena_blocks(megamem_arena* arena, int64_t* offset, int64_t* size, int64_t max);
void* megamem_arena_base(megamem_arena* arena);

/* Where a sequence of sizes follows another: index[i] is the place of other[i] in `reference`, rising, or -1. A place
 * may have another size. */
int32_t megamem_align(int32_t num_reference, const int64_t* reference, int32_t num_other, const int64_t* other,
                      int32_t* index);

#ifdef __cplusplus
}
#endif

#endif /* MEGAMEM_H_ */
