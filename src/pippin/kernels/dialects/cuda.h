// CUDA C++ (NVRTC): what the bodies use and Metal or the host spell differently.
#define DEVICE
#define CONSTANT static
#define THREAD
#define INLINE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")
#define PACK_ALIGN alignas(16)

namespace pippin {

// The instruction itself: exp2f adds four more for results under 2^-126, which count for nothing here.
INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

}  // namespace pippin
