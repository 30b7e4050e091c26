// Which part of the batch a thread block works on.
#pragma once
#include "shape.cuh"

// What a thread block does: one split of one part, a KV head and column tile, of one sequence.
struct Work {
  int sequence, length, first_row, rows, part, split, splits, first_block;
};

__device__ __forceinline__ int splits_of(int length, int chunk) {
  const int groups = (length + kGroup - 1) / kGroup;
  return max(1, (groups + chunk - 1) / chunk);
}

// Sequences of about one length: as many blocks for each, known before any length is.
__device__ __forceinline__ void share_evenly(const int* lengths, const int* query_starts, int parts,
                                             int splits, Work& work) {
  const int unit = blockIdx.x / splits;
  work.sequence = unit / parts;
  work.part = unit % parts;
  work.split = blockIdx.x % splits;
  work.splits = splits;
  work.first_block = unit * splits;
  work.length = __ldg(lengths + work.sequence);
  work.first_row = __ldg(query_starts + work.sequence);
  work.rows = __ldg(query_starts + work.sequence + 1) - work.first_row;
}

// Deals the grid's blocks to sequences in proportion to their groups: the smallest chunk of groups a
// block with which no more blocks are needed than there are. Every warp computes the same.
__device__ __forceinline__ bool deal(const int* lengths, const int* query_starts, int sequences,
                                     int parts, int max_groups, Work& work) {
  const int lane = threadIdx.x & 31, budget = gridDim.x / parts;
  const int own = lane < sequences ? __ldg(lengths + lane) : -1;
  const int own_start = lane < sequences ? __ldg(query_starts + lane) : 0;
  const int own_stop = lane < sequences ? __ldg(query_starts + lane + 1) : 0;
  const auto needed = [&](int chunk) {
    int splits = own >= 0 ? splits_of(own, chunk) : 0;
    for (int i = lane + 32; i < sequences; i += 32) splits += splits_of(__ldg(lengths + i), chunk);
    return __reduce_add_sync(~0u, splits);
  };
  int low = (needed(1) + budget - 1) / budget, high = max(low, max_groups);
  if (needed(low) > budget) {
    while (low < high) {
      const int chunk = (low + high) / 2;
      if (needed(chunk) <= budget) high = chunk;
      else low = chunk + 1;
    }
  }
  const int block = blockIdx.x;
  int before = 0;
  for (int base = 0; base < sequences; base += 32) {
    const int i = base + lane;
    const int length = base == 0 ? own : i < sequences ? __ldg(lengths + i) : -1;
    const int splits = length >= 0 ? splits_of(length, low) : 0;
    int end = splits * parts;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    end += before;
    const uint32_t beyond = __ballot_sync(~0u, end > block);
    if (beyond) {
      const int source = __ffs(beyond) - 1;
      work.sequence = base + source;
      work.length = __shfl_sync(~0u, length, source);
      work.splits = __shfl_sync(~0u, splits, source);
      work.first_row = base == 0 ? __shfl_sync(~0u, own_start, source)
                                 : __ldg(query_starts + work.sequence);
      work.rows = (base == 0 ? __shfl_sync(~0u, own_stop, source)
                             : __ldg(query_starts + work.sequence + 1)) - work.first_row;
      const int start = __shfl_sync(~0u, end, source) - work.splits * parts;
      work.part = (block - start) / work.splits;
      work.split = (block - start) % work.splits;
      work.first_block = start + work.part * work.splits;
      return true;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return false;
}

// A capped score less what is taken off. scale made x the exponent of 2 of exp(2 score / cap); soft_cap is
// in units of log 2.
__device__ __forceinline__ float capped(float x, float soft_cap, float top) {
  const float tanh = 1.f - __fdividef(2.f, 1.f + exp2_approx(fminf(x, 126.f)));
  return fmaf(soft_cap, tanh, -top);
}

// Logarithm to base 2 of the sum of weights.
__device__ __forceinline__ float log_sum(float highest, float total) {
  return total > 0.f ? highest + __log2f(total) : __int_as_float(0xff800000);
}
