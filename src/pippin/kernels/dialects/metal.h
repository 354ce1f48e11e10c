// Metal: what the bodies use and CUDA or the host spell differently. A simdgroup has 32 lanes on every Apple GPU.
#define DEVICE device
#define CONSTANT constant
#define THREAD thread
#define INLINE inline __attribute__((always_inline))
#define SHARED(type, name, count) threadgroup type name[count]
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define UNROLL _Pragma("clang loop unroll(full)")
#define PACK_ALIGN alignas(16)
#define OF_BLOCK threadgroup

namespace pippin {

INLINE float exp2_of(float x) { return metal::fast::exp2(x); }
typedef unsigned long wide;

INLINE float max_of(float a, float b) { return metal::fmax(a, b); }
INLINE float log_of(float x) { return metal::precise::log(x); }
INLINE float rsqrt_of(float x) { return metal::rsqrt(x); }
INLINE float sin_of(float x) { return metal::fast::sin(x); }
INLINE float cos_of(float x) { return metal::fast::cos(x); }
INLINE float floor_of(float x) { return metal::floor(x); }
INLINE float fma_of(float a, float b, float c) { return metal::fma(a, b, c); }
INLINE float float_of(uint bits) { return as_type<float>(bits); }
INLINE uint bits_of(float x) { return as_type<uint>(x); }
INLINE float shuffle_xor(float x, int mask) { return metal::simd_shuffle_xor(x, ushort(mask)); }
INLINE unsigned shuffle_xor(unsigned x, int mask) { return metal::simd_shuffle_xor(x, ushort(mask)); }

}  // namespace pippin
