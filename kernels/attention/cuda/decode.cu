// Attention of queries over packed pages: pair keys, int4 values, for GPUs with bulk copies (sm_90).
//
// A warp streams groups of 128 tokens of one KV head. Scores are S^T = K q^T and the output is
// O^T = V^T P^T, so K and V go from packed bytes to the registers of the tensor cores' first factor,
// and the columns of the second factor are query heads. README.md explains every step.
//
// Given by the compiler's command line: HEAD_DIM, V_HEAD_DIM (64 or 128), RADIUS_BITS, ANGLE_BITS,
// ARCS (1: arcs of 2 pi / 2^m and one phase table), ROTARY, INTERLEAVED, PAGE_GROUPS (groups of a
// page), QUERY (0 fp16, 1 bf16, 2 fp32), SOFT_CAP (0 or 1), COLUMN_TILES, SPREAD (2: columns stand at even
// places of a tile, 1: at all), WARPS, SLOTS, SLOT_TILES.
#include "exact.cuh"
#include "merge.cuh"
#include "query.cuh"
#include "streams.cuh"

// Dynamic shared memory of a launch, for whoever launches.
extern "C" __device__ const int shared_bytes = kShared;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attend(const void* __restrict__ query, const uint8_t* __restrict__ memory,
       const int* __restrict__ page_table, const int* __restrict__ lengths,
       const int* __restrict__ query_starts, float* __restrict__ out, float* __restrict__ lse,
       uint2* __restrict__ partial, long long key_codes, long long key_parameters,
       long long key_radii, long long value_codes, long long value_parameters, int sequences,
       int max_pages, int query_heads, int kv_heads, int column_tiles, int even_splits,
       float scale, float soft_cap, uint32_t mark) {
  extern __shared__ __align__(1024) uint8_t shared[];
  // A shuffle, so that the compiler knows that a warp agrees on it.
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  wait_for_launch_before();
  Work work;
  const int parts = kv_heads * column_tiles;
  if (even_splits) {
    share_evenly(lengths, query_starts, parts, even_splits, work);
  } else if (!deal(lengths, query_starts, sequences, parts, max_pages * PAGE_GROUPS, work)) {
    return;
  }
  // Pages are asked for before lengths and rows have come: one wait serves all three.
  const int* const pages = page_table + static_cast<size_t>(work.sequence) * max_pages;
  // Page of a group in units of 256 bytes.
  const auto page_of = [&](int group) {
    if (group >= max_pages * PAGE_GROUPS) return 0u;
    return static_cast<uint32_t>(__ldg(pages + group / PAGE_GROUPS));
  };
  const int stride = work.splits * WARPS;
  int group = work.split * WARPS + warp, next = group + stride;
  const uint32_t first_page = page_of(group);
  uint32_t next_page = page_of(next);
  const int head = work.part % kv_heads, first_column = work.part / kv_heads * kColumns;
  const int share = query_heads / kv_heads;
  const int columns = min(kColumns, work.rows * share - first_column);
  if (columns <= 0) return;  // so do all blocks of the part
  const int length = work.length, groups = (length + kGroup - 1) / kGroup;
  // Row of query, out and lse of a column of this block.
  const auto row_of = [&](int column) {
    const int j = first_column + column;
    return static_cast<size_t>(work.first_row + j / share) * query_heads + head * share + j % share;
  };

  const size_t head_groups = static_cast<size_t>(head) * PAGE_GROUPS;
  key_codes += head_groups * kTiles * kKeyTile;
  value_codes += head_groups * kTiles * kValueTile;
  value_parameters += head_groups * kValueHead;
#if ARCS
  key_parameters += head_groups * 2 * kPairs;
  key_radii += head_groups * 4 * kPairs;
#else
  key_parameters += head_groups * kKeyHead;
#endif
  const uint32_t base = shared_address(shared);
  const uint32_t barriers = base + kBarrierAt + warp * (SLOTS + 1) * 8;
  const uint32_t head_barrier = barriers + SLOTS * 8;
  const uint32_t ring = base + kRingAt + warp * SLOTS * kSlot;
  uint8_t* const parameters = shared + kKeyHeadAt + warp * kKeyHead;
  uint8_t* const derived = shared + kDerivedAt + warp * kDerived;
  uint8_t* const value_heads = shared + kValueHeadAt + warp * 2 * kValueHead;

  // What one lane asks the copy engine for: the parameters of a group, and tiles of its codes.
  const auto fetch_head = [&](const uint8_t* page, int group, int buffer) {
    const int sub = group % PAGE_GROUPS;
    barrier_expect(head_barrier, kKeyHead + kValueHead);
    const uint32_t target = base + kKeyHeadAt + warp * kKeyHead;
#if ARCS
    bulk_copy(target, page + key_parameters + sub * 2 * kPairs, 2 * kPairs, head_barrier);
    bulk_copy(target + 2 * kPairs, page + key_radii + sub * 4 * kPairs, 4 * kPairs, head_barrier);
#else
    bulk_copy(target, page + key_parameters + sub * kKeyHead, kKeyHead, head_barrier);
#endif
    bulk_copy(base + kValueHeadAt + (warp * 2 + buffer) * kValueHead,
              page + value_parameters + sub * kValueHead, kValueHead, head_barrier);
  };
  const auto fetch_tiles = [&](const uint8_t* keys, const uint8_t* values, int slot, int tile) {
    barrier_expect(barriers + slot * 8, kSlot);
    bulk_copy(ring + slot * kSlot, keys + tile * kKeyTile, SLOT_TILES * kKeyTile,
              barriers + slot * 8);
    bulk_copy(ring + slot * kSlot + SLOT_TILES * kKeyTile, values + tile * kValueTile,
              SLOT_TILES * kValueTile, barriers + slot * 8);
  };
  // First bytes of a group's codes.
  const auto keys_of = [&](const uint8_t* page, int group) {
    return page + key_codes + group % PAGE_GROUPS * kTiles * kKeyTile;
  };
  const auto values_of = [&](const uint8_t* page, int group) {
    return page + value_codes + group % PAGE_GROUPS * kTiles * kValueTile;
  };
  const auto address_of = [&](uint32_t page) {
    return memory + static_cast<size_t>(__shfl_sync(~0u, page, 0)) * 256;
  };

  // Queries, read early so that their latency hides behind the set-up: entry [tile, step, e, lane] is the
  // pair 8 step + 4e + t of column 8 tile + g.
  const auto query_of = [&](size_t row, int pair) { return query_pair(query, row, pair); };
  constexpr int kEntries = COLUMN_TILES * kSteps * 2 * 32;
  constexpr int kLoads = (kEntries + kThreads - 1) / kThreads;
  float qx[kLoads], qy[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; j++) {
    const int i = threadIdx.x + j * kThreads, l = i & 31, step = (i >> 6) % kSteps;
    const int column = ((i >> 6) / kSteps * 8 + (l >> 2)) / SPREAD;
    float2 own = make_float2(0.f, 0.f);
    if (i < kEntries && column < columns)
      own = query_of(row_of(column), step * 8 + ((i >> 5) & 1) * 4 + (l & 3));
    qx[j] = own.x, qy[j] = own.y;
  }

  if (lane == 0) {
    for (int i = 0; i <= SLOTS; i++) barrier_init(barriers + i * 8);
    barriers_visible();
  }
  __syncwarp();
  const uint8_t* page = address_of(first_page);
  if (group < groups && elect()) {
    fetch_head(page, group, 0);
    for (int i = 0; i < SLOTS; i++)
      fetch_tiles(keys_of(page, group), values_of(page, group), i, i * SLOT_TILES);
  }
#pragma unroll
  for (int j = 0; j < kLoads; j++) {
    const int i = threadIdx.x + j * kThreads;
    if (i < kEntries) {
      uint8_t* const place =
          shared + kQueryAt + kQueryEntry * ((i >> 6) * 64 + (i & 31) * 2 + ((i >> 5) & 1));
#if ARCS
      write(place, make_float2(qx[j], qy[j]));
#else
      const uint32_t rounded = pack_half2(qx[j], qy[j]);
      write(place, rounded);
      if constexpr (kSplitQuery)
        write(place + kQueryPart, pack_half2(qx[j] - low_half(rounded), qy[j] - high_half(rounded)));
#endif
    }
  }
#if ARCS
  // One row of 256 bytes for each byte that a code and its class make, a copy for every lane. A lane
  // computes one row of its warp, then they hand them round.
  constexpr int kOwnRows = 256 / WARPS;
  {
    const int row = warp * kOwnRows + lane;
    const int wide = (row & 3) | (row >> 6) << 2, code = (row >> 2) & ((1 << ANGLE_BITS) - 1);
    const float angle = (2 * code + 1) * half_turn(wide + ANGLE_BITS);
    const uint32_t own = pack_half2(__cosf(angle), __sinf(angle));
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
      write(shared + (warp * kOwnRows + i) * 256 + lane * 4, __shfl_sync(~0u, own, i));
  }
  const uint32_t own_table = lane * 4;
#else
  const uint32_t own_table = warp * kPairs * kPairTable;
  const uint32_t quarter = t * (kPairTable * 0x01010101u);
#endif
  // Entry of code j of four, at this step: its byte becomes part of the address.
  const auto entry = [&](uint32_t codes, int step, int j) {
#if ARCS
    return read<uint32_t>(shared + __byte_perm(codes, own_table, 0x7604 | j << 4));
#else
    return pair_entry(shared, own_table, codes, step, j);
#endif
  };
  __syncthreads();

  // Only the first warp of a block that has the one group streams, so the others' rings are free.
  float* const exact = reinterpret_cast<float*>(shared + kRingAt + SLOTS * kSlot);
  const bool few = groups == 1;
  if (few && work.split == 0) {
    const uint8_t* const first = address_of(page_of(0));
    const auto row = [&](int column) { return row_of(min(column, columns - 1)); };
    score_exactly(keys_of(first, 0), first + key_parameters, first + key_radii, row, query_of, exact,
                  scale, warp, lane);
    __syncthreads();
  }

  float o[COLUMN_TILES][kRows][4], sums[COLUMN_TILES][4], top[COLUMN_TILES][2], threshold = kNever;
  uint32_t q[COLUMN_TILES][2 * kSteps];
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++) {
    top[n][0] = top[n][1] = 0.f;
#pragma unroll
    for (int e = 0; e < 4; e++) sums[n][e] = 0.f;
#pragma unroll
    for (int k = 0; k < kRows; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[n][k][e] = 0.f;
#if !ARCS
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      const uint2 own = read<uint2>(shared + kQueryAt + 8 * ((n * kSteps + k) * 32 + lane));
      q[n][2 * k] = own.x, q[n][2 * k + 1] = own.y;
    }
#endif
  }

  // Row 0 of the product that sums is ones, row 1 the zero points.
  const uint32_t ones = g == 0 ? 0x3C003C00u : 0u, zeros_mask = g == 1 ? ~0u : 0u;
  int turn = 0;
#pragma unroll 1
  for (; group < groups; turn ^= 1) {
    const int after = next + stride;
    const uint8_t* const coming = address_of(next_page);
    const uint8_t* const keys_here = keys_of(page, group), *const values_here = values_of(page, group);
    next_page = page_of(after);
    const int valid = length - group * kGroup;
    barrier_wait(head_barrier, turn);
    derive(parameters, derived, scale, lane);
    __syncwarp();
    uint32_t radii[kSteps];  // quotients of pairs 8k + t and 8k + t + 4
#if ARCS
    uint32_t classes[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps / 4; i++) {
      const uint4 r = read<uint4>(derived + t * 4 * kSteps + i * 16);
      const uint4 c = read<uint4>(derived + kClassesAt + t * 4 * kSteps + i * 16);
      radii[4 * i] = r.x, radii[4 * i + 1] = r.y, radii[4 * i + 2] = r.z, radii[4 * i + 3] = r.w;
      classes[4 * i] = c.x, classes[4 * i + 1] = c.y, classes[4 * i + 2] = c.z, classes[4 * i + 3] = c.w;
    }
    turn_queries(shared + kQueryAt, derived, lane, q);
#else
    fill_table(shared + warp * kPairs * kPairTable, parameters, derived, lane);
#pragma unroll
    for (int i = 0; i < kSteps / 4; i++) {
      const uint4 r = read<uint4>(derived + t * 4 * kSteps + i * 16);
      radii[4 * i] = r.x, radii[4 * i + 1] = r.y, radii[4 * i + 2] = r.z, radii[4 * i + 3] = r.w;
    }
#endif
    float start[COLUMN_TILES][4];  // of the scores' accumulators: what is taken off
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) start[n][e] = SOFT_CAP || e % SPREAD ? 0.f : -top[n][e & 1];
#if ARCS
    if (!few && groups <= kFewGroups) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        const float lost = lost_by_turning(shared + kQueryAt, parameters, derived, n, lane);
#pragma unroll
        for (int e = 0; e < 4; e += SPREAD)
          start[n][e] += __shfl_sync(~0u, lost, 4 * (2 * t + (e & 1)));
      }
    }
#endif
    __syncwarp();
    if (next < groups && elect()) fetch_head(coming, next, turn ^ 1);

#pragma unroll
    for (int unit = 0; unit < kTiles / kUnitTiles; unit++) {
      constexpr int kRounds = kTiles / (SLOTS * SLOT_TILES);
      uint32_t words[8];
#pragma unroll
      for (int within = 0; within < kUnitTiles; within++) {
        const int tile = unit * kUnitTiles + within, slot = tile / SLOT_TILES % SLOTS;
        if (tile % SLOT_TILES == 0)
          barrier_wait(barriers + slot * 8, (tile / SLOT_TILES / SLOTS + (kRounds & 1) * turn) & 1);
        const uint8_t* const keys = shared + kRingAt + (warp * SLOTS + slot) * kSlot +
                                    tile % SLOT_TILES * kKeyTile;
        const uint8_t* const values = shared + kRingAt + (warp * SLOTS + slot) * kSlot +
                                      SLOT_TILES * kKeyTile + tile % SLOT_TILES * kValueTile;
        if (within == 0) {
          const uint4 a = read<uint4>(keys + lane * 16);
          words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
          if constexpr (kWords == 8) {
            const uint4 b = read<uint4>(keys + 512 + lane * 16);
            words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
          } else {
            const uint2 b = read<uint2>(keys + 512 + lane * 8);
            words[4] = b.x, words[5] = b.y;
          }
        }
        uint32_t nibbles[kRows];
#pragma unroll
        for (int i = 0; i < kRows / 4; i++) {
          const uint4 v = read<uint4>(values + i * 512 + lane * 16);
          nibbles[4 * i] = v.x, nibbles[4 * i + 1] = v.y, nibbles[4 * i + 2] = v.z, nibbles[4 * i + 3] = v.w;
        }
        const uint4 weights = read<uint4>(value_heads + turn * kValueHead + tile * 64 + t * 16);

        float s[COLUMN_TILES][4];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          const uint32_t x = codes_of(words, within * kSteps + step);
#if ARCS
          const uint32_t places = classes[step];
#else
          const uint32_t places = quarter;
#endif
          uint32_t a[4];
          const auto of_step = [&](uint32_t codes, int j) { return entry(codes, step, j); };
          decode_keys(x, radii[step], places, of_step, a);
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++) {
            mma(s[n], a, q[n][2 * step], q[n][2 * step + 1], step ? s[n] : start[n]);
            if constexpr (kSplitQuery) {
              const uint2 rest = read<uint2>(shared + kQueryAt + kQueryPart +
                                             8 * ((n * kSteps + step) * 32 + lane));
              mma(s[n], a, rest.x, rest.y, s[n]);
            }
          }
        }
        if ((tile + 1) % SLOT_TILES == 0) {
          __syncwarp();
          const int ahead = tile + 1 - SLOT_TILES + SLOTS * SLOT_TILES;
          if (ahead < kTiles) {
            if (elect()) fetch_tiles(keys_here, values_here, slot, ahead);
          } else if (next < groups && elect()) {
            fetch_tiles(keys_of(coming, next), values_of(coming, next), slot, ahead - kTiles);
          }
        }

        if (__builtin_expect(few, 0)) {
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e += SPREAD)
              s[n][e] = start[n][e] + exact[(tile * kTile + g + (e >> 1) * 8) * kColumns +
                                            (n * 8 + 2 * t + (e & 1)) / SPREAD];
        }
#if SOFT_CAP
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
          for (int e = 0; e < 4; e += SPREAD) s[n][e] = capped(s[n][e], soft_cap, top[n][e & 1]);
#endif
        if (__builtin_expect(valid < kGroup, 0)) {
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e += SPREAD)
              if (tile * kTile + g + (e >> 1) * 8 >= valid) s[n][e] = kNever;
        }

        float highest = kNever;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
          for (int e = 0; e < 4; e += SPREAD) highest = fmaxf(highest, s[n][e]);
        if (__any_sync(~0u, highest > threshold)) {
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e += SPREAD) {
              float rise = fmaxf(s[n][e], s[n][e + 2]);
#pragma unroll
              for (int d = 4; d < 32; d *= 2) rise = fmaxf(rise, __shfl_xor_sync(~0u, rise, d));
              rise -= 1.f;
              if (threshold > 0.f) rise = fmaxf(rise, 0.f);
              const float decay = exp2_approx(fminf(-rise, 0.f));
              top[n][e] += rise;
#pragma unroll
              for (int f = e; f < 4; f += 2) {
                if (!SOFT_CAP) start[n][f] -= rise;
                s[n][f] -= rise;
              }
              sums[n][e] *= decay;
#pragma unroll
              for (int k = 0; k < kRows; k++) o[n][k][e] *= decay, o[n][k][e + 2] *= decay;
            }
          threshold = kSlack;
        }

        const uint32_t sum_rows[4] = {(weights.z & zeros_mask) | ones, 0u,
                                      (weights.w & zeros_mask) | ones, 0u};
        uint32_t p[COLUMN_TILES][2];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float second = SPREAD == 1 ? exp2_approx(s[n][2 * i + 1]) : 0.f;
            p[n][i] = transpose(pack_half2(exp2_approx(s[n][2 * i]), second));
          }
          mma(sums[n], sum_rows, p[n][0], p[n][1], sums[n]);
          p[n][0] = mul_half2(p[n][0], weights.x);
          p[n][1] = mul_half2(p[n][1], weights.y);
        }
#pragma unroll
        for (int k = 0; k < kRows; k++) {
          const uint32_t x = nibbles[k], y = x >> 8;
          const uint32_t a[4] = {x & 0x000F000Fu, x & 0x00F000F0u, y & 0x000F000Fu, y & 0x00F000F0u};
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++) mma(o[n][k], a, p[n][0], p[n][1], o[n][k]);
        }
      }
    }
    group = next, next = after, page = coming;
  }

  release_next_launch();
  // Every warp's state to shared memory, over tables and rings that nobody reads any more.
  __syncthreads();
  float* const staged = reinterpret_cast<float*>(shared);
  float2* const states = reinterpret_cast<float2*>(shared + kStateAt);  // maximum, total
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
    for (int e = 0; e < 2; e += SPREAD) {
      const int column = (n * 8 + 2 * t + e) / SPREAD;
      const float total = __shfl_sync(~0u, sums[n][e], t), zero = __shfl_sync(~0u, sums[n][e], 4 + t);
      if (g == 0)
        states[warp * kColumns + column] = make_float2(threshold < 0.f ? kNever : top[n][e], total);
      float* const target = staged + (warp * kColumns + column) * kStagingRow;
#pragma unroll
      for (int k = 0; k < kRows; k++) {
        // Nibbles were denormals: 2^-24 of low ones, 2^-20 of high ones.
        target[16 * k + g] = fmaf(o[n][k][e], 16777216.f, zero);
        target[16 * k + g + 8] = fmaf(o[n][k][e + 2], 1048576.f, zero);
      }
    }
  __syncthreads();
  merge(shared, work, columns, row_of, out, lse, partial, mark);
}
