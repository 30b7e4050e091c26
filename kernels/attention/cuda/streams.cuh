// Where things lie in the shared memory of a block whose warps stream on their own.
#pragma once
#include "shape.cuh"

constexpr int kSlot = SLOT_TILES * (kKeyTile + kValueTile);
// The phase table: one a warp, or one for all warps.
constexpr int kTable = ARCS ? 65536 : WARPS * kPairs * kPairTable;
constexpr int kStaging = WARPS * kColumns * kStagingRow * 4;
constexpr int kRing = WARPS * SLOTS * kSlot;
// Queries [column tile, step, lane, e]: (x, y) of pair 8 step + 4e + t, fp16, or fp32 where arcs turn them.
constexpr int kQueryEntry = ARCS ? 8 : 4;
constexpr int kQueryPart = COLUMN_TILES * kSteps * 2 * 32 * kQueryEntry;
// Of fp32 queries what rounding takes off lies behind them, unless they are turned.
constexpr bool kSplitQuery = QUERY == 2 && !ARCS;
constexpr int kQueryBytes = kSplitQuery ? 2 * kQueryPart : kQueryPart;
constexpr int kStream = kTable + kRing, kEnd = kStaging + kMerged;
constexpr int kStreams = kStream > kEnd ? kStream : kEnd;

// Offsets in shared memory.
constexpr int kRingAt = kTable;
constexpr int kKeyHeadAt = kStreams;
constexpr int kDerivedAt = kKeyHeadAt + WARPS * kKeyHead;
constexpr int kValueHeadAt = kDerivedAt + WARPS * kDerived;
constexpr int kQueryAt = kValueHeadAt + WARPS * 2 * kValueHead;
constexpr int kBarrierAt = kQueryAt + kQueryBytes;
constexpr int kStateAt = kBarrierAt + WARPS * (SLOTS + 1) * 8;
constexpr int kShared = kStateAt + WARPS * kColumns * 8;

static_assert(SLOT_TILES % kUnitTiles == 0 && kTiles % (SLOTS * SLOT_TILES) == 0);
static_assert(kShared <= 227 * 1024, "shared memory of a thread block");
