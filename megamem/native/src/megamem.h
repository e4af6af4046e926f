/* The C interface of megamem's compiled core. No C++ type crosses it, and no exception.
 *
 * A problem of n buffers comes as three arrays: buffer i wants size[i] units in the sections first[i] .. last[i] - 1.
 * A section is a maximal set of buffers that are live together (see planner/allocation/sweep.py), so two buffers
 * conflict exactly when they share a section. Nothing is kept between calls; calls may run in parallel.
 */
#ifndef MEGAMEM_H_
#define MEGAMEM_H_

#include <stdint.h>

/* Raised with every change of a signature or meaning below. */
#define MEGAMEM_ABI 1

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
 * `preorder` (a permutation) breaks ties: earlier means tried first. Writes offset[n] if FOUND, and *nodes. */
int32_t megamem_canonical_search(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size,
                                 int64_t capacity, const int32_t* preorder, uint64_t max_nodes, int64_t* offset,
                                 uint64_t* nodes, megamem_poll poll);

#ifdef __cplusplus
}
#endif

#endif /* MEGAMEM_H_ */
