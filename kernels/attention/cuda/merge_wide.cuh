// From the teams' states to the answer: sums over the teams of a block, then over the blocks of a part.
#pragma once
#include "teams.cuh"
#include "work.cuh"

// Sums of four channels at one maximum.
struct Sums {
  float highest, total;
  float4 sum;
};

__device__ __forceinline__ float4 weighted(float4 x, float x_weight, float4 y, float y_weight) {
  return make_float4(fmaf(x.x, x_weight, y.x * y_weight), fmaf(x.y, x_weight, y.y * y_weight),
                     fmaf(x.z, x_weight, y.z * y_weight), fmaf(x.w, x_weight, y.w * y_weight));
}

__device__ __forceinline__ Sums add(const Sums& x, const Sums& y) {
  const float highest = fmaxf(x.highest, y.highest);
  const float x_weight = exp2_approx(x.highest - highest);
  const float y_weight = exp2_approx(y.highest - highest);
  return {highest, fmaf(x.total, x_weight, y.total * y_weight),
          weighted(x.sum, x_weight, y.sum, y_weight)};
}

// Merges what the teams staged: sums [team, column, channel] at kStagedAt, maxima and totals [team, column]
// at kStateAt. Columns are dealt to the blocks of a part in turn: a block hands on what it has of the
// others' columns and finishes its own, so that all merge at once.
//
// Blocks wait for each other, so all blocks of a part must run at once: they are started in order, and
// no part has more than the device has multiprocessors. A flag is the launch's mark; the one who waits
// for it takes it away: a graph replays it.
template <typename Row>
__device__ __forceinline__ void merge_teams(uint8_t* shared, const Work& work, int columns, Row row_of,
                                            float* __restrict__ out, float* __restrict__ lse,
                                            uint8_t* partial, uint32_t mark) {
  constexpr int kQuads = V_HEAD_DIM / 4;
  const float* const staged = reinterpret_cast<const float*>(shared + kStagedAt);
  const float2* const states = reinterpret_cast<const float2*>(shared + kStateAt);
  float4* const merged = reinterpret_cast<float4*>(shared + kMergedAt);  // [own column, quad]
  float2* const merged_states = reinterpret_cast<float2*>(merged + kColumns * kQuads);
  uint8_t* const first_place = partial + static_cast<size_t>(work.first_block) * kPartialBytes;
  uint8_t* const own_place = first_place + static_cast<size_t>(work.split) * kPartialBytes;
  const auto finish = [&](int column, int quad, const Sums& x) {
    const float factor = x.total > 0.f ? __fdividef(1.f, x.total) : 0.f;
    float* const row = out + row_of(column) * V_HEAD_DIM + 4 * quad;
    row[0] = x.sum.x * factor, row[1] = x.sum.y * factor;
    row[2] = x.sum.z * factor, row[3] = x.sum.w * factor;
    if (quad == 0) lse[row_of(column)] = log_sum(x.highest, x.total) * kLog2;
  };
  for (int i = threadIdx.x; i < columns * kQuads; i += kThreads) {
    const int column = i / kQuads, quad = i % kQuads;
    const auto of_team = [&](int team) {
      const float2 state = states[team * kColumns + column];
      return Sums{state.x, state.y, *reinterpret_cast<const float4*>(
                                        staged + (team * kColumns + column) * kStagingRow + 4 * quad)};
    };
    const Sums x = add(of_team(0), of_team(1));
    if (work.splits == 1) {
      finish(column, quad, x);
    } else if (column % work.splits == work.split) {
      merged[column / work.splits * kQuads + quad] = x.sum;
      if (quad == 0) merged_states[column / work.splits] = make_float2(x.highest, x.total);
    } else {
      reinterpret_cast<float4*>(own_place)[i] = x.sum;
      if (quad == 0)
        reinterpret_cast<float2*>(own_place + kSumBytes)[column] = make_float2(x.highest, x.total);
    }
  }
  if (work.splits == 1) return;
  __syncthreads();
  const int other = threadIdx.x;
  if (other < work.splits && other != work.split) {
    const auto flag = [&](int of, int from) {
      return reinterpret_cast<uint32_t*>(first_place + static_cast<size_t>(of) * kPartialBytes +
                                         kSumBytes + kSumStateBytes) + from;
    };
    __threadfence();
    store_relaxed(flag(other, work.split), mark);
    while (load_relaxed(flag(work.split, other)) != mark) {}
    store_relaxed(flag(work.split, other), 0u);
    __threadfence();
  }
  __syncthreads();

  const int own = max(0, (columns - work.split + work.splits - 1) / work.splits);
  const int numbers = own * kQuads;
  // Threads beside each other take the same numbers of different blocks.
  const int sharers = min(work.splits, kThreads / max(1, min(numbers, kThreads)));
  Sums* const shares = reinterpret_cast<Sums*>(shared + kStagedAt);  // [sharer, number]
  for (int i = threadIdx.x; i < numbers * sharers; i += kThreads) {
    const int number = i % numbers, index = number / kQuads, quad = number % kQuads;
    const int column = work.split + index * work.splits;
    Sums x = {kNever, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll 4
    for (int k = i / numbers; k < work.splits; k += sharers) {
      const uint8_t* const place = first_place + static_cast<size_t>(k) * kPartialBytes;
      float2 state = merged_states[index];
      float4 sum = merged[number];
      if (k != work.split) {
        state = __ldcg(reinterpret_cast<const float2*>(place + kSumBytes) + column);
        sum = __ldcg(reinterpret_cast<const float4*>(place) + column * kQuads + quad);
      }
      x = add(x, {state.x, state.y, sum});
    }
    if (sharers == 1) finish(column, quad, x);
    else shares[i] = x;
  }
  if (sharers == 1) return;
  __syncthreads();
  for (int number = threadIdx.x; number < numbers; number += kThreads) {
    Sums x = shares[number];
    for (int k = 1; k < sharers; k++) x = add(x, shares[k * numbers + number]);
    finish(work.split + number / kQuads * work.splits, number % kQuads, x);
  }
}
