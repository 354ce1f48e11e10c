// Shared by the bodies, in the common subset of Metal and CUDA C++.
namespace pippin {

CONSTANT constexpr float NOTHING = -1e30f;  // a logit that no token has; finite, so that differences of two are numbers
CONSTANT constexpr float LOG2E = 1.4426950408889634f;

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int larger(int a, int b) { return a > b ? a : b; }
INLINE float larger(float a, float b) { return a > b ? a : b; }

// 16 bytes that are loaded and stored at once.
template <typename T>
struct PACK_ALIGN Pack {
  T v[16 / sizeof(T)];
};

// The same 16 bytes as words, for mma().
struct PACK_ALIGN Words {
  unsigned w[4];
};

INLINE Words no_words() {
  Words x;
  x.w[0] = x.w[1] = x.w[2] = x.w[3] = 0;
  return x;
}

template <typename T>
INLINE Words load_words(const DEVICE T* p, size_t at) {
  return ((const DEVICE Words*)p)[at];
}

// 8 numbers that lie together, 16 bytes at a time; zeros if there are none.
template <typename T>
INLINE void load_eight(const DEVICE T* p, bool any, THREAD float (&x)[8]) {
  constexpr int EACH = 16 / sizeof(T);
  UNROLL
  for (int n = 0; n < 8 / EACH; n++) {
    Pack<T> pack;
    if (any) pack = ((const DEVICE Pack<T>*)p)[n];
    UNROLL
    for (int e = 0; e < EACH; e++) x[n * EACH + e] = any ? float(pack.v[e]) : 0.0f;
  }
}

template <typename T>
INLINE void store_eight(DEVICE T* p, const THREAD float (&x)[8]) {
  constexpr int EACH = 16 / sizeof(T);
  UNROLL
  for (int n = 0; n < 8 / EACH; n++) {
    Pack<T> pack;
    UNROLL
    for (int e = 0; e < EACH; e++) pack.v[e] = T(x[n * EACH + e]);
    ((DEVICE Pack<T>*)p)[n] = pack;
  }
}

// The smallest power of 2 that is at least n, at most 32: how many lanes share a vector of n packs.
INLINE constexpr int lanes_for(int n) { return n > 16 ? 32 : n > 8 ? 16 : n > 4 ? 8 : n > 2 ? 4 : n > 1 ? 2 : 1; }

template <int LANES>
INLINE float sum_lanes(float x) {
  UNROLL
  for (int step = LANES / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

// The same angle between -pi and pi, where fast sines are right to 2^-21: minus whole turns, 2 pi in two numbers.
INLINE float within_a_turn(float angle) {
  const float turns = floor_of(angle * 0.15915494309189535f + 0.5f);
  return fma_of(turns, 1.7484555e-7f, fma_of(turns, -6.2831855f, angle));
}

// tanh as 1 - 2 / (e^2x + 1); beyond 15 it is 1 in float32, and e^2x could overflow.
INLINE float tanh_of(float x) { return 1.0f - 2.0f / (exp2_of(2.0f * LOG2E * (x < 15.0f ? x : 15.0f)) + 1.0f); }

template <typename T>
INLINE float number(const THREAD Pack<T>& p, int e) {
  return float(p.v[e]);
}

// A lane's share of q . k, where lane l of LANES has packs l, l + LANES, …; a pack is a Pack or quantized (packed.h).
template <typename P, int N, int E>
INLINE float dot(const THREAD float (&q)[E], const THREAD P (&k)[N]) {
  float x = 0.0f;
  UNROLL
  for (int n = 0; n < N; n++) {
    UNROLL
    for (int e = 0; e < E / N; e++) x += q[n * (E / N) + e] * number(k[n], e);
  }
  return x;
}

// Online softmax in base 2: takes U logits s with their values v into top, total and acc. NOTHING counts for nothing.
template <int U, typename P, int N, int E>
INLINE void absorb(
    THREAD float& top, THREAD float& total, THREAD float (&acc)[E], const THREAD float (&s)[U],
    const THREAD P (&v)[U][N]) {
  float next = top;
  UNROLL
  for (int u = 0; u < U; u++) next = larger(next, s[u]);
  const float keep = exp2_of(top - next);
  total *= keep;
  UNROLL
  for (int e = 0; e < E; e++) acc[e] *= keep;
  UNROLL
  for (int u = 0; u < U; u++) {
    const float p = s[u] > NOTHING ? exp2_of(s[u] - next) : 0.0f;
    total += p;
    UNROLL
    for (int n = 0; n < N; n++) {
      UNROLL
      for (int e = 0; e < E / N; e++) acc[n * (E / N) + e] += p * number(v[u][n], e);
    }
  }
  top = next;
}

// Joins what groups of LANES lanes have absorbed; afterwards every group has the whole.
template <int LANES, int E>
INLINE void merge_lanes(THREAD float& top, THREAD float& total, THREAD float (&acc)[E]) {
  UNROLL
  for (int step = LANES; step < 32; step *= 2) {
    const float other = shuffle_xor(top, step);
    const float next = larger(top, other);
    const float mine = exp2_of(top - next), theirs = exp2_of(other - next);
    total = total * mine + shuffle_xor(total, step) * theirs;
    UNROLL
    for (int e = 0; e < E; e++) acc[e] = acc[e] * mine + shuffle_xor(acc[e], step) * theirs;
    top = next;
  }
}

}  // namespace pippin
