// Products of a warpgroup, 4 warps, on Hopper (sm_90a), and shared memory as they read it.
#pragma once
#include "ptx.cuh"

// Second factors lie in shared memory in rows of 128 bytes, eight of them 1 KB, whose 16-byte chunks are
// swizzled: chunk c of row r stands at c ^ (r & 7). The tensor cores are told so by this descriptor.
__device__ __forceinline__ unsigned long long swizzled_rows(uint32_t address) {
  constexpr unsigned long long kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (address >> 4) | kEightRows << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// The sums of a product as operands that are read and written.
#define SUMS(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
  "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
  "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])

__device__ __forceinline__ void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// What came before in d and in shared memory is there for the products that follow.
__device__ __forceinline__ void warpgroup_arrive(float (&d)[32]) {
  asm volatile("wgmma.fence.sync.aligned;" : SUMS(d) : : "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// D += A B: A 64 x 16 fp16, rows 16 w to 16 w + 15 of warp w as `mma` takes them; B 16 x 64 in shared
// memory, columns apart (`transposed` 0) or rows apart (1); D 64 x 64 fp32, every 8 columns as `mma` has them.
template <int transposed>
__device__ __forceinline__ void warpgroup_mma(float (&d)[32], const uint32_t (&a)[4],
                                              unsigned long long b) {
  asm volatile(
      "{.reg .pred p;\nsetp.eq.u32 p,0,0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,"
      "%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31"
      "},{%32,%33,%34,%35},%36,p,1,1,%37;}"
      : SUMS(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(transposed));
}

// Waits until all but the `pending` last committed products have ended.
template <int pending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Waits until all but the `pending` last committed products have ended; d is then the caller's.
template <int pending>
__device__ __forceinline__ void warpgroup_wait(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : SUMS(d) : "n"(pending) : "memory");
}

// Waits for `threads` threads; returns whether any came with `x`.
__device__ __forceinline__ bool barrier_any(int barrier, int threads, bool x) {
  uint32_t y;
  asm volatile(
      "{.reg .pred p,q;\nsetp.ne.u32 p,%1,0;\nbarrier.cta.red.or.pred q,%2,%3,p;\n"
      "selp.u32 %0,1,0,q;}"
      : "=r"(y)
      : "r"(static_cast<uint32_t>(x)), "r"(barrier), "r"(threads)
      : "memory");
  return y;
}

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync %0,%1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Own writes to shared memory are there for tensor cores and copy engine after the next barrier.
__device__ __forceinline__ void shared_visible() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores four 8 x 8 matrices of fp16; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(row), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Loads four 8 x 8 matrices of fp16, transposed.
__device__ __forceinline__ void load_transposed(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ uint32_t max_half2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.f16x2 %0,%1,%2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
