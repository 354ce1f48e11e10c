"""What stands for MLX's CUDA backend and the driver below it where there is no GPU: a library that g++ builds.

Its encoder and allocator have the members of MLX 0.32.4's where these have them. Its driver notes what it runs, and
counts as a fault whatever a real one would refuse or crash on. A program runs the latest of the nodes that may run
first, so that an order which is missing shows.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from pippin import mlx_cuda
from pippin.kernels.host import compiler

_DRIVER = """
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace driver {

enum { fine = 0, invalid_value = 1, invalid_handle = 400 };

struct Node {
  int label;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  std::set<std::pair<Node*, Node*>> order;

  bool has(Node* node) const {
    for (auto& own : nodes) {
      if (own.get() == node) return true;
    }
    return false;
  }

  bool may_run(Node* node, const std::set<Node*>& done) const {
    if (done.count(node)) return false;
    for (auto& [before, after] : order) {
      if (after == node && !done.count(before)) return false;
    }
    return true;
  }
};

struct Program {
  std::vector<int> labels;
};

std::set<Graph*> graphs;
std::set<Program*> programs;
std::set<void*> streams;
std::vector<int> ran;

Graph* new_graph() {
  return *graphs.insert(new Graph).first;
}

int add_order(Graph* graph, Node** before, Node** after, size_t count) {
  if (!graphs.count(graph)) return invalid_handle;
  for (size_t i = 0; i < count; i++) {
    if (!graph->has(before[i]) || !graph->has(after[i])) return invalid_value;
    if (!graph->order.insert({before[i], after[i]}).second) return invalid_value;
  }
  return fine;
}

int instantiate(Program** made, Graph* graph) {
  if (!graphs.count(graph)) return invalid_handle;
  auto program = std::make_unique<Program>();
  std::set<Node*> done;
  while (done.size() < graph->nodes.size()) {
    Node* next = nullptr;
    for (auto& node : graph->nodes) {
      if (graph->may_run(node.get(), done)) next = node.get();
    }
    if (!next) return invalid_value;
    done.insert(next);
    program->labels.push_back(next->label);
  }
  *made = program.release();
  programs.insert(*made);
  return fine;
}

int launch(Program* program, void* stream) {
  if (!programs.count(program) || !streams.count(stream)) return invalid_handle;
  ran.insert(ran.end(), program->labels.begin(), program->labels.end());
  return fine;
}

int destroy(Program* program) {
  if (!programs.erase(program)) return invalid_handle;
  delete program;
  return fine;
}

}  // namespace driver

extern "C" {

// What the test asks the driver for, and what it did.
int refuse_order, refuse_program, refuse_launch, stream_state, faults, orders, destroyed;

static int noted(int error) {
  faults += error != 0;
  return error;
}

int cuGraphAddDependencies(driver::Graph* graph, driver::Node** before, driver::Node** after, size_t count) {
  orders++;
  return refuse_order ? refuse_order : noted(driver::add_order(graph, before, after, count));
}

int cuGraphInstantiateWithFlags(driver::Program** made, driver::Graph* graph, unsigned long long flags) {
  if (flags) return noted(driver::invalid_value);
  return refuse_program ? refuse_program : noted(driver::instantiate(made, graph));
}

int cuGraphLaunch(driver::Program* program, void* stream) {
  return refuse_launch ? refuse_launch : noted(driver::launch(program, stream));
}

int cuGraphExecDestroy(driver::Program* program) {
  destroyed++;
  return noted(driver::destroy(program));
}

int cuStreamQuery(void* stream) {
  return driver::streams.count(stream) ? stream_state : driver::invalid_handle;
}
}
"""

_MLX = """
namespace mlx::core {

struct Device {
  enum class DeviceType { cpu, gpu };
  DeviceType type;
  int index;
};

struct Stream {
  int index;
  Device device;
};

Stream default_stream(Device device) {
  return {device.type == Device::DeviceType::gpu ? 7 : 3, device};
}

namespace cu {

struct Named {
  driver::Node* node;
  std::string kind, id;
};

struct Recent {
  const char* variable;
  size_t misses;
  std::list<std::pair<std::string, driver::Program*>> programs;
  std::unordered_map<std::string, std::list<std::pair<std::string, driver::Program*>>::iterator> places;
  size_t capacity;
};

struct CommandEncoder {
  CommandEncoder(void*& device) : device(device), stream(new int), graph(driver::new_graph()) {
    driver::streams.insert(stream);
  }
  void add(int label, size_t bytes);
  void order(size_t before, size_t after);
  void commit();
  void commit_impl();

  void*& device;
  void* stream;
  driver::Graph* graph;
  std::shared_ptr<void> worker;
  int nodes = 0;
  bool concurrent = false;
  std::vector<driver::Node*> before, after;
  std::string nodes_key, order_key;
  std::vector<Named> together;
  std::vector<std::shared_ptr<void>> temporaries;
  Recent recent{};
  std::vector<std::uintptr_t> read, written;
  std::unordered_map<std::uintptr_t, Named> by_memory;
  size_t bytes = 0;
  bool updatable = true;
  int most_nodes = 20, most_megabytes = 100;
};

// As read from the headers of MLX 0.32.4's CUDA wheel, for x86-64 and libstdc++.
static_assert(offsetof(CommandEncoder, stream) == 0x08);
static_assert(offsetof(CommandEncoder, graph) == 0x10);
static_assert(offsetof(CommandEncoder, nodes) == 0x28);
static_assert(offsetof(CommandEncoder, before) == 0x30);
static_assert(offsetof(CommandEncoder, after) == 0x48);
static_assert(offsetof(CommandEncoder, most_nodes) == 0x1AC);
static_assert(offsetof(CommandEncoder, most_megabytes) == 0x1B0);

void CommandEncoder::add(int label, size_t more) {
  graph->nodes.push_back(std::make_unique<driver::Node>(driver::Node{label}));
  nodes++;
  bytes += more;
  if (nodes > most_nodes || bytes >> 20 > static_cast<size_t>(most_megabytes)) commit();
}

void CommandEncoder::order(size_t first, size_t second) {
  before.push_back(graph->nodes.at(first).get());
  after.push_back(graph->nodes.at(second).get());
}

void CommandEncoder::commit() {
  commit_impl();
}

void CommandEncoder::commit_impl() {
  if (nodes) {
    driver::Program* program = nullptr;
    if (!before.empty()) noted(driver::add_order(graph, before.data(), after.data(), before.size()));
    noted(driver::instantiate(&program, graph));
    noted(driver::launch(program, stream));
    noted(driver::destroy(program));
    before.clear();
    after.clear();
    driver::graphs.erase(graph);
    delete graph;
    graph = driver::new_graph();
  }
  nodes = 0;
  bytes = 0;
}

void* device;
CommandEncoder encoders[] = {{device}, {device}};

CommandEncoder& get_command_encoder(Stream stream) {
  bool first = stream.index == 7 && stream.device.type == Device::DeviceType::gpu && stream.device.index == 0;
  return encoders[first ? 0 : 1];
}

}  // namespace cu

namespace allocator {

struct Memory {
  void* data;
  size_t bytes;
  int device;
};

struct Holder {
  Holder *newer, *older;
  Memory* buffer;
};

struct Freed {
  std::multimap<size_t, Holder*> by_size;
  Holder *newest, *oldest;
  size_t bytes, page;
  std::function<size_t(Memory*)> size_of;
  std::function<void(Memory*)> give_back;
};

struct Allocator {
  virtual ~Allocator() = default;
  std::mutex mutex;
  size_t most, most_freed, of_device, most_pooled;
  Freed freed{};
  size_t active, peak;
};

static_assert(offsetof(Allocator, freed.newest) == 0x80);
static_assert(offsetof(Allocator, freed.bytes) == 0x90);
static_assert(offsetof(Allocator, active) == 0xE0);

Allocator& allocator() {
  static auto* only = new Allocator{};
  return *only;
}

}  // namespace allocator
}  // namespace mlx::core

extern "C" {

using namespace mlx::core;

void queue_node(int encoder, int label, size_t bytes) { cu::encoders[encoder].add(label, bytes); }
void queue_order(int encoder, size_t first, size_t second) { cu::encoders[encoder].order(first, second); }
void commit(int encoder) { cu::encoders[encoder].commit(); }
int pending_orders(int encoder) { return cu::encoders[encoder].before.size() + cu::encoders[encoder].after.size(); }
int live_programs() { return driver::programs.size(); }
int ran_count() { return driver::ran.size(); }
int ran_at(int place) { return driver::ran.at(place); }
int most_nodes(int encoder) { return cu::encoders[encoder].most_nodes; }
int most_megabytes(int encoder) { return cu::encoders[encoder].most_megabytes; }
void close_stream(int encoder) { driver::streams.erase(cu::encoders[encoder].stream); }

void limit(int encoder, int nodes, int megabytes) {
  cu::encoders[encoder].most_nodes = nodes;
  cu::encoders[encoder].most_megabytes = megabytes;
}

size_t active_bytes() { return allocator::allocator().active; }
size_t freed_bytes() { return allocator::allocator().freed.bytes; }

allocator::Memory* allocate(size_t bytes) {
  auto& all = allocator::allocator();
  all.active += bytes;
  auto found = all.freed.by_size.find(bytes);
  if (found == all.freed.by_size.end()) return new allocator::Memory{nullptr, bytes, 0};
  auto* holder = found->second;
  (holder->newer ? holder->newer->older : all.freed.newest) = holder->older;
  (holder->older ? holder->older->newer : all.freed.oldest) = holder->newer;
  all.freed.by_size.erase(found);
  all.freed.bytes -= bytes;
  auto* buffer = holder->buffer;
  delete holder;
  return buffer;
}

void free_buffer(allocator::Memory* buffer) {
  auto& all = allocator::allocator();
  auto* holder = new allocator::Holder{nullptr, all.freed.newest, buffer};
  (holder->older ? holder->older->newer : all.freed.oldest) = holder;
  all.freed.newest = holder;
  all.freed.by_size.emplace(buffer->bytes, holder);
  all.freed.bytes += buffer->bytes;
  all.active -= buffer->bytes;
}

// A cached buffer whose bytes are other than those that were counted.
void misstate(allocator::Memory* buffer, size_t bytes) { buffer->bytes = bytes; }
}
"""


class Build:
    """Compiles the library once; ``linked`` makes one of it, which has a state and places of functions of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._object = folder / "mlx.o"
        self._numbers = itertools.count()
        self._gxx("-std=c++17", "-O1", "-fPIC", "-Wno-invalid-offsetof", "-c", "-x", "c++", "-", "-o", self._object)
        self._usual = self.linked()

    def fresh(self) -> Path:
        """As MLX's own is: it calls its own exported functions by slots, which may be written to."""
        target = self._usual.with_suffix(f".{next(self._numbers)}")
        shutil.copy(self._usual, target)
        return target

    def linked(self, *options: str) -> Path:
        """One for which the linker has ``options``."""
        target = self._folder / f"libmlx-{next(self._numbers)}.so"
        self._gxx("-shared", "-Wl,-z,lazy", *options, self._object, "-o", target)
        return target

    def _gxx(self, *arguments: str | Path) -> None:
        path = compiler()
        assert path is not None, "tests of what is built on the host need g++"
        done = subprocess.run([path, *arguments], input=_DRIVER + _MLX, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]


class FakeMlx:
    """One such library. Encoder 0 is that of the default stream; nodes are known by numbers that the test gives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        library.queue_node.argtypes = [number, number, size]
        library.queue_order.argtypes = [number, size, size]
        library.allocate.argtypes, library.allocate.restype = [size], pointer
        library.free_buffer.argtypes, library.misstate.argtypes = [pointer], [pointer, size]
        library.active_bytes.restype = library.freed_bytes.restype = size

    def told(self, name: str) -> int:
        """One of the driver's numbers: its ``faults``, the ``orders`` it was given, the programs ``destroyed``."""
        return ctypes.c_int.in_dll(self._library, name).value

    def tell(self, name: str, error: int) -> None:
        """What to refuse, ``refuse_order`` and so on, by which of CUDA's errors; 0 is none."""
        ctypes.c_int.in_dll(self._library, name).value = error

    def queue(self, *labels: int, order: Sequence[tuple[int, int]] = (), encoder: int = 0, bytes_each: int = 0) -> None:
        """Nodes, and which of them waits for which, by their places among those that are queued."""
        for label in labels:
            self._library.queue_node(encoder, label, bytes_each)
        for before, after in order:
            self._library.queue_order(encoder, before, after)

    def commit(self, encoder: int = 0) -> None:
        self._library.commit(encoder)

    def evaluate(self, *labels: int, order: Sequence[tuple[int, int]] = (), encoder: int = 0) -> None:
        """Nodes that are handed over together, unless there are too many."""
        self.queue(*labels, order=order, encoder=encoder)
        self.commit(encoder)

    def pending_orders(self, encoder: int = 0) -> int:
        return int(self._library.pending_orders(encoder))

    def limits(self, encoder: int = 0) -> tuple[int, int]:
        """The most nodes and megabytes of a graph."""
        return self._library.most_nodes(encoder), self._library.most_megabytes(encoder)

    def limit(self, nodes: int, megabytes: int) -> None:
        self._library.limit(0, nodes, megabytes)

    @property
    def ran(self) -> list[int]:
        """The nodes that ran by now, in order, whoever launched them."""
        return [self._library.ran_at(place) for place in range(self._library.ran_count())]

    @property
    def live_programs(self) -> int:
        return int(self._library.live_programs())

    def close_stream(self) -> None:
        self._library.close_stream(0)

    def allocate(self, size: int) -> int:
        """A buffer of so many bytes; a freed one if there is one."""
        return int(self._library.allocate(size))

    def free(self, *buffers: int) -> None:
        for buffer in buffers:
            self._library.free_buffer(buffer)

    def misstate(self, buffer: int, size: int) -> None:
        self._library.misstate(buffer, size)

    def active_bytes(self) -> int:
        return int(self._library.active_bytes())

    def freed_bytes(self) -> int:
        return int(self._library.freed_bytes())


def play_mlx(monkeypatch: pytest.MonkeyPatch, fake: FakeMlx) -> None:
    """Makes ``MlxCuda`` find this library in place of MLX's and the driver's, of a version and machine it knows."""
    play_libraries(monkeypatch, lambda _: fake.path)
    monkeypatch.setattr(mlx_cuda, "version", lambda _: mlx_cuda.VERSIONS[0])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(mx, "synchronize", fake.commit)
    monkeypatch.setattr(mx, "get_cache_memory", fake.freed_bytes)
    monkeypatch.setattr(mx, "get_active_memory", fake.active_bytes)
    for limit in ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"):
        monkeypatch.delenv(limit, raising=False)


def play_libraries(monkeypatch: pytest.MonkeyPatch, path_of: Callable[[str], Path | str]) -> None:
    """Opens other libraries in place of libmlx.so and libcuda.so.1."""
    real = ctypes.CDLL

    def opened(name: str | None) -> ctypes.CDLL:
        known = name is not None and Path(name).name in ("libmlx.so", "libcuda.so.1")
        return real(str(path_of(Path(name).name)) if name is not None and known else name)

    monkeypatch.setattr(ctypes, "CDLL", opened)
