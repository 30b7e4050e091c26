// From the warps' states to the answer: sums over the warps of a block, then over the blocks of a part.
#pragma once
#include "streams.cuh"
#include "work.cuh"

// Hands a number to another block of the grid. It travels with the launch's mark in one 8-byte store,
// so neither a fence nor a counter is needed. Who takes it takes the mark away: a graph replays it.
__device__ __forceinline__ void post(uint2* place, float x, uint32_t mark) {
  store_relaxed(place, make_uint2(__float_as_uint(x), mark));
}

// Takes `count` numbers, `stride` places apart, all asked for at once; waits until each is there.
template <int most>
__device__ __forceinline__ void take(uint2* places, int stride, int count, uint32_t mark,
                                     float (&x)[most]) {
  uint2 got[most];
#pragma unroll
  for (int j = 0; j < most; j++) if (j < count) got[j] = load_relaxed(places + j * stride);
#pragma unroll
  for (int j = 0; j < most; j++) {
    if (j < count) {
      while (got[j].y != mark) got[j] = load_relaxed(places + j * stride);
      x[j] = __uint_as_float(got[j].x);
      store_relaxed(places + j * stride, make_uint2(0u, 0u));
    }
  }
}

// Merges what every warp staged: sums [warp, column, channel] at the start of `shared`, maximum and
// total of every column at kStateAt. Writes out and lse, or hands them to the part's last block.
template <typename Row>
__device__ __forceinline__ void merge(uint8_t* shared, const Work& work, int columns, Row row_of,
                                      float* __restrict__ out, float* __restrict__ lse,
                                      uint2* __restrict__ partial, uint32_t mark) {
  const float* const staged = reinterpret_cast<const float*>(shared);
  const float2* const states = reinterpret_cast<const float2*>(shared + kStateAt);
  float* const merged = reinterpret_cast<float*>(shared + kStaging);  // [column, channel]
  float2* const merged_states = reinterpret_cast<float2*>(merged + kColumns * V_HEAD_DIM);
  const bool last = work.split == work.splits - 1;
  uint2* const own_rows = partial + static_cast<size_t>(blockIdx.x) * kColumns * kPartialRow;
  for (int i = threadIdx.x; i < columns * V_HEAD_DIM; i += kThreads) {
    const int column = i / V_HEAD_DIM, channel = i % V_HEAD_DIM;
    float highest = kNever, total = 0.f, sum = 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; k++) highest = fmaxf(highest, states[k * kColumns + column].x);
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
      const float2 state = states[k * kColumns + column];
      const float weight = exp2_approx(state.x - highest);
      total = fmaf(weight, state.y, total);
      sum = fmaf(weight, staged[(k * kColumns + column) * kStagingRow + channel], sum);
    }
    if (work.splits == 1) {
      out[row_of(column) * V_HEAD_DIM + channel] = total > 0.f ? __fdividef(sum, total) : 0.f;
      if (channel == 0) lse[row_of(column)] = log_sum(highest, total) * kLog2;
    } else if (last) {
      merged[i] = sum;
      if (channel == 0) merged_states[column] = make_float2(highest, total);
    } else {
      uint2* const row = own_rows + column * kPartialRow;
      post(row + channel, sum, mark);
      if (channel == 0) post(row + V_HEAD_DIM, highest, mark), post(row + V_HEAD_DIM + 1, total, mark);
    }
  }
  if (work.splits == 1 || !last) return;

  // Blocks of a part are started in order, so those that this one waits for are running or done.
  __syncthreads();
  uint2* const first_rows =
      partial + static_cast<size_t>(work.first_block) * kColumns * kPartialRow;
  constexpr int kBlockRows = kColumns * kPartialRow;
  float2* const others = reinterpret_cast<float2*>(shared);  // [block, column]: maximum, total
  for (int i = threadIdx.x; i < (work.splits - 1) * columns; i += kThreads) {
    uint2* const row = first_rows + i / columns * kBlockRows + i % columns * kPartialRow;
    float state[2];
    take<2>(row + V_HEAD_DIM, 1, 2, mark, state);
    others[i] = make_float2(state[0], state[1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns * V_HEAD_DIM; i += kThreads) {
    const int column = i / V_HEAD_DIM, channel = i % V_HEAD_DIM;
    const float2 own = merged_states[column];
    float highest = own.x;
    for (int k = 0; k < work.splits - 1; k++) highest = fmaxf(highest, others[k * columns + column].x);
    const float own_weight = exp2_approx(own.x - highest);
    float total = own.y * own_weight, sum = merged[i] * own_weight;
    constexpr int kAtOnce = 8;
    for (int k = 0; k < work.splits - 1; k += kAtOnce) {
      const int count = min(kAtOnce, work.splits - 1 - k);
      float x[kAtOnce];
      take<kAtOnce>(first_rows + k * kBlockRows + column * kPartialRow + channel, kBlockRows, count,
                    mark, x);
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        if (j < count) {
          const float2 state = others[(k + j) * columns + column];
          const float weight = exp2_approx(state.x - highest);
          total = fmaf(state.y, weight, total);
          sum = fmaf(x[j], weight, sum);
        }
      }
    }
    out[row_of(column) * V_HEAD_DIM + channel] = total > 0.f ? __fdividef(sum, total) : 0.f;
    if (channel == 0) lse[row_of(column)] = log_sum(highest, total) * kLog2;
  }
}
