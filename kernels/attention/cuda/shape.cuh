// Sizes that both kernels share, all known when the source is compiled.
#pragma once
#include "ptx.cuh"

constexpr int kTile = 16;                             // tokens of a tile
constexpr int kGroup = 128;                           // tokens of a group
constexpr int kTiles = kGroup / kTile;                // tiles of a group
constexpr int kSteps = HEAD_DIM / 16;                 // steps of 8 pairs
constexpr int kUnitTiles = 8 / kSteps;                // tiles whose codes fill whole words
constexpr int kWords = RADIUS_BITS + ANGLE_BITS;      // words of a lane in a unit
constexpr int kRows = V_HEAD_DIM / 16;                // value channels, in blocks of 16
constexpr int kColumns = 8 * COLUMN_TILES / SPREAD;   // query columns of a thread block
constexpr int kThreads = 32 * WARPS;
constexpr int kKeyTile = kWords * 128 / kUnitTiles;   // bytes
constexpr int kValueTile = kRows * 128;
constexpr int kPairs = HEAD_DIM / 2;
constexpr int kKeyHead = ARCS ? 6 * kPairs : 8 * kPairs;  // parameters of one head and group
// What `derive` makes of them, after the radii. Rows of turns are padded: a quad's loads meet in no bank.
constexpr int kClassesAt = 2 * kPairs, kTurnsAt = 4 * kPairs, kTurnsRow = 16 * kSteps + 16;
constexpr int kDerived = ARCS ? kTurnsAt + 4 * kTurnsRow : 6 * kPairs;
constexpr int kValueHead = 4 * kGroup;
constexpr int kPairTable = 4 << ANGLE_BITS;  // bytes of a pair's phase table
constexpr int kMerged = kColumns * (V_HEAD_DIM + 2) * 4;  // a block's sums, maxima and totals
constexpr int kStagingRow = V_HEAD_DIM + 4;  // floats; the pad spreads a warp over all banks

// A partial row in the workspace: sums of channels, then maximum and total.
constexpr int kPartialRow = V_HEAD_DIM + 2;

static_assert(ANGLE_BITS == 3 || ANGLE_BITS == 4, "the radius must become fp16 by one product");
static_assert(SPREAD == 1 || (SPREAD == 2 && COLUMN_TILES == 1), "few columns stand at even places");
static_assert(kWords == 8 || kWords == 6, "whole codes");

// Sequences of at most so many groups do not average what rounding takes off a whole group.
constexpr int kFewGroups = 16;
constexpr float kNever = -1e30f;
constexpr float kLog2 = 0.6931471805599453f;
// The running maximum trails the true one by at most 2^kSlack, so weights stay below 2^kSlack.
constexpr float kSlack = 4.f;
// Radius codes count in units of 1/16 of a stored step.
constexpr float kRadiusUnit = 16.f;
constexpr float kTopCode = ((1 << RADIUS_BITS) - 1) / kRadiusUnit;
constexpr uint32_t kAngleMask = (((1u << ANGLE_BITS) - 1) << 2) * 0x01010101u;
constexpr uint32_t kRadiusMask = (((1u << RADIUS_BITS) - 1) << (ANGLE_BITS + 2)) * 0x00010001u;
// A masked radius code is a denormal of 2^(ANGLE_BITS + 2 - 24); times this fp16 it counts in 16ths.
constexpr uint32_t kRadiusScale = ((15u + 22 - ANGLE_BITS - 4) << 10) * 0x00010001u;

// Pi halved so many times: exact in the exponent.
__device__ __forceinline__ float half_turn(uint32_t halvings) {
  return __uint_as_float(0x40490FDBu - (halvings << 23));
}

template <typename T>
__device__ __forceinline__ T read(const uint8_t* p) { return *reinterpret_cast<const T*>(p); }
template <typename T>
__device__ __forceinline__ void write(uint8_t* p, T x) { *reinterpret_cast<T*>(p) = x; }
