// Keys: parameters of a group, phase tables, codes of a step.
#pragma once
#include "shape.cuh"

// How a radius comes from its code: (code / 16 + x) y, x a number of fp16.
struct Radius {
  uint32_t x;
  float y;
};

// x lies on the grid of fp16 at the largest sum, so that no sum is rounded; what this moves is put
// into y, so that the radius in the middle is exact. A step far below the minimum is lost in a large
// x: a radius moves by less than one rounding of fp16.
__device__ __forceinline__ Radius radius_of(float minimum, float step) {
  const float middle = fmaf(static_cast<float>(1 << (RADIUS_BITS - 1)), step, minimum);
  if (step <= minimum * 6.103515625e-05f) return {0x6800u, middle * (1.f / 2048.f)};
  const float x = __fdividef(fmaf(0.5f, step, minimum), step * kRadiusUnit);
  const uint32_t on_grid = pack_half2(low_half(pack_half2(x + kTopCode, 0.f)) - kTopCode, 0.f);
  return {on_grid, __fdividef(middle, low_half(on_grid) + kTopCode / 2)};
}

// Turns the parameters of a group into what its tiles need, for pair 8k + 4e + t, times `scale`:
// radius x at [t][k][e]; for arcs the class of the width and y times cosine and sine of the start, fp32,
// in the same order; else y at [column][k], column 4e + t.
__device__ __forceinline__ void derive(const uint8_t* parameters, uint8_t* derived, float scale,
                                       int lane) {
  if (lane >= kPairs / 2) return;
#if ARCS
  const uint32_t high = read<unsigned short>(parameters + 2 * lane);
  const uint32_t low = read<unsigned short>(parameters + kPairs + 2 * lane);
  const uint32_t minima = read<uint32_t>(parameters + 2 * kPairs + 4 * lane);
  const uint32_t steps = read<uint32_t>(parameters + 4 * kPairs + 4 * lane);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t arc = ((high >> (8 * i) & 255) << 8) | (low >> (8 * i) & 255);
    const Radius radius = radius_of(i ? high_half(minima) : low_half(minima),
                                    i ? high_half(steps) : low_half(steps));
    const float start = (arc >> 4) * (6.283185307179586f / 4096.f);
    const float y = radius.y * scale;
    const uint32_t wide = min(arc & 15u, 8u);
    const int p = 2 * lane + i, at = (p & 3) * 2 * kSteps + (p >> 3) * 2 + ((p >> 2) & 1);
    write(derived + kTurnsAt + (p & 3) * kTurnsRow + ((p >> 3) * 2 + ((p >> 2) & 1)) * 8,
          make_float2(y * __cosf(start), y * __sinf(start)));
    write(derived + 2 * at, static_cast<unsigned short>(radius.x));
    write(derived + kClassesAt + 2 * at,
          static_cast<unsigned short>(((wide & 3) | (wide >> 2) << 6) * 0x0101));
  }
#else
  const int column = 2 * lane / kSteps, k = 2 * lane % kSteps;
  const uint32_t minima = read<uint32_t>(parameters + 4 * lane);
  const uint32_t steps = read<uint32_t>(parameters + 2 * kPairs + 4 * lane);
  const Radius first = radius_of(low_half(minima), low_half(steps));
  const Radius second = radius_of(high_half(minima), high_half(steps));
  const int at = (column & 3) * 2 * kSteps + 2 * k + (column >> 2);
  write(derived + 2 * at, static_cast<unsigned short>(first.x));
  write(derived + 2 * at + 4, static_cast<unsigned short>(second.x));
  write(derived + 2 * kPairs + 8 * lane, make_float2(first.y * scale, second.y * scale));
#endif
}

#if !ARCS
// Writes the warp's phase table: radius y times cosine and sine of every angle of every pair.
__device__ __forceinline__ void fill_table(uint8_t* table, const uint8_t* parameters,
                                           const uint8_t* derived, int lane) {
  constexpr int kEach = (1 << ANGLE_BITS) / 4;  // entries of a lane in a pair
  const int column = lane >> 2, first = (lane & 3) * kEach;
#pragma unroll
  for (int k4 = 0; k4 < kSteps; k4 += 4) {
    const int at = column * kSteps + k4;
    const uint2 zeros = read<uint2>(parameters + 4 * kPairs + 2 * at);
    const uint2 steps = read<uint2>(parameters + 6 * kPairs + 2 * at);
    const float4 radii = read<float4>(derived + 2 * kPairs + 4 * at);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t zero = k < 2 ? zeros.x : zeros.y, step = k < 2 ? steps.x : steps.y;
      const float turn = k % 2 ? high_half(step) : low_half(step);
      const float base = fmaf(first + 0.5f, turn, k % 2 ? high_half(zero) : low_half(zero));
      const float radius = k == 0 ? radii.x : k == 1 ? radii.y : k == 2 ? radii.z : radii.w;
      uint32_t entry[kEach];
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        const float angle = fmaf(static_cast<float>(i), turn, base);
        entry[i] = pack_half2(radius * __cosf(angle), radius * __sinf(angle));
      }
      uint8_t* target = table + (k4 + k) * 8 * kPairTable + lane * 4 * kEach;
      if constexpr (kEach == 4) write(target, make_uint4(entry[0], entry[1], entry[2], entry[3]));
      else write(target, make_uint2(entry[0], entry[1]));
    }
  }
}
#endif

// Entry of code j of four in a phase table of pairs: its byte becomes part of the address.
__device__ __forceinline__ uint32_t pair_entry(const uint8_t* shared, uint32_t table, uint32_t codes,
                                               int step, int j) {
  return read<uint32_t>(shared + __byte_perm(codes, table, 0x7650 | j) +
                        (2 * step + j / 2) * 4 * kPairTable);
}

// The first factor of a step of S^T from the four codes of a lane and the quotients of its pairs. Beside
// the bits of a code go those of `places`: of its pair in the table, or the class of its arc;
// entry(codes, j) then gives the phase of code j.
template <typename Entry>
__device__ __forceinline__ void decode_keys(uint32_t x, uint32_t quotients, uint32_t places, Entry entry,
                                            uint32_t (&a)[4]) {
  const uint32_t first = fma_half2(x & kRadiusMask, kRadiusScale, quotients);
  const uint32_t second = fma_half2(rotate_right(x, 8) & kRadiusMask, kRadiusScale, quotients);
  const uint32_t codes = and_or<kAngleMask>(x, places);
  a[0] = mul_low(first, entry(codes, 0)), a[1] = mul_low(second, entry(codes, 1));
  a[2] = mul_high(first, entry(codes, 2)), a[3] = mul_high(second, entry(codes, 3));
}

// The four codes of one step, each times 4 in its byte; bits outside the code are of no meaning.
__device__ __forceinline__ uint32_t codes_of(const uint32_t* words, int step) {
  if constexpr (kWords == 8) {
    return words[step];
  } else {
    const uint32_t* w = words + step / 4 * 3;
    if (step % 4 == 0) return w[0];
    if (step % 4 == 1) return choose<0x0C0C0C0Cu>(rotate_right(w[0], 6), w[1] << 2);
    if (step % 4 == 2) return choose<0x3C3C3C3Cu>(rotate_right(w[1], 4), w[2] << 4);
    return rotate_right(w[2], 2);
  }
}

#if ARCS
// A lane's column of queries turned to the starts of the group's arcs: pairs 8k + t and 8k + t + 4.
__device__ __forceinline__ float4 turned(const uint8_t* query, const uint8_t* derived, int n, int k,
                                         int lane) {
  const float4 turn = read<float4>(derived + kTurnsAt + (lane & 3) * kTurnsRow + k * 16);
  const float4 own = read<float4>(query + 16 * ((n * kSteps + k) * 32 + lane));
  return make_float4(fmaf(turn.x, own.x, turn.y * own.y), fmaf(turn.x, own.y, -turn.y * own.x),
                     fmaf(turn.z, own.z, turn.w * own.w), fmaf(turn.z, own.w, -turn.w * own.z));
}

// All of them, as the tensor cores take them. Where columns stand at even places, a lane turns every
// other step for its neighbour too.
__device__ __forceinline__ void turn_queries(const uint8_t* query, const uint8_t* derived, int lane,
                                             uint32_t (&q)[COLUMN_TILES][2 * kSteps]) {
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
    for (int k = 0; k < kSteps; k += SPREAD) {
      const float4 x = turned(query, derived, n, SPREAD == 1 ? k : k + (lane >> 2 & 1), lane);
      q[n][2 * k] = pack_half2(x.x, x.y), q[n][2 * k + 1] = pack_half2(x.z, x.w);
      if constexpr (SPREAD == 2) {
        q[n][2 * k + 2] = __shfl_xor_sync(~0u, q[n][2 * k], 4);
        q[n][2 * k + 3] = __shfl_xor_sync(~0u, q[n][2 * k + 1], 4);
      }
    }
}

// What rounding takes off a column of turned queries, times the key in the middle of the group's: a score
// that all tokens of the group lack, which only many groups average.
__device__ __forceinline__ float lost_by_turning(const uint8_t* query, const uint8_t* parameters,
                                                 const uint8_t* derived, int n, int lane) {
  const int t = lane & 3;
  float lost = 0.f;
#pragma unroll 1
  for (int k = 0; k < kSteps; k++) {
    const float4 x = turned(query, derived, n, k, lane);
    const uint32_t first = pack_half2(x.x, x.y), second = pack_half2(x.z, x.w);
    const uint32_t radii = read<uint32_t>(derived + 4 * (t * kSteps + k));
    // Arcs of a whole turn have no middle.
    const uint32_t wide = parameters[kPairs + 8 * k + t] & 15u;
    const uint32_t wide4 = parameters[kPairs + 8 * k + t + 4] & 15u;
    const float half = half_turn(min(wide, 8u)), half4 = half_turn(min(wide4, 8u));
    if (wide)
      lost += (low_half(radii) + kTopCode / 2) * ((x.x - low_half(first)) * __cosf(half) +
                                                  (x.y - high_half(first)) * __sinf(half));
    if (wide4)
      lost += (high_half(radii) + kTopCode / 2) * ((x.z - low_half(second)) * __cosf(half4) +
                                                   (x.w - high_half(second)) * __sinf(half4));
  }
  lost += __shfl_xor_sync(~0u, lost, 1);
  return lost + __shfl_xor_sync(~0u, lost, 2);
}
#endif
