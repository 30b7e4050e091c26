// Queries as a launch gives them.
#pragma once
#include "shape.cuh"

__device__ __forceinline__ float query_element(const void* query, size_t index) {
#if QUERY == 2
  return __ldg(static_cast<const float*>(query) + index);
#else
  const uint32_t x = __ldg(static_cast<const unsigned short*>(query) + index);
  return QUERY == 1 ? __uint_as_float(x << 16) : low_half(x);
#endif
}

// Channels of pair p of a head.
__device__ __forceinline__ int2 channels_of(int p) {
#if INTERLEAVED
  return make_int2(2 * p, 2 * p + 1);
#else
  if (p < ROTARY / 2) return make_int2(p, p + ROTARY / 2);
  const int i = p - ROTARY / 2;
  return make_int2(ROTARY + i, ROTARY + i + (HEAD_DIM - ROTARY) / 2);
#endif
}

// Both numbers of a pair of a row.
__device__ __forceinline__ float2 query_pair(const void* query, size_t row, int pair) {
  const int2 channels = channels_of(pair);
  return make_float2(query_element(query, row * HEAD_DIM + channels.x),
                     query_element(query, row * HEAD_DIM + channels.y));
}
