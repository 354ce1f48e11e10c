// Metal: what the bodies use and CUDA or the host spell differently. A simdgroup has 32 lanes on every Apple GPU.
#define DEVICE device
#define CONSTANT constant
#define THREAD thread
#define INLINE inline __attribute__((always_inline))
#define SHARED(type, name, count) threadgroup type name[count]
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define UNROLL _Pragma("clang loop unroll(full)")
#define PACK_ALIGN alignas(16)

namespace pippin {

INLINE float exp2_of(float x) { return metal::fast::exp2(x); }
// Angles grow with the position: the fast sine is right for small ones only.
INLINE float rsqrt_of(float x) { return metal::rsqrt(x); }
INLINE float sin_of(float x) { return metal::precise::sin(x); }
INLINE float cos_of(float x) { return metal::precise::cos(x); }
INLINE float shuffle_xor(float x, int mask) { return metal::simd_shuffle_xor(x, ushort(mask)); }

}  // namespace pippin
