#define _POSIX_C_SOURCE 199309L  // clock_gettime

#include "av1/encoder/av1nb_hook.h"

#include <math.h>
#include <time.h>

#include "av1/common/av1_common_int.h"
#include "av1/encoder/rd.h"

enum { VISITED, LIMITED, IGNORED, RETRIED, OUTSIDE, COUNTS };
enum {
  NONE_SPLIT = 1 << PARTITION_NONE | 1 << PARTITION_SPLIT,
  AB = 0xF << PARTITION_HORZ_A,
  STRIPS = 3 << PARTITION_HORZ_4,
  ALL = (1 << AV1NB_TYPES) - 1
};

static struct {
  const uint16_t *mask;
  uint8_t *best;
  float *cost, *seconds;
  int frames, rows8, cols8, exhaustive, active;
  int frame;  // the one that is being encoded
  int64_t counts[COUNTS];
} hook;

int av1nb_hook_version(void) { return AV1NB_HOOK_VERSION; }

int av1nb_hook_set(const uint16_t *mask, uint8_t *best, float *cost, float *seconds, int frames,
                   int rows8, int cols8, int exhaustive) {
  memset(&hook, 0, sizeof(hook));
  if (!mask && !best && !cost && !seconds && !exhaustive) return 0;
  if (frames < 1 || rows8 < 1 || cols8 < 1) return -1;
  hook.mask = mask;
  hook.best = best;
  hook.cost = cost;
  hook.seconds = seconds;
  hook.frames = frames;
  hook.rows8 = rows8;
  hook.cols8 = cols8;
  hook.exhaustive = exhaustive;
  hook.active = 1;
  return 0;
}

void av1nb_hook_counts(int64_t counts[COUNTS]) {
  memcpy(counts, hook.counts, sizeof(hook.counts));
}

static void tally(int what) { __atomic_fetch_add(&hook.counts[what], 1, __ATOMIC_RELAXED); }

static double thread_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

void av1nb_frame(int display_index) { hook.frame = display_index; }

void av1nb_enter(const AV1_COMP *cpi, PartitionSearchState *state) {
  const PartitionBlkParams *b = &state->part_blk_params;
  const CommonModeInfoParams *mi = &cpi->common.mi_params;
  state->av1nb_mask = 0;
  state->av1nb_cell = -1;
  if (!hook.active || b->bsize < BLOCK_8X8) return;
  if (hook.frame < 0 || hook.frame >= hook.frames || hook.rows8 != (mi->mi_rows + 1) / 2 ||
      hook.cols8 != (mi->mi_cols + 1) / 2) {
    tally(OUTSIDE);
    return;
  }
  tally(VISITED);
  const int level = mi_size_wide_log2[b->bsize] - 1;
  const int64_t row = ((int64_t)hook.frame * 5 + level) * hook.rows8 + b->mi_row / 2;
  state->av1nb_cell = row * hook.cols8 + b->mi_col / 2;
  if (hook.best) hook.best[state->av1nb_cell] = 255;
  for (int t = 0; t < AV1NB_TYPES; ++t) {
    if (hook.cost) hook.cost[AV1NB_TYPES * state->av1nb_cell + t] = NAN;
    if (hook.seconds) hook.seconds[AV1NB_TYPES * state->av1nb_cell + t] = NAN;
  }
}

static int has_chroma_block(const PartitionSearchState *state, PARTITION_TYPE type) {
  const BLOCK_SIZE part = get_partition_subsize(state->part_blk_params.bsize, type);
  return get_plane_block_size(part, state->ss_x, state->ss_y) != BLOCK_INVALID;
}

// Types that the format and the user's settings allow for this block, whatever the encoder's own
// pruning says.
static int legal_types(const AV1_COMP *cpi, const MACROBLOCK *x,
                       const PartitionSearchState *state) {
  const PartitionBlkParams *b = &state->part_blk_params;
  const PartitionCfg *cfg = &cpi->oxcf.part_cfg;
  const int whole = b->has_rows && b->has_cols;
  const int width = b->width;
  const int least = b->min_partition_size_1d;
  if (width > block_size_wide[x->sb_enc.max_partition_size]) return 1 << PARTITION_SPLIT;
  int legal = whole && width >= least ? 1 << PARTITION_NONE : 0;
  if (width <= least) return whole ? legal : 1 << PARTITION_SPLIT;
  legal |= 1 << PARTITION_SPLIT;
  if (!cfg->enable_rect_partitions) return legal;
  for (int i = HORZ; i < NUM_RECT_PARTS; ++i) {
    const int across = i == HORZ ? b->has_cols : b->has_rows;
    const PARTITION_TYPE halves = i == HORZ ? PARTITION_HORZ : PARTITION_VERT;
    if (!across || !has_chroma_block(state, halves)) continue;
    legal |= 1 << halves;
    if (!whole || b->bsize == BLOCK_8X8) continue;
    if (cfg->enable_ab_partitions) legal |= 3 << (i == HORZ ? PARTITION_HORZ_A : PARTITION_VERT_A);
    const PARTITION_TYPE strips = i == HORZ ? PARTITION_HORZ_4 : PARTITION_VERT_4;
    if (cfg->enable_1to4_partitions && b->bsize != BLOCK_128X128 && width >= 4 * least &&
        has_chroma_block(state, strips))
      legal |= 1 << strips;
  }
  return legal;
}

static void prune_halves(PartitionSearchState *state, int left) {
  state->prune_rect_part[HORZ] = !(left >> PARTITION_HORZ & 1);
  state->prune_rect_part[VERT] = !(left >> PARTITION_VERT & 1);
}

// The encoder found nothing in this superblock: from here on its own limits alone hold.
static void withdraw(const AV1_COMP *cpi, PartitionSearchState *state) {
  if (state->part_blk_params.bsize == cpi->common.seq_params->sb_size) tally(RETRIED);
  if (!state->av1nb_mask) return;
  state->do_rectangular_split =
      cpi->oxcf.part_cfg.enable_rect_partitions &&
      (state->partition_rect_allowed[HORZ] || state->partition_rect_allowed[VERT]);
  prune_halves(state, ALL);
  state->av1nb_mask = 0;
}

void av1nb_limit(const AV1_COMP *cpi, const MACROBLOCK *x, PartitionSearchState *state) {
  if (hook.seconds && state->av1nb_cell >= 0) state->av1nb_mark = thread_seconds();
  if (!hook.mask || state->av1nb_cell < 0) return;
  if (x->must_find_valid_partition) {
    withdraw(cpi, state);
    return;
  }
  const int mask = hook.mask[state->av1nb_cell];
  if (mask == 0) return;
  const int legal = legal_types(cpi, x, state);
  if (mask & AV1NB_OVERRIDE || !(mask & NONE_SPLIT)) {
    const int left = mask & legal;
    if (!left) {
      tally(IGNORED);
      return;
    }
    state->partition_none_allowed = left >> PARTITION_NONE & 1;
    state->do_square_split = left >> PARTITION_SPLIT & 1;
    state->partition_rect_allowed[HORZ] = legal >> PARTITION_HORZ & 1;
    state->partition_rect_allowed[VERT] = legal >> PARTITION_VERT & 1;
    state->av1nb_mask = left | AV1NB_OVERRIDE;
    av1nb_after_split(state);
  } else {
    int left = 0;
    if (state->partition_none_allowed) left |= 1 << PARTITION_NONE;
    if (state->do_square_split) left |= 1 << PARTITION_SPLIT;
    for (int i = HORZ; i < NUM_RECT_PARTS; ++i) {
      if (state->do_rectangular_split && state->partition_rect_allowed[i] &&
          !state->prune_rect_part[i])
        left |= 1 << (i == HORZ ? PARTITION_HORZ : PARTITION_VERT);
    }
    left &= mask;
    if (!left || state->terminate_partition_search) {
      tally(IGNORED);
      return;
    }
    state->partition_none_allowed &= left >> PARTITION_NONE & 1;
    state->do_square_split &= left >> PARTITION_SPLIT & 1;
    prune_halves(state, left);
    state->av1nb_mask = left | (mask & legal & (AB | STRIPS));
  }
  tally(LIMITED);
}

// What NONE and SPLIT have shown ends the search of the other types, or of some of them, only where
// the encoder may prune.
void av1nb_after_split(PartitionSearchState *state) {
  if (!(state->av1nb_mask & AV1NB_OVERRIDE)) return;
  state->terminate_partition_search = 0;
  state->do_rectangular_split = (state->av1nb_mask & ALL & ~NONE_SPLIT) != 0;
  prune_halves(state, state->av1nb_mask);
}

int av1nb_extended(const PartitionSearchState *state, int allowed) {
  if (!state->av1nb_mask) return allowed;
  if (!(state->av1nb_mask & (AB | STRIPS))) return 0;
  return state->av1nb_mask & AV1NB_OVERRIDE ? 1 : allowed;
}

int av1nb_force(const PartitionSearchState *state, int first, int count, int *allowed) {
  if (!(state->av1nb_mask & AV1NB_OVERRIDE)) return 0;
  for (int i = 0; i < count; ++i) allowed[i] = state->av1nb_mask >> (first + i) & 1;
  return 1;
}

void av1nb_keep(const AV1_COMP *cpi, const MACROBLOCK *x, const PartitionSearchState *state,
                int first, int count, int *allowed) {
  if (state->av1nb_cell < 0) return;
  // Where nothing has been found yet, libaom 3.12 allows types here that the block cannot have. A
  // search without masks finds something before; one with masks may not.
  const PartitionBlkParams *b = &state->part_blk_params;
  int kept = 0;
  if (b->has_rows && b->has_cols && b->bsize > BLOCK_8X8)
    kept = AB | (legal_types(cpi, x, state) & STRIPS);
  if (state->av1nb_mask) kept &= state->av1nb_mask;
  for (int i = 0; i < count; ++i) allowed[i] &= kept >> (first + i) & 1;
}

void av1nb_tried(PartitionSearchState *state, int type, int64_t cost) {
  if (state->av1nb_cell < 0) return;
  const int64_t entry = AV1NB_TYPES * state->av1nb_cell + type;
  if (hook.cost) hook.cost[entry] = cost == INT64_MAX ? INFINITY : (float)cost;
  if (hook.seconds) {
    const double end = thread_seconds();
    hook.seconds[entry] = (float)(end - state->av1nb_mark);
    state->av1nb_mark = end;
  }
}

void av1nb_leave(const PartitionSearchState *state, int type) {
  if (state->av1nb_cell < 0 || !hook.best || !state->found_best_partition) return;
  hook.best[state->av1nb_cell] = 1 + type;
}

void av1nb_lift(RD_STATS *kept, RD_STATS *bound) {
  if (!hook.exhaustive) return;
  *kept = *bound;
  av1_invalid_rd_stats(bound);
}

void av1nb_drop(const RD_STATS *kept, RD_STATS *bound) {
  if (hook.exhaustive) *bound = *kept;
}
