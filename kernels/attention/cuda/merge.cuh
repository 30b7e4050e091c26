// From states to the answer: sums over the states of a block, then over the blocks of a part.
#pragma once
#include "work.cuh"

__device__ __forceinline__ float log_sum(float highest, float total) {
  return total > 0.f ? highest + __log2f(total) : __int_as_float(0xff800000);
}

// Hands a number to another block of the grid. It travels with the launch's mark in one 8-byte store,
// so neither a fence nor a counter is needed. Who takes it takes the mark away: a graph replays it.
__device__ __forceinline__ void post(uint2* place, float x, uint32_t mark) {
  store_relaxed(place, make_uint2(__float_as_uint(x), mark));
}

// What a block of a part finishes: columns are cut into pieces of channels, dealt to the part's blocks in
// turn, so that all of them merge at once.
struct Pieces {
  int per_column, channels, count;
};

__device__ __forceinline__ Pieces pieces_of(int columns, int splits) {
  int n = 1;
  while (n < kMostPieces && 2 * n * columns <= splits) n *= 2;
  return {n, V_HEAD_DIM / n, n * columns};
}

// Sums at one maximum.
struct Sums {
  float highest, total, sum;
};

__device__ __forceinline__ void add(Sums& to, const Sums& x) {
  const float highest = fmaxf(to.highest, x.highest);
  const float old_weight = exp2_approx(to.highest - highest);
  const float weight = exp2_approx(x.highest - highest);
  to = {highest, fmaf(x.total, weight, to.total * old_weight),
        fmaf(x.sum, weight, to.sum * old_weight)};
}

// Merges the block's states: sums [state, column, channel] at the start of `shared`, maximum and total
// [state, column]. Writes out and lse of the block's own pieces, after what the part's other blocks have
// of them, and hands the other pieces on. `merged_at` has room for kMerged bytes.
//
// Blocks wait for each other, so all blocks of a part must run at once: they are started in order, and
// no part has more blocks than the device has multiprocessors.
template <int states_of_block, typename Row>
__device__ __forceinline__ void merge(uint8_t* shared, uint8_t* merged_at, const float2* states,
                                      const Work& work, int columns, Row row_of,
                                      float* __restrict__ out, float* __restrict__ lse,
                                      uint2* __restrict__ partial, uint32_t mark) {
  const float* const staged = reinterpret_cast<const float*>(shared);
  float* const merged = reinterpret_cast<float*>(merged_at);  // [own piece, channel]
  float2* const merged_states = reinterpret_cast<float2*>(merged + kColumns * V_HEAD_DIM);
  const Pieces pieces = pieces_of(columns, work.splits);
  uint2* const own_rows = partial + static_cast<size_t>(blockIdx.x) * kColumns * kPartialRow;
  const auto finish = [&](int column, int channel, const Sums& x) {
    out[row_of(column) * V_HEAD_DIM + channel] = x.total > 0.f ? __fdividef(x.sum, x.total) : 0.f;
    if (channel == 0) lse[row_of(column)] = log_sum(x.highest, x.total) * kLog2;
  };
  for (int i = threadIdx.x; i < columns * V_HEAD_DIM; i += kThreads) {
    const int column = i / V_HEAD_DIM, channel = i % V_HEAD_DIM;
    float highest = kNever, total = 0.f, sum = 0.f;
#pragma unroll
    for (int k = 0; k < states_of_block; k++)
      highest = fmaxf(highest, states[k * kColumns + column].x);
#pragma unroll
    for (int k = 0; k < states_of_block; k++) {
      const float2 state = states[k * kColumns + column];
      const float weight = exp2_approx(state.x - highest);
      total = fmaf(weight, state.y, total);
      sum = fmaf(weight, staged[(k * kColumns + column) * kStagingRow + channel], sum);
    }
    if (work.splits == 1) {
      finish(column, channel, {highest, total, sum});
      continue;
    }
    const int within = channel / pieces.channels, piece = column * pieces.per_column + within;
    const int own = piece / work.splits, at = channel % pieces.channels;
    if (piece % work.splits == work.split) {
      merged[own * pieces.channels + at] = sum;
      if (at == 0) merged_states[own] = make_float2(highest, total);
    } else {
      uint2* const row = own_rows + column * kPartialRow + within * (pieces.channels + 2);
      post(row + at, sum, mark);
      if (at == 0) {
        post(row + pieces.channels, highest, mark);
        post(row + pieces.channels + 1, total, mark);
      }
    }
  }
  if (work.splits == 1) return;
  __syncthreads();

  const int own = (pieces.count - work.split + work.splits - 1) / work.splits;
  const int numbers = own * pieces.channels;
  if (numbers <= 0) return;
  // Threads beside each other take the same number from different blocks.
  const int sharers = max(1, kThreads / numbers);
  Sums* const shares = reinterpret_cast<Sums*>(shared);  // [sharer, number]
  uint2* const first_rows =
      partial + static_cast<size_t>(work.first_block) * kColumns * kPartialRow;
  constexpr int kBlockRows = kColumns * kPartialRow;
  constexpr int kAtOnce = 8;
  const auto column_of = [&](int number) {
    return (work.split + number / pieces.channels * work.splits) / pieces.per_column;
  };
  // A piece's place in the rows of another block.
  const auto place_of = [&](int number, int block) {
    const int piece = work.split + number / pieces.channels * work.splits;
    return first_rows + block * kBlockRows + piece / pieces.per_column * kPartialRow +
           piece % pieces.per_column * (pieces.channels + 2);
  };
  const auto taken = [&](uint2* place) {
    uint2 x = load_relaxed(place);
    while (x.y != mark) x = load_relaxed(place);
    return __uint_as_float(x.x);
  };
  for (int i = threadIdx.x; i < numbers * sharers; i += kThreads) {
    const int number = i % numbers, sharer = i / numbers;
    const int at = number % pieces.channels, piece = number / pieces.channels;
    Sums x = {kNever, 0.f, 0.f};
    for (int k = sharer; k < work.splits; k += sharers * kAtOnce) {
      uint2 sum[kAtOnce], highest[kAtOnce], total[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        const int block = k + j * sharers;
        if (block < work.splits && block != work.split) {
          uint2* const place = place_of(number, block);
          sum[j] = load_relaxed(place + at);
          highest[j] = load_relaxed(place + pieces.channels);
          total[j] = load_relaxed(place + pieces.channels + 1);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        const int block = k + j * sharers;
        if (block >= work.splits) continue;
        if (block == work.split) {
          add(x, {merged_states[piece].x, merged_states[piece].y,
                  merged[piece * pieces.channels + at]});
          continue;
        }
        uint2* const place = place_of(number, block);
        if (sum[j].y != mark) sum[j].x = __float_as_uint(taken(place + at));
        if (highest[j].y != mark) highest[j].x = __float_as_uint(taken(place + pieces.channels));
        if (total[j].y != mark) total[j].x = __float_as_uint(taken(place + pieces.channels + 1));
        store_relaxed(place + at, make_uint2(0u, 0u));
        add(x, {__uint_as_float(highest[j].x), __uint_as_float(total[j].x),
                __uint_as_float(sum[j].x)});
      }
    }
    if (sharers == 1) finish(column_of(number), at + (work.split + piece * work.splits) %
                             pieces.per_column * pieces.channels, x);
    else shares[i] = x;
  }
  __syncthreads();
  // Everybody has seen maxima and totals.
  for (int i = threadIdx.x; i < own * work.splits; i += kThreads) {
    const int block = i % work.splits;
    uint2* const place = place_of(i / work.splits * pieces.channels, block) + pieces.channels;
    if (block != work.split)
      store_relaxed(place, make_uint2(0u, 0u)), store_relaxed(place + 1, make_uint2(0u, 0u));
  }
  if (sharers == 1) return;
  for (int number = threadIdx.x; number < numbers; number += kThreads) {
    Sums x = shares[number];
    for (int k = 1; k < sharers; k++) add(x, shares[k * numbers + number]);
    finish(column_of(number), number % pieces.channels +
           (work.split + number / pieces.channels * work.splits) % pieces.per_column * pieces.channels, x);
  }
}
