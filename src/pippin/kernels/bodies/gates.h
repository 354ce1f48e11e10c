// What experts do with their gate: silu, or gpt-oss' sigmoid of `steep` times a gate that ends at `limit`.
namespace pippin {

template <bool CLIPPED>
INLINE float gated(float gate, float up, float steep, float limit) {
  const float g = CLIPPED && limit < gate ? limit : gate;
  const float u = !CLIPPED ? up : limit < up ? limit : up < -limit ? -limit : up;
  return g / (1.0f + exp2_of(-LOG2E * (CLIPPED ? steep * g : g))) * (CLIPPED ? u + 1.0f : u);
}

}  // namespace pippin
