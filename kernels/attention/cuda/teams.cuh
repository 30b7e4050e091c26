// Where things lie in the shared memory of a block of two teams, and how a team makes its phase table.
#pragma once
#include "keys.cuh"

constexpr int kTeams = 2;
constexpr int kTeamWarps = WARPS / kTeams, kTeamThreads = 32 * kTeamWarps;
constexpr int kKeyBytes = kTiles * kKeyTile, kValueBytes = kTiles * kValueTile;  // of a group
// A stage of a team's ring: codes of a group, then its parameters.
constexpr int kCodes = kKeyBytes + kValueBytes, kHeads = kKeyHead + kValueHead;
constexpr int kStage = kCodes + kHeads;
// Queries and weights lie in rows of 128 bytes (wgmma.cuh): 64 channels of a column, 64 columns of a token.
constexpr int kQueryHalf = kColumns * 128, kQueryPart = HEAD_DIM / 64 * kQueryHalf;
constexpr int kQueryParts = QUERY == 2 ? 2 : 1;  // of fp32 queries what rounding takes off, too
constexpr int kWeights = kGroup * 128;
constexpr int kTeamTable = kPairs * kPairTable;
constexpr int kQuotients = 2 * kPairs;

// Offsets in shared memory.
constexpr int kQueryAt = 0;
constexpr int kWeightsAt = kQueryAt + kQueryParts * kQueryPart;  // [team, turn]
constexpr int kTableAt = kWeightsAt + kTeams * 2 * kWeights;     // [team, turn]
constexpr int kRingAt = kTableAt + kTeams * 2 * kTeamTable;      // [team, stage]
constexpr int kQuotientsAt = kRingAt + kTeams * SLOTS * kStage;  // [team, turn]
constexpr int kTopAt = kQuotientsAt + kTeams * 2 * kQuotients;   // [team, column]: running maximum
constexpr int kRiseAt = kTopAt + kTeams * kColumns * 4;          // [team, column]: rise and decay
constexpr int kWarpTopAt = kRiseAt + kTeams * kColumns * 8;      // [team, warp, column]
constexpr int kStateAt = kWarpTopAt + WARPS * kColumns * 4;      // [team, column]
constexpr int kBarrierAt = kStateAt + kTeams * kColumns * 8;     // [team, stage]
constexpr int kShared = kBarrierAt + kTeams * SLOTS * 8;
// Sums at the end, over weights and tables, and what merging needs, over the rings.
constexpr int kStagedAt = kWeightsAt, kMergedAt = kRingAt;
constexpr int kStagedBytes = kTeams * kColumns * kStagingRow * 4;

// A block's part of the workspace: sums [column, channel], maxima and totals [column], flags that other
// blocks of its part raise.
constexpr int kMostSplits = 256;
constexpr int kSumBytes = kColumns * V_HEAD_DIM * 4, kSumStateBytes = kColumns * 8;
constexpr int kPartialBytes = kSumBytes + kSumStateBytes + kMostSplits * 4;

static_assert(HEAD_DIM == 128 && V_HEAD_DIM == 128, "a warpgroup has 64 channels of values");
static_assert(COLUMN_TILES == 8 && SPREAD == 1 && WARPS == 16 && SLOTS == 3);
static_assert(kStagedBytes <= kRingAt - kStagedAt);
static_assert(kMerged <= kTeams * SLOTS * kStage && kThreads * 32 <= kStagedBytes && kGroup * kColumns * 4 <= SLOTS * kStage);
static_assert(kShared <= 227 * 1024, "shared memory of a thread block");

// Writes a group's phase table, of pair p at p: radius y times `scale` times cosine and sine of every
// angle, and radius x of pairs 8k + 4e + t at [t, k, e]. Every thread of a team writes a quarter of a pair.
__device__ __forceinline__ void make_table(const uint8_t* parameters, uint8_t* table,
                                           uint8_t* quotients, float scale, int thread) {
  constexpr int kEach = (1 << ANGLE_BITS) / 4;
  const int p = thread >> 2;
#if ARCS
  const uint32_t arc = parameters[p] << 8 | parameters[kPairs + p];
  const uint8_t* const radii = parameters + 2 * kPairs + 2 * p;
  const float zero = (arc >> 4) * (6.283185307179586f / 4096.f);
  const float turn = 2.f * half_turn(min(arc & 15u, 8u) + ANGLE_BITS);
#else
  const uint8_t* const radii = parameters + 2 * ((p & 7) * kSteps + (p >> 3));
  const float zero = low_half(read<unsigned short>(radii + 4 * kPairs));
  const float turn = low_half(read<unsigned short>(radii + 6 * kPairs));
#endif
  const Radius radius = radius_of(low_half(read<unsigned short>(radii)),
                                  low_half(read<unsigned short>(radii + 2 * kPairs)));
  if ((thread & 3) == 0)
    write(quotients + 2 * ((p & 3) * 2 * kSteps + (p >> 3) * 2 + ((p >> 2) & 1)),
          static_cast<unsigned short>(radius.x));
  const float base = fmaf((thread & 3) * kEach + 0.5f, turn, zero), y = radius.y * scale;
  uint32_t entry[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const float angle = fmaf(static_cast<float>(i), turn, base);
    entry[i] = pack_half2(y * __cosf(angle), y * __sinf(angle));
  }
  uint8_t* const target = table + thread * 4 * kEach;
  if constexpr (kEach == 4) write(target, make_uint4(entry[0], entry[1], entry[2], entry[3]));
  else write(target, make_uint2(entry[0], entry[1]));
}
