// Attention of many query columns over packed pages: pair keys, int4 values, warpgroup products (sm_90a).
//
// Two teams of 8 warps stream groups of 128 tokens of one KV head. Scores are S^T = K q^T: a warp decodes
// 16 tokens to the first factor. Weights go to shared memory; the output is O^T = V^T P^T, where a warp
// decodes 16 channels of all tokens. So each code is decoded once for 64 query columns. README.md has more.
//
// Macros are those of decode.cu.
#include "exact.cuh"
#include "merge_wide.cuh"
#include "query.cuh"
#include "wgmma.cuh"

// Dynamic shared memory of a launch, for whoever launches.
extern "C" __device__ const int shared_bytes = kShared;

// The first factor of a tile of O^T from eight nibbles; scales and zero points of tokens 2t, 2t + 1 and
// 2t + 8, 2t + 9.
__device__ __forceinline__ void decode_values(uint32_t x, const uint4& weights, uint32_t (&a)[4]) {
  constexpr uint32_t kThousand = 0x64006400u;  // 1024, with the low bits for a nibble
  const auto low = [&](uint32_t word) {
    return fma_half2(and_or<0x000F000Fu>(word, kThousand), 0x3C003C00u, 0xE400E400u);
  };
  const auto high = [&](uint32_t word) {
    return fma_half2(and_or<0x00F000F0u>(word, kThousand), 0x2C002C00u, 0xD400D400u);
  };
  a[0] = fma_half2(low(x), weights.x, weights.z), a[1] = fma_half2(high(x), weights.x, weights.z);
  a[2] = fma_half2(low(x >> 8), weights.y, weights.w);
  a[3] = fma_half2(high(x >> 8), weights.y, weights.w);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attend(const void* __restrict__ query, const uint8_t* __restrict__ memory,
       const int* __restrict__ page_table, const int* __restrict__ lengths,
       const int* __restrict__ query_starts, float* __restrict__ out, float* __restrict__ lse,
       uint2* __restrict__ partial, long long key_codes, long long key_parameters,
       long long key_radii, long long value_codes, long long value_parameters, int sequences,
       int max_pages, int query_heads, int kv_heads, int column_tiles, int even_splits,
       float scale, float soft_cap, uint32_t mark) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  // A member of a team has tokens 16 member to 16 member + 15, then channels likewise.
  const int team = warp / kTeamWarps, member = warp % kTeamWarps;
  const int thread = threadIdx.x % kTeamThreads;
  wait_for_launch_before();
  Work work;
  const int parts = kv_heads * column_tiles;
  if (even_splits) {
    share_evenly(lengths, query_starts, parts, even_splits, work);
  } else if (!deal(lengths, query_starts, sequences, parts, max_pages * PAGE_GROUPS, work)) {
    return;
  }
  const int* const pages = page_table + static_cast<size_t>(work.sequence) * max_pages;
  const int stride = work.splits * kTeams;
  int group = work.split * kTeams + team;
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
  const auto page_of = [&](int group) {
    return group < groups ? static_cast<uint32_t>(__ldg(pages + group / PAGE_GROUPS)) : 0u;
  };

  const size_t head_groups = static_cast<size_t>(head) * PAGE_GROUPS;
  key_codes += head_groups * kKeyBytes;
  value_codes += head_groups * kValueBytes;
  value_parameters += head_groups * kValueHead;
#if ARCS
  key_parameters += head_groups * 2 * kPairs;
  key_radii += head_groups * 4 * kPairs;
#else
  key_parameters += head_groups * kKeyHead;
#endif
  const uint32_t base = shared_address(shared);
  const uint32_t barriers = base + kBarrierAt + team * SLOTS * 8;
  uint8_t* const ring = shared + kRingAt + team * SLOTS * kStage;
  uint8_t* const tables = shared + kTableAt + team * 2 * kTeamTable;
  uint8_t* const quotients = shared + kQuotientsAt + team * 2 * kQuotients;
  float* const tops = reinterpret_cast<float*>(shared + kTopAt) + team * kColumns;

  // Asks the copy engine for a group.
  const auto fetch = [&](uint32_t page_unit, int group, int stage) {
    const uint8_t* const page = memory + static_cast<size_t>(page_unit) * 256;
    const int sub = group % PAGE_GROUPS;
    const uint32_t barrier = barriers + stage * 8;
    const uint32_t target = base + kRingAt + (team * SLOTS + stage) * kStage;
    barrier_expect(barrier, kStage);
    bulk_copy(target, page + key_codes + sub * kKeyBytes, kKeyBytes, barrier);
    bulk_copy(target + kKeyBytes, page + value_codes + sub * kValueBytes, kValueBytes, barrier);
#if ARCS
    bulk_copy(target + kCodes, page + key_parameters + sub * 2 * kPairs, 2 * kPairs, barrier);
    bulk_copy(target + kCodes + 2 * kPairs, page + key_radii + sub * 4 * kPairs, 4 * kPairs, barrier);
#else
    bulk_copy(target + kCodes, page + key_parameters + sub * kKeyHead, kKeyHead, barrier);
#endif
    bulk_copy(target + kCodes + kKeyHead, page + value_parameters + sub * kValueHead, kValueHead,
              barrier);
  };

  if (member == 0) {
    uint32_t first_pages[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) first_pages[i] = page_of(group + i * stride);
    if (elect()) {
#pragma unroll
      for (int i = 0; i < SLOTS; i++) barrier_init(barriers + i * 8);
      barriers_visible();
#pragma unroll
      for (int i = 0; i < SLOTS; i++)
        if (group + i * stride < groups) fetch(first_pages[i], group + i * stride, i);
    }
    __syncwarp();
  }
  if (thread < kColumns) tops[thread] = 0.f;

  // Queries: channel pair p of a column at p * 4 of its rows.
  const auto query_of = [&](size_t row, int pair) { return query_pair(query, row, pair); };
#pragma unroll 4
  for (int i = threadIdx.x; i < kColumns * kPairs; i += kThreads) {
    const int column = i / kPairs, pair = i % kPairs;
    float2 own = make_float2(0.f, 0.f);
    if (column < columns) own = query_of(row_of(column), pair);
    const uint32_t rounded = pack_half2(own.x, own.y);
    const int chunk = (pair % 32 / 4) ^ (column & 7);
    uint8_t* const place = shared + kQueryAt + pair / 32 * kQueryHalf + column * 128 + chunk * 16 +
                           pair % 4 * 4;
    write(place, rounded);
    if constexpr (kQueryParts == 2)
      write(place + kQueryPart, pack_half2(own.x - low_half(rounded), own.y - high_half(rounded)));
  }
  shared_visible();
  __syncthreads();

  // Only the first team of a block that has the one group streams, so the other's ring is free.
  float* const exact = reinterpret_cast<float*>(shared + kRingAt + SLOTS * kStage);
  const bool few = groups == 1;
  if (few && work.split == 0) {
    const uint8_t* const first = memory + static_cast<size_t>(page_of(0)) * 256;
    const auto row = [&](int column) { return row_of(min(column, columns - 1)); };
    score_exactly(first + key_codes, first + key_parameters, first + key_radii, row, query_of, exact,
                  scale, warp, lane);
    __syncthreads();
  }

  float o[32], sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 32; i++) o[i] = 0.f;
  const uint32_t ones = g == 0 ? 0x3C003C00u : 0u;
  const uint32_t sum_rows[4] = {ones, 0u, ones, 0u};
  const uint32_t quarter = t * (kPairTable * 0x01010101u);
  // Rows of matrices that a lane stores and loads in a team's weights, chunk 0 of columns.
  const uint32_t weights_at = base + kWeightsAt + team * 2 * kWeights;
  const uint32_t own_row = (member * kTile + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  const uint32_t sum_row = lane * 128 + ((member ^ (lane & 7)) << 4);
  const unsigned long long queries = swizzled_rows(base + kQueryAt);

  if (group < groups) {
    barrier_wait(barriers, 0);
    make_table(ring + kCodes, tables, quotients, scale, thread);
  }
  barrier_sync(1 + team, kTeamThreads);
  // The next group to be asked for, and its page.
  int ahead = group + SLOTS * stride;
  uint32_t coming = member == 0 ? page_of(ahead) : 0u;
  int stage = 0, phase = 0, turn = 0;
  bool started = false;
#pragma unroll 1
  for (; group < groups; group += stride, turn ^= 1) {
    const uint8_t* const here = ring + stage * kStage;
    const int next_stage = stage + 1 == SLOTS ? 0 : stage + 1;
    const int next_phase = next_stage ? phase : phase ^ 1;
    uint32_t words[8];
    {
      const uint8_t* const keys = here + member * kKeyTile;
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
    const uint32_t table = kTableAt + (team * 2 + turn) * kTeamTable;
    const uint8_t* const own_quotients = quotients + turn * kQuotients + t * 4 * kSteps;
    float s[32];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 top = *reinterpret_cast<const float2*>(tops + 8 * j + 2 * t);
      s[4 * j] = s[4 * j + 2] = SOFT_CAP ? 0.f : -top.x;
      s[4 * j + 1] = s[4 * j + 3] = SOFT_CAP ? 0.f : -top.y;
    }
    // Two steps are decoded while the tensor cores are at the two before.
#pragma unroll
    for (int batch = 0; batch < kSteps / 2; batch++) {
      const uint2 radii = read<uint2>(own_quotients + batch * 8);
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int step = batch * 2 + i;
        const auto entry = [&](uint32_t codes, int j) {
          return pair_entry(shared, table, codes, step, j);
        };
        decode_keys(codes_of(words, step), i ? radii.y : radii.x, quarter, entry, a[i]);
      }
      if (batch == 0) warpgroup_arrive(s);
      else warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int step = batch * 2 + i, at = step / 4 * kQueryHalf + step % 4 * 32;
#pragma unroll
        for (int part = 0; part < kQueryParts; part++)
          warpgroup_mma<0>(s, a[i], queries + ((part * kQueryPart + at) >> 4));
      }
      warpgroup_commit();
      if (batch + 1 < kSteps / 2) warpgroup_wait<1>();
    }

    if (group + stride < groups) {
      barrier_wait(barriers + next_stage * 8, next_phase);
      make_table(ring + next_stage * kStage + kCodes, tables + (turn ^ 1) * kTeamTable,
                 quotients + (turn ^ 1) * kQuotients, scale, thread);
    }
    const uint8_t* const values = here + kKeyBytes + member / 4 * 512 + lane * 16 + member % 4 * 4;
    const uint8_t* const value_head = here + kCodes + kKeyHead + t * 16;
    uint32_t v[2][4];
    const auto decode_batch = [&](int batch) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        decode_values(read<uint32_t>(values + (2 * batch + i) * kValueTile),
                      read<uint4>(value_head + (2 * batch + i) * 64), v[i]);
    };
    decode_batch(0);

    warpgroup_wait<0>(s);
    if (__builtin_expect(few, 0)) {
#pragma unroll
      for (int i = 0; i < 32; i++) {
        const int column = i / 4 * 8 + 2 * t + (i & 1);
        s[i] = exact[(member * kTile + g + (i >> 1 & 1) * 8) * kColumns + column] -
               (SOFT_CAP ? 0.f : tops[column]);
      }
    }
#if SOFT_CAP
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = capped(s[i], soft_cap, tops[i / 4 * 8 + 2 * t + (i & 1)]);
#endif
    const int valid = length - group * kGroup - member * kTile - g;
    if (__builtin_expect(length - group * kGroup < kGroup, 0)) {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if ((i >> 1 & 1) * 8 >= valid) s[i] = kNever;
    }

    const uint32_t weights = weights_at + turn * kWeights;
    // Stores the weights of the scores; returns whether one is too large.
    const auto store_weights = [&] {
      uint32_t highest = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          p[j] = pack_half2(exp2_approx(s[8 * i + 2 * j]), exp2_approx(s[8 * i + 2 * j + 1]));
          highest = max_half2(highest, p[j]);
        }
        store_matrices(weights + (own_row ^ i << 5), p);
      }
      shared_visible();
      constexpr uint32_t kLimit = 0x4C00;  // 2^kSlack
      return (highest & 0xFFFF) > kLimit || highest >> 16 > kLimit;
    };
    const bool exceeds = store_weights();
    if (barrier_any(1 + team, kTeamThreads, exceeds || !started)) {
      // The running maximum of the team rises.
      float* const warp_tops = reinterpret_cast<float*>(shared + kWarpTopAt) + team * kTeamWarps * kColumns;
      float2* const rises = reinterpret_cast<float2*>(shared + kRiseAt) + team * kColumns;
#pragma unroll
      for (int j = 0; j < 16; j++) {
        float highest = fmaxf(s[j / 2 * 4 + j % 2], s[j / 2 * 4 + j % 2 + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2)
          highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
        if (g == 0) warp_tops[member * kColumns + j / 2 * 8 + 2 * t + j % 2] = highest;
      }
      barrier_sync(1 + team, kTeamThreads);
      if (thread < kColumns) {
        float rise = kNever;
#pragma unroll
        for (int i = 0; i < kTeamWarps; i++) rise = fmaxf(rise, warp_tops[i * kColumns + thread]);
        rise -= 1.f;
        if (started) rise = fmaxf(rise, 0.f);
        tops[thread] += rise;
        rises[thread] = make_float2(rise, exp2_approx(fminf(-rise, 0.f)));
      }
      barrier_sync(1 + team, kTeamThreads);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const float2 rise = rises[j / 2 * 8 + 2 * t + j % 2];
#pragma unroll
        for (int i = j / 2 * 4 + j % 2; i <= j / 2 * 4 + j % 2 + 2; i += 2)
          s[i] -= rise.x, o[i] *= rise.y;
      }
      sums[0] *= rises[8 * member + 2 * t].y, sums[1] *= rises[8 * member + 2 * t + 1].y;
      started = true;
      store_weights();
      barrier_sync(1 + team, kTeamThreads);
    }

    const unsigned long long b = swizzled_rows(weights);
#pragma unroll
    for (int batch = 0; batch < kTiles / 2; batch++) {
      if (batch) decode_batch(batch);
      if (batch == 0) warpgroup_arrive(o);
      else warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < 2; i++)
        warpgroup_mma<1>(o, v[i], b + ((2 * batch + i) * kTile * 128 >> 4));
      warpgroup_commit();
      if (batch + 1 < kTiles / 2) warpgroup_wait<1>();
    }
    // Columns 8 member to 8 member + 7 of all tokens.
#pragma unroll
    for (int i = 0; i < kGroup / 32; i++) {
      uint32_t p[4];
      load_transposed(weights + sum_row + i * 32 * 128, p);
      mma(sums, sum_rows, p[0], p[1], sums);
      mma(sums, sum_rows, p[2], p[3], sums);
    }

    // Everybody has left the group before this one, so its stage is free.
    if (member == 0 && group + (SLOTS - 1) * stride == ahead) {
      if (ahead < groups && elect()) fetch(coming, ahead, stage ? stage - 1 : SLOTS - 1);
      ahead += stride;
      coming = page_of(ahead);
    }
    warpgroup_wait<0>(o);
    stage = next_stage, phase = next_phase;
  }

  release_next_launch();
  // Every team's state to shared memory, over weights and tables that nobody reads any more.
  __syncthreads();
  float* const staged = reinterpret_cast<float*>(shared + kStagedAt) + team * kColumns * kStagingRow;
  float2* const states = reinterpret_cast<float2*>(shared + kStateAt);
#pragma unroll
  for (int i = 0; i < 32; i++)
    staged[(i / 4 * 8 + 2 * t + (i & 1)) * kStagingRow + member * 16 + g + (i >> 1 & 1) * 8] = o[i];
  if (g == 0) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = 8 * member + 2 * t + i;
      states[team * kColumns + column] = make_float2(started ? tops[column] : kNever, sums[i]);
    }
  }
  __syncthreads();
  merge_teams(shared, work, columns, row_of, out, lse, reinterpret_cast<uint8_t*>(partial), mark);
}
