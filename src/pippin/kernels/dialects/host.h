// The host: every thread of a block is a fiber that runs until its next barrier or shuffle, in an order that the
// schedule gives, so that a missing barrier shows. Shared memory starts as NaN, as on a GPU it starts as anything.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define DEVICE
#define CONSTANT static
#define THREAD
#define INLINE static inline
#define SHARED(type, name, count) type* name = (type*)pippin::shared_memory(sizeof(type) * (count))
#define BARRIER() pippin::barrier(__LINE__)
#define UNROLL
#define PACK_ALIGN
#define OF_BLOCK

namespace pippin {

constexpr int MOST_THREADS = 1024, STACK = 1 << 17, MOST_COPIES = 64;
constexpr int MOST_SHARED = ASYNC ? 49152 : 32768;  // CUDA's bytes of what only it runs; Metal's of threadgroup memory
enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };

struct Copy {
  void* to;
  const void* from;
  bool any;
  int group;
};

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  State state;
  bool started;
  int site;  // the barrier's line, or the shuffle's mask: must agree among those that wait together
  float value;
  size_t shared;
  uint32_t words[6];  // mma's fragments
  int copies, groups;
  Copy later[MOST_COPIES];
};

static Fiber fibers[MOST_THREADS];
static char* stacks;
static jmp_buf scheduler;
static int self, threads, block_x, block_y, blocks_y;
static void** arguments;
static void (*body)();
alignas(16) static char memory[MOST_SHARED];
static char failure[256];
static uint64_t seed;

static void fail(const char* what, int where) {
  if (!failure[0]) snprintf(failure, sizeof failure, "block (%d, %d): %s %d", block_x, block_y, what, where);
}

static __attribute__((noinline)) void wait(State state, int site) {
  fibers[self].state = state;
  fibers[self].site = site;
  if (!_setjmp(fibers[self].at)) _longjmp(scheduler, 1);
}

INLINE void barrier(int line) { wait(AT_BARRIER, line); }

static float shuffle_xor(float x, int mask) {
  fibers[self].value = x;
  wait(AT_SHUFFLE, mask);
  return fibers[self].value;
}

static void* shared_memory(size_t bytes) {
  size_t at = fibers[self].shared;
  fibers[self].shared += (bytes + 15) / 16 * 16;
  if (fibers[self].shared > MOST_SHARED) fail("bytes of shared memory are too many:", int(fibers[self].shared));
  return memory + (fibers[self].shared > MOST_SHARED ? 0 : at);
}

INLINE float exp2_of(float x) { return exp2f(x); }
typedef uint64_t wide;

INLINE float log_of(float x) { return logf(x); }
INLINE float rsqrt_of(float x) { return 1.0f / sqrtf(x); }
INLINE float sin_of(float x) { return sinf(x); }
INLINE float floor_of(float x) { return floorf(x); }
INLINE float max_of(float a, float b) { return a > b ? a : b; }
INLINE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
INLINE float cos_of(float x) { return cosf(x); }

INLINE uint32_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}

INLINE float float_of(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

INLINE uint32_t shuffle_xor(uint32_t x, int mask) { return bits_of(shuffle_xor(float_of(x), mask)); }

// Both 16-bit types round to nearest, ties to even, as both GPUs do.
struct bfloat {
  uint16_t b;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t u = bits_of(x);
    b = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return float_of(uint32_t(b) << 16); }
};

struct half {
  uint16_t b;
  half() = default;
  explicit half(float x) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) {
      b = 0x7e00;
    } else if (a >= 0x477ff000) {
      b = uint16_t(sign | 0x7c00);
    } else if (a < 0x38800000) {  // subnormal: adding 0.5 leaves the bits, rounded, at the bottom
      b = uint16_t(sign | (bits_of(float_of(a) + 0.5f) - bits_of(0.5f)));
    } else {
      b = uint16_t(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13));
    }
  }
  operator float() const {
    uint32_t sign = uint32_t(b & 0x8000) << 16, e = b >> 10 & 31, m = b & 1023;
    if (e == 31) return float_of(sign | 0x7f800000 | m << 13);
    if (e == 0) return float_of(sign | bits_of(float(m) * 5.9604644775390625e-08f));
    return float_of(sign | (e + 112) << 23 | m << 13);
  }
};

// See cuda.h. Lanes show each other their fragments; shuffles with mask 0 only wait for the warp.
template <typename T>
INLINE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(fibers[self].words, mine, sizeof mine);
  shuffle_xor(0.0f, 0);
  const int lane = self % 32, warp = self - lane;
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const int from = k % 8 / 2, late = k / 8;
      T a, b;
      a.b = uint16_t(fibers[warp + lane / 4 * 4 + from].words[late * 2 + row] >> k % 2 * 16);
      b.b = uint16_t(fibers[warp + column * 4 + from].words[4 + late] >> k % 2 * 16);
      c[i] += float(a) * float(b);
    }
  }
  shuffle_xor(0.0f, 0);
}

template <typename T>
INLINE unsigned two(float low, float high) {
  return unsigned(T(low).b) | unsigned(T(high).b) << 16;
}

INLINE unsigned spread_bytes(unsigned w, int later) {
  w >>= later ? 16 : 0;
  return (w & 0xffu) | (w & 0xff00u) << 8;
}

INLINE unsigned halves(unsigned a, unsigned b, int upper) {
  return upper ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
}

INLINE unsigned transpose(unsigned x) {
  fibers[self].words[0] = x;
  shuffle_xor(0.0f, 0);
  const int line = self % 32 / 4, from = self - self % 32 + self % 4 * 8 + line / 2;
  const unsigned y = halves(fibers[from].words[0], fibers[from + 4].words[0], line % 2);
  shuffle_xor(0.0f, 0);
  return y;
}

INLINE void fetch_once(const void* p, unsigned (&x)[4]) { memcpy(x, p, sizeof x); }
INLINE void fetch(const void* p, bool any, unsigned (&x)[4]) {
  memset(x, 0, sizeof x);
  if (any) memcpy(x, p, sizeof x);
}
INLINE unsigned fetch(const unsigned char* p) { return *p; }
INLINE unsigned fetch(const unsigned short* p) { return *p; }

// See cuda.h. What is copied is not there before it is waited for.
INLINE void copy_later(void* to, const void* from, bool any) {
  Fiber& f = fibers[self];
  if (f.copies == MOST_COPIES) return fail("copies that nobody waits for:", f.copies);
  f.later[f.copies++] = {to, from, any, f.groups};
}

INLINE void copies_end() { fibers[self].groups++; }

template <int N>
INLINE void copies_wait() {
  Fiber& f = fibers[self];
  int left = 0;
  for (int i = 0; i < f.copies; i++) {
    const Copy& c = f.later[i];
    if (c.group >= f.groups - N) {
      f.later[left++] = c;
    } else if (c.any) {
      memcpy(c.to, c.from, 16);
    } else {
      memset(c.to, 0, 16);
    }
  }
  f.copies = left;
}

INLINE unsigned lanes_where(bool x) {
  fibers[self].words[0] = x;
  shuffle_xor(0.0f, 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= fibers[self - self % 32 + i].words[0] << i;
  shuffle_xor(0.0f, 0);
  return bits;
}

INLINE int bits_in(unsigned x) { return __builtin_popcount(x); }

template <typename T>
INLINE unsigned fma_two(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int i = 0; i < 2; i++) {
    T x, y, z;
    x.b = uint16_t(a >> 16 * i);
    y.b = uint16_t(b >> 16 * i);
    z.b = uint16_t(c >> 16 * i);
    d |= unsigned(T(fmaf(float(x), float(y), float(z))).b) << 16 * i;
  }
  return d;
}

template <typename T>
struct Nibble;
template <>
struct Nibble<bfloat> {
  static constexpr unsigned BITS = 0x43004300, ONE = 0x3f803f80, MINUS = 0xc300c300;
};
template <>
struct Nibble<half> {
  static constexpr unsigned BITS = 0x64006400, ONE = 0x3c003c00, MINUS = 0xe400e400;
};

static uint32_t random_bits() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(seed >> 33);
}

static void enter() {
  body();
  fibers[self].state = DONE;
  _longjmp(scheduler, 1);
}

static __attribute__((noinline)) void resume(int i) {
  self = i;
  Fiber& f = fibers[i];
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stacks + size_t(i) * STACK;
  f.start.uc_stack.ss_size = STACK;
  f.start.uc_link = nullptr;
  makecontext(&f.start, enter, 0);
  setcontext(&f.start);
}

// Lets fibers [first, first + count) go on if all of them wait for `state`; true if they did.
static bool release(int first, int count, State state) {
  for (int i = first; i < first + count; i++)
    if (fibers[i].state != state) return false;
  for (int i = first; i < first + count; i++)
    if (fibers[i].site != fibers[first].site) fail("threads wait at different places, one of them", fibers[i].site);
  if (state == AT_SHUFFLE) {
    float values[32];
    for (int i = 0; i < 32; i++) values[i] = fibers[first + (i ^ fibers[first].site)].value;
    for (int i = 0; i < 32; i++) fibers[first + i].value = values[i];
  }
  for (int i = first; i < first + count; i++) fibers[i].state = READY;
  return true;
}

// Threads of one warp go on, as far as they come or at most `passes` times; how many of them ended.
static int run_warp(int first, int schedule, int passes) {
  int done = 0;
  for (bool moved = true; moved && passes > 0; passes--) {
    const int turn = schedule > 1 ? int(random_bits() % 32) : 0;
    moved = false;
    for (int i = 0; i < 32 && !failure[0]; i++) {
      const int t = first + (schedule == 1 ? 31 - i : i ^ turn);
      if (fibers[t].state != READY) continue;
      moved = true;
      resume(t);
      if (fibers[t].state == DONE) done++;
      if (fibers[t].state == AT_SHUFFLE) release(first, 32, AT_SHUFFLE);
    }
  }
  return done;
}

// One block. In schedule 0 each warp goes as far as it comes, in order; in 1 in reverse; else by random steps.
static void run_block(int schedule) {
  const int warps = threads / 32;
  int done = 0;
  memset(memory, 0xff, sizeof memory);
  for (int i = 0; i < threads; i++) {
    fibers[i].state = READY;
    fibers[i].started = false;
    fibers[i].shared = 0;
    fibers[i].copies = fibers[i].groups = 0;
  }
  while (done < threads && !failure[0]) {
    bool ready = false;
    for (int i = 0; i < threads; i++) ready = ready || fibers[i].state == READY;
    if (!ready && !release(0, threads, AT_BARRIER)) fail("some threads never come; those that wait are at", fibers[0].site);
    for (int i = 0; i < warps; i++) {
      const int w = schedule == 0 ? i : schedule == 1 ? warps - 1 - i : int(random_bits() % uint32_t(warps));
      done += run_warp(w * 32, schedule, schedule > 1 ? 1 << random_bits() % 12 : 1 << 30);
    }
  }
}

}  // namespace pippin

extern "C" const char* run(int x, int y, int threads, int schedule, uint64_t seed, void** arguments) {
  using namespace pippin;
  static char* allocated = (char*)malloc(size_t(MOST_THREADS) * STACK);
  stacks = allocated;
  failure[0] = 0;
  pippin::threads = threads;
  pippin::seed = seed;
  pippin::arguments = arguments;
  blocks_y = y;
  for (int i = 0; i < x * y && !failure[0]; i++) {
    block_x = i % x;
    block_y = i / x;
    run_block(schedule);
  }
  return failure[0] ? failure : nullptr;
}
