// The kernels' ptx.cuh for a CPU: a thread of the block is a thread, what a warp does together goes through
// a barrier of its 32 threads. Copies are done when they are asked for. Blocks are processes.
#pragma once
#include <sched.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using std::fmaf;
using std::uint32_t;
using std::uint8_t;

#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes)

struct int2 { int x, y; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x < y ? y : x; }

// What a block's threads share, and who a thread is.
struct Index { int x; };
struct Warp {
  std::barrier<> barrier{32};
  uint32_t words[32][8];
};
struct CopyBarrier {
  std::atomic<int> phase{0};
  int expected = 0;
};
inline Warp warps[WARPS];
inline CopyBarrier copy_barriers[512];
inline std::barrier<> block_barrier{32 * WARPS};
inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;
alignas(1024) inline uint8_t shared[232448];

inline Warp& own_warp() { return warps[threadIdx.x / 32]; }
inline int own_lane() { return threadIdx.x % 32; }
inline void __syncwarp() { own_warp().barrier.arrive_and_wait(); }
inline void __syncthreads() { block_barrier.arrive_and_wait(); }

template <typename To, typename From>
To bits_of(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// Puts words where the warp sees them, lets `use` look, and frees the place.
template <int count, typename Use>
auto exchanged(const uint32_t (&own)[count], Use use) {
  Warp& warp = own_warp();
  std::memcpy(warp.words[own_lane()], own, sizeof own);
  __syncwarp();
  const auto result = use(warp.words);
  __syncwarp();
  return result;
}

template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  const uint32_t own[1] = {bits_of<uint32_t>(x)};
  return exchanged(own, [&](auto& words) { return bits_of<T>(words[lane & 31][0]); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) { return __shfl_sync(mask, x, own_lane() ^ distance); }
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x, max(own_lane() - distance, own_lane() < distance ? own_lane() : 0));
}
inline uint32_t __ballot_sync(unsigned, bool x) {
  const uint32_t own[1] = {x};
  return exchanged(own, [](auto& words) {
    uint32_t all = 0;
    for (int i = 0; i < 32; i++) all |= words[i][0] << i;
    return all;
  });
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x); }
inline int __reduce_add_sync(unsigned, int x) {
  const uint32_t own[1] = {static_cast<uint32_t>(x)};
  return exchanged(own, [](auto& words) {
    uint32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += words[i][0];
    return static_cast<int>(sum);
  });
}
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
template <typename T>
T __ldg(const T* place) { return *place; }
template <typename T>
T __ldcg(const T* place) { return *place; }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline float __uint_as_float(uint32_t x) { return bits_of<float>(x); }
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_of<uint32_t>(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __cosf(float x) { return std::cos(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float exp2_approx(float x) { return std::exp2(x); }

inline uint32_t to_half(double x) { return bits_of<uint16_t>(static_cast<_Float16>(x)); }
inline float low_half(uint32_t x) { return bits_of<_Float16>(static_cast<uint16_t>(x)); }
inline float high_half(uint32_t x) { return low_half(x >> 16); }
inline uint32_t pack_half2(float low, float high) { return to_half(low) | to_half(high) << 16; }
inline uint32_t fma_half2(uint32_t x, uint32_t y, uint32_t z) {
  const double low = static_cast<double>(low_half(x)) * low_half(y) + low_half(z);
  const double high = static_cast<double>(high_half(x)) * high_half(y) + high_half(z);
  return to_half(low) | to_half(high) << 16;
}
inline uint32_t mul_half2(uint32_t x, uint32_t y) { return fma_half2(x, y, 0); }
inline uint32_t mul_low(uint32_t x, uint32_t y) { return mul_half2((x & 0xFFFF) * 0x10001u, y); }
inline uint32_t mul_high(uint32_t x, uint32_t y) { return mul_half2((x >> 16) * 0x10001u, y); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t z = 0;
  for (int i = 0; i < 4; i++)
    z |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return z;
}
template <uint32_t mask>
uint32_t and_or(uint32_t x, uint32_t other) { return (x & mask) | other; }
template <uint32_t mask>
uint32_t choose(uint32_t x, uint32_t y) { return (x & mask) | (y & ~mask); }
inline uint32_t rotate_right(uint32_t x, int count) {
  count &= 31;
  return count ? x >> count | x << (32 - count) : x;
}

// Element k of the row or column that four lanes hold two by two, from word `first` on.
inline float element(const uint32_t (&words)[32][8], int quad, int first, int k, int second) {
  const uint32_t pair = words[quad * 4 + k % 8 / 2][first + (k < 8 ? 0 : second)];
  return k & 1 ? high_half(pair) : low_half(pair);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int g = own_lane() / 4, t = own_lane() % 4;
  const float4 sums = exchanged(own, [&](auto& words) {
    float sum[4];
    for (int e = 0; e < 4; e++) {
      double total = c[e];
      for (int k = 0; k < 16; k++)
        total += static_cast<double>(element(words, g, e >> 1, k, 2)) *
                 element(words, 2 * t + (e & 1), 4, k, 1);
      sum[e] = total;
    }
    return make_float4(sum[0], sum[1], sum[2], sum[3]);
  });
  std::memcpy(d, &sums, sizeof d);
}

inline uint32_t transpose(uint32_t x) {
  const uint32_t own[1] = {x};
  const int g = own_lane() / 4, t = own_lane() % 4;
  return exchanged(own, [&](auto& words) {
    const auto half = [&](int row) { return words[row * 4 + g / 2][0] >> 16 * (g & 1) & 0xFFFF; };
    return half(2 * t) | half(2 * t + 1) << 16;
  });
}

inline uint32_t shared_address(const void* p) { return static_cast<const uint8_t*>(p) - shared; }
inline bool elect() { return own_lane() == 0; }
inline void release_next_launch() {}
inline void wait_for_launch_before() {}

inline CopyBarrier& barrier_at(uint32_t address) { return copy_barriers[address / 8 % 512]; }
inline void barrier_init(uint32_t) {}
inline void barriers_visible() {}
inline void barrier_expect(uint32_t barrier, int num_bytes) { barrier_at(barrier).expected = num_bytes; }
inline void barrier_wait(uint32_t barrier, int parity) {
  while ((barrier_at(barrier).phase & 1) == parity) sched_yield();
}
inline void bulk_copy(uint32_t target, const uint8_t* source, int num_bytes, uint32_t barrier) {
  if ((target | num_bytes | reinterpret_cast<uintptr_t>(source)) % 16) std::abort();
  std::memcpy(shared + target, source, num_bytes);
  if ((barrier_at(barrier).expected -= num_bytes) == 0) barrier_at(barrier).phase++;
}

template <typename T>
void store_relaxed(T* place, T x) {
  if constexpr (sizeof x == 8) __atomic_store_n(reinterpret_cast<uint64_t*>(place), bits_of<uint64_t>(x), __ATOMIC_SEQ_CST);
  else __atomic_store_n(place, x, __ATOMIC_SEQ_CST);
}
template <typename T>
T load_relaxed(const T* place) {
  sched_yield();
  if constexpr (sizeof(T) == 8) return bits_of<T>(__atomic_load_n(reinterpret_cast<const uint64_t*>(place), __ATOMIC_SEQ_CST));
  else return __atomic_load_n(place, __ATOMIC_SEQ_CST);
}
