// The kernels' wgmma.cuh for a CPU: products are done when they are asked for.
#pragma once
#include "ptx.cuh"

inline std::barrier<> team_barriers[2] = {std::barrier<>(16 * WARPS), std::barrier<>(16 * WARPS)};
inline std::atomic<int> votes[2];

inline unsigned long long swizzled_rows(uint32_t address) {
  if (address % 128) std::abort();
  return address >> 4;
}

// A second factor's element k of column n: 16-byte chunks lie where rows of 128 bytes have them swizzled.
inline float second_factor(unsigned long long b, int row, int offset) {
  uint32_t place = static_cast<uint32_t>(b << 4) + row / 8 * 1024 + row % 8 * 128 + offset;
  place ^= (place >> 7 & 7) << 4;
  uint16_t x;
  std::memcpy(&x, shared + place, sizeof x);
  return low_half(x);
}

inline void warpgroup_arrive() {}
inline void warpgroup_arrive(float (&)[32]) {}
inline void warpgroup_commit() {}
template <int pending>
void warpgroup_wait() {}
template <int pending>
void warpgroup_wait(float (&)[32]) {}

template <int transposed>
void warpgroup_mma(float (&d)[32], const uint32_t (&a)[4], unsigned long long b) {
  const int g = own_lane() / 4, t = own_lane() % 4;
  exchanged(a, [&](auto& words) {
    for (int i = 0; i < 32; i++) {
      const int n = i / 4 * 8 + 2 * t + (i & 1);
      double sum = d[i];
      for (int k = 0; k < 16; k++)
        sum += static_cast<double>(element(words, g, i >> 1 & 1, k, 2)) *
               (transposed ? second_factor(b, k, 2 * n) : second_factor(b, n, 2 * k));
      d[i] = sum;
    }
    return 0;
  });
}

inline void barrier_sync(int barrier, int) { team_barriers[barrier - 1].arrive_and_wait(); }
inline bool barrier_any(int barrier, int threads, bool x) {
  votes[barrier - 1] += x;
  barrier_sync(barrier, threads);
  const bool any = votes[barrier - 1];
  barrier_sync(barrier, threads);
  votes[barrier - 1] -= x;
  barrier_sync(barrier, threads);
  return any;
}
inline void shared_visible() {}

inline void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  const uint32_t own[5] = {x[0], x[1], x[2], x[3], row};
  exchanged(own, [&](auto& words) {
    for (int i = 0; i < 4; i++)
      std::memcpy(shared + words[8 * i + own_lane() / 4][4] + own_lane() % 4 * 4, &x[i], 4);
    return 0;
  });
}

inline void load_transposed(uint32_t row, uint32_t (&x)[4]) {
  const uint32_t own[1] = {row};
  const int g = own_lane() / 4, t = own_lane() % 4;
  exchanged(own, [&](auto& words) {
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++)
        std::memcpy(reinterpret_cast<uint16_t*>(&x[i]) + j,
                    shared + words[8 * i + 2 * t + j][0] + 2 * g, 2);
    return 0;
  });
}

inline uint32_t max_half2(uint32_t x, uint32_t y) {
  return pack_half2(fmaxf(low_half(x), low_half(y)), fmaxf(high_half(x), high_half(y)));
}
