// CUDA C++ (NVRTC): what the bodies use and Metal or the host spell differently.
#define DEVICE
#define CONSTANT static
#define THREAD
#define INLINE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")
#define PACK_ALIGN alignas(16)
#define OF_BLOCK

namespace pippin {

// The instruction itself: exp2f adds four more for results under 2^-126, which count for nothing here.
INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
typedef unsigned long long wide;

INLINE float log_of(float x) { return logf(x); }
INLINE float rsqrt_of(float x) { return rsqrtf(x); }
INLINE float sin_of(float x) { return __sinf(x); }
INLINE float cos_of(float x) { return __cosf(x); }
INLINE float floor_of(float x) { return floorf(x); }
INLINE float max_of(float a, float b) { return fmaxf(a, b); }
INLINE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
INLINE float float_of(unsigned bits) { return __uint_as_float(bits); }
INLINE unsigned bits_of(float x) { return __float_as_uint(x); }
// c [16, 8] += a [16, 16] b [16, 8] over a warp. Of lane 4 * line + column, a0 and a2 are row `line`, a1 and a3 row
// line + 8, at k = 2 * column (+ 1, and + 8 for a2, a3); b0, b1 column `line` of b at the same k; c as a, 8 wide.
template <typename T>
INLINE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 8 rows of 8 16-bit numbers become columns: lane 4 * line + column has those of row `line` at 2 * column and the next.
INLINE unsigned transpose(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two numbers as the 16-bit halves of a word, the first in the lower half.
template <typename T>
INLINE unsigned two(float low, float high) {
  union {
    unsigned short h[2];
    unsigned w;
  } x;
  const T l = T(low), h = T(high);
  x.h[0] = reinterpret_cast<const unsigned short&>(l);
  x.h[1] = reinterpret_cast<const unsigned short&>(h);
  return x.w;
}

// Bytes 0 and 1 of a word (2 and 3 if `later`), each the lower one of a half.
INLINE unsigned spread_bytes(unsigned w, int later) { return __byte_perm(w, 0u, later ? 0x4342u : 0x4140u); }

// The lower halves of two words, or their upper ones: a's comes first.
INLINE unsigned halves(unsigned a, unsigned b, int upper) { return __byte_perm(a, b, upper ? 0x7632u : 0x5410u); }

// a * b + c of both 16-bit halves of a word.
template <typename T>
INLINE unsigned fma_two(unsigned a, unsigned b, unsigned c);
template <>
__device__ __forceinline__ unsigned fma_two<__nv_bfloat16>(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ unsigned fma_two<__half>(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two 4-bit numbers q, in the lowest bits of both halves of a word, are the numbers OFFSET + q of T once `BITS` are set.
template <typename T>
struct Nibble;
template <>
struct Nibble<__nv_bfloat16> {
  static constexpr unsigned BITS = 0x43004300, ONE = 0x3f803f80, MINUS = 0xc300c300;
};
template <>
struct Nibble<__half> {
  static constexpr unsigned BITS = 0x64006400, ONE = 0x3c003c00, MINUS = 0xe400e400;
};

// Loads that are issued where they are written: ptxas else moves each to where it is used, and few are on their way at
// once. 16 bytes that no one reads again soon leave what else lies in the L1 cache alone.
INLINE void fetch_once(const void* p, unsigned (&x)[4]) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(p));
}
// 16 bytes that others read too; zeros if there are not `any`.
INLINE void fetch(const void* p, bool any, unsigned (&x)[4]) {
  asm volatile("{.reg .pred any; setp.ne.u32 any, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
               "@any ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "=&r"(x[0]), "=&r"(x[1]), "=&r"(x[2]), "=&r"(x[3])
               : "l"(p), "r"(unsigned(any)));
}
INLINE unsigned fetch(const unsigned char* p) {
  unsigned x;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
INLINE unsigned fetch(const unsigned short* p) {
  unsigned short x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}

// 16 bytes into shared memory, or zeros if there are not `any`: there for this thread once it has waited, for others behind
// a barrier after that. copies_end() closes a group; copies_wait<N>() waits for all but the last N.
INLINE void copy_later(void* to, const void* from, bool any) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from),
               "r"(any ? 16 : 0)
               : "memory");
}
INLINE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
INLINE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The lanes of a warp for which x holds, as bits; all of them call it.
INLINE unsigned lanes_where(bool x) { return __ballot_sync(0xffffffffu, x); }
INLINE int bits_in(unsigned x) { return __popc(x); }
INLINE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE unsigned shuffle_xor(unsigned x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

}  // namespace pippin
