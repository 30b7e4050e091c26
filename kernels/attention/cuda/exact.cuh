// Scores of short sequences in fp32: sums of few tokens do not average the roundings of fp16.
#pragma once
#include "keys.cuh"

// Writes scores times `scale` of the tokens of one group at `scores`, fp32 [token, column], from the codes
// and parameters of the group's page; `row_of` gives the row of a column, `query_of` (x, y) of a row and
// pair. Warps take a tile of tokens and columns each; the block waits before it reads them.
template <typename Row, typename Query>
__device__ __forceinline__ void score_exactly(const uint8_t* codes, const uint8_t* parameters,
                                              const uint8_t* radii, Row row_of, Query query_of,
                                              float* scores, float scale, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int i = warp; i < kTiles * COLUMN_TILES; i += WARPS) {
    const int tile = i % kTiles, n = i / kTiles;
    const uint8_t* const unit = codes + tile / kUnitTiles * kUnitTiles * kKeyTile;
    uint32_t words[8];
    const uint4 a = read<uint4>(unit + lane * 16);
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
    if constexpr (kWords == 8) {
      const uint4 b = read<uint4>(unit + 512 + lane * 16);
      words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
    } else {
      const uint2 b = read<uint2>(unit + 512 + lane * 8);
      words[4] = b.x, words[5] = b.y;
    }
    float sums[2][8];
    size_t rows[8];
#pragma unroll
    for (int c = 0; c < 8; c += SPREAD) rows[c] = row_of((n * 8 + c) / SPREAD);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int c = 0; c < 8; c++) sums[i][c] = 0.f;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      uint32_t x = codes_of(words, step);
      if constexpr (kUnitTiles == 2) x = tile % 2 ? codes_of(words, kSteps + step) : x;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float minimum, radius_step, first, angle_step;
#if ARCS
        const int p = 8 * step + 4 * e + t;
        const uint32_t arc = parameters[p] << 8 | parameters[kPairs + p];
        minimum = low_half(read<unsigned short>(radii + 2 * p));
        radius_step = low_half(read<unsigned short>(radii + 2 * kPairs + 2 * p));
        angle_step = 2.f * half_turn(min(arc & 15u, 8u) + ANGLE_BITS);
        first = (arc >> 4) * (6.283185307179586f / 4096.f);
#else
        const uint8_t* const own = parameters + 2 * ((t + 4 * e) * kSteps + step);
        minimum = low_half(read<unsigned short>(own));
        radius_step = low_half(read<unsigned short>(own + 2 * kPairs));
        first = low_half(read<unsigned short>(own + 4 * kPairs));
        angle_step = low_half(read<unsigned short>(own + 6 * kPairs));
#endif
        float2 key[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t code = rotate_right(x, 16 * e + 8 * i + 2);
          const float angle = fmaf((code & ((1 << ANGLE_BITS) - 1)) + 0.5f, angle_step, first);
          const float radius =
              fmaf((code >> ANGLE_BITS & ((1 << RADIUS_BITS) - 1)) + 0.5f, radius_step, minimum);
          key[i] = make_float2(radius * __cosf(angle), radius * __sinf(angle));
        }
#pragma unroll
        for (int c = 0; c < 8; c += SPREAD) {
          const float2 q = query_of(rows[c], 8 * step + 4 * e + t);
#pragma unroll
          for (int i = 0; i < 2; i++)
            sums[i][c] = fmaf(key[i].x, q.x, fmaf(key[i].y, q.y, sums[i][c]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int c = 0; c < 8; c += SPREAD) {
        float sum = sums[i][c];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (t == 0) scores[(tile * kTile + g + 8 * i) * kColumns + (n * 8 + c) / SPREAD] = sum * scale;
      }
  }
}
