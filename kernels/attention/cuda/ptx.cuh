// Instructions that CUDA C++ has no name for. fp16 is kept as bits, two numbers a register, so that
// the run-time compiler needs no header of the toolkit.
#pragma once

using uint8_t = unsigned char;
using uint32_t = unsigned int;

// fp16 pairs: low * 2^0 | high * 2^16.
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float low_half(uint32_t x) {
  float y;
  asm("{.reg .b16 l,h;\nmov.b32 {l,h},%1;\ncvt.f32.f16 %0,l;}" : "=f"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float high_half(uint32_t x) {
  float y;
  asm("{.reg .b16 l,h;\nmov.b32 {l,h},%1;\ncvt.f32.f16 %0,h;}" : "=f"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ uint32_t mul_half2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

__device__ __forceinline__ uint32_t fma_half2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t w;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(w) : "r"(x), "r"(y), "r"(z));
  return w;
}

// Both halves of y times the low or the high half of x.
__device__ __forceinline__ uint32_t mul_low(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("{.reg .b16 l,h;.reg .b32 t;\nmov.b32 {l,h},%1;\nmov.b32 t,{l,l};\nmul.rn.f16x2 %0,t,%2;}"
      : "=r"(z) : "r"(x), "r"(y));
  return z;
}

__device__ __forceinline__ uint32_t mul_high(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("{.reg .b16 l,h;.reg .b32 t;\nmov.b32 {l,h},%1;\nmov.b32 t,{h,h};\nmul.rn.f16x2 %0,t,%2;}"
      : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// D = A B + C, A 16 x 16 rows of fp16 in registers, B 16 x 8 columns, C and D fp32.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Transposes an 8 x 8 matrix of fp16 that a warp holds.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// (x & mask) | other, one instruction.
template <uint32_t mask>
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t other) {
  uint32_t y;
  asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(y) : "r"(x), "n"(mask), "r"(other));
  return y;
}

// Bits of x where mask is set, of y elsewhere.
template <uint32_t mask>
__device__ __forceinline__ uint32_t choose(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("lop3.b32 %0,%1,%2,%3,0xB8;" : "=r"(z) : "r"(y), "n"(mask), "r"(x));
  return z;
}

__device__ __forceinline__ uint32_t rotate_right(uint32_t x, int count) {
  return __funnelshift_r(x, x, count);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// True in one lane of the warp; the compiler then knows that the branch has one thread.
__device__ __forceinline__ bool elect() {
  uint32_t x;
  asm volatile("{.reg .pred p;\nelect.sync _|p,0xffffffff;\nselp.b32 %0,1,0,p;}" : "=r"(x));
  return x;
}

// Lets the next launch's blocks take the places that this one's leave, where its launch allows that.
__device__ __forceinline__ void release_next_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits for what the launch before wrote, where this launch was allowed to start before its end.
__device__ __forceinline__ void wait_for_launch_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
      "@p bra done;\nbra wait;\ndone:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies num_bytes, a multiple of 16, to shared memory; the barrier counts them.
__device__ __forceinline__ void bulk_copy(uint32_t target, const uint8_t* source, int num_bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
          target),
      "l"(source), "r"(num_bytes), "r"(barrier)
      : "memory");
}

// Eight bytes that other blocks see whole.
__device__ __forceinline__ void store_relaxed(uint2* place, uint2 x) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0],{%1,%2};" ::"l"(place), "r"(x.x), "r"(x.y)
               : "memory");
}

__device__ __forceinline__ uint2 load_relaxed(const uint2* place) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0,%1},[%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(place)
               : "memory");
  return x;
}

// The same of four bytes.
__device__ __forceinline__ void store_relaxed(uint32_t* place, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.b32 [%0],%1;" ::"l"(place), "r"(x) : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* place) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.b32 %0,[%1];" : "=r"(x) : "l"(place) : "memory");
  return x;
}
