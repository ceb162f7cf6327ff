// A hook in the recursive RD partition search of libaom's encoder: which partition types a block may
// try, and what each one cost. One caller in the process sets the tables, encodes, and takes them
// away again; unused, every function returns at once.
//
// A table has a cell for each block: [frames][5][rows8][cols8]. The five levels are the square
// blocks 8x8, 16x16, ... 128x128; the cell is the block's top left corner in units of 8x8 pixels.
// Frames count in display order. Where a superblock is searched several times (sb-qp-sweep), the
// tables hold the last search, which is the one that is coded.
#ifndef AV1NB_HOOK_H_
#define AV1NB_HOOK_H_

#include <stdint.h>

#include "av1/encoder/encoder.h"
#include "av1/encoder/encodeframe_utils.h"

#define AV1NB_HOOK_VERSION 1   // changes whenever the exported functions or the tables do
#define AV1NB_OVERRIDE 0x8000  // in a mask: lift the encoder's own pruning for the allowed types
#define AV1NB_TYPES 10

// ---- Exported
int av1nb_hook_version(void);

// Any table may be NULL. Returns 0, or -1 for dimensions below 1. All counts begin at zero again.
//
// mask        bit t allows type t; 0: no opinion
// best        0: never visited, 1 + type that won, 255: visited, no type was found within the cost
//             limit
// cost        [cell][10]: RD cost; NaN: not tried, infinity: given up as too dear before its end
// seconds     [cell][10]: CPU time that the type took, its children included; NaN: not tried
// exhaustive  1: no type is given up; every cost becomes known, and the search takes longer
int av1nb_hook_set(const uint16_t *mask, uint8_t *best, float *cost, float *seconds, int frames,
                   int rows8, int cols8, int exhaustive);

// Blocks visited; limited by a mask; whose mask left nothing and was ignored; superblocks searched
// again without masks; blocks of a frame that has no cell in the tables.
void av1nb_hook_counts(int64_t counts[5]);

// ---- Called by the encoder
void av1nb_frame(int display_index);
void av1nb_enter(const AV1_COMP *cpi, PartitionSearchState *state);
void av1nb_limit(const AV1_COMP *cpi, const MACROBLOCK *x, PartitionSearchState *state);
void av1nb_after_split(PartitionSearchState *state);
int av1nb_extended(const PartitionSearchState *state, int allowed);
int av1nb_force(const PartitionSearchState *state, int first, int count, int *allowed);
void av1nb_keep(const AV1_COMP *cpi, const MACROBLOCK *x, const PartitionSearchState *state,
                int first, int count, int *allowed);
void av1nb_tried(PartitionSearchState *state, int type, int64_t cost);
void av1nb_leave(const PartitionSearchState *state, int type);
void av1nb_lift(RD_STATS *kept, RD_STATS *bound);
void av1nb_drop(const RD_STATS *kept, RD_STATS *bound);

#endif  // AV1NB_HOOK_H_
