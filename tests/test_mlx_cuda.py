"""MLX's CUDA graphs, taken on their way to the driver: what is recorded, what is put back, and which MLX is not known.

The library and driver below are ours (``fake_mlx_cuda``); the places of functions are tried on MLX's own library too.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import mlx_cuda
from pippin.linkage import jump_slot
from pippin.mlx_cuda import CudaError, Graph, MlxCuda, UnknownMlxError
from tests.fake_mlx_cuda import Build, FakeMlx, play_libraries, play_mlx

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads libraries of Linux on x86-64"
)

MLX = Path(mx.__file__).parent / "lib" / "libmlx.so"
ALLOCATOR = "_ZN3mlx4core9allocator9allocatorEv"
COMMIT = "_ZN3mlx4core2cu14CommandEncoder11commit_implEv"
LIMITS = (20, 100)

Fakes = tuple[MlxCuda, FakeMlx]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("mlx"))


@pytest.fixture
def fake(build: Build, monkeypatch: pytest.MonkeyPatch) -> FakeMlx:
    fake = FakeMlx(build.fresh())
    play_mlx(monkeypatch, fake)
    return fake


@pytest.fixture
def fakes(fake: FakeMlx) -> Iterator[Fakes]:
    """A reader of a library that nothing was queued in; in the end that is as it was, and did nothing wrong."""
    yield MlxCuda(), fake
    assert fake.told("faults") == 0
    assert fake.limits() == LIMITS
    assert_unrecorded(fake)


def assert_unrecorded(fake: FakeMlx) -> None:
    """MLX hands its graphs over by itself."""
    before, orders, ran = fake.live_programs, fake.told("orders"), len(fake.ran)
    fake.evaluate(901, 902, order=[(0, 1)])
    assert fake.ran[ran:] == [901, 902]
    assert fake.live_programs == before
    assert fake.told("orders") == orders


@contextmanager
def newly_ran(fake: FakeMlx) -> Iterator[list[int]]:
    """Fills a list with what runs inside."""
    before, found = len(fake.ran), list[int]()
    yield found
    found += fake.ran[before:]


# --- recording ---


def test_a_commit_with_nodes_is_a_program_and_runs_in_the_same_order_again(fakes: Fakes) -> None:
    cuda, fake = fakes

    def run() -> None:
        fake.commit()
        fake.evaluate(1, 2, 3, order=[(0, 1), (1, 2)])
        fake.commit()
        fake.evaluate(-1, -2, order=[(0, 1)], encoder=1)
        fake.evaluate(4, 5)

    with newly_ran(fake) as recorded:
        graph = cuda.record(run)
    assert recorded == [1, 2, 3, -1, -2, 5, 4]
    assert fake.live_programs == 2
    for _ in range(3):
        with newly_ran(fake) as again:
            graph.launch()
        assert again == [1, 2, 3, 5, 4]
    graph.close()
    assert fake.live_programs == 0


Handed = tuple[int, int, list[tuple[int, int]]]
"""An encoder, a number of nodes, and which of them waits for which."""


@st.composite
def handed_over(draw: st.DrawFn) -> Handed:
    nodes = draw(st.integers(0, 6))
    pairs = [(first, second) for second in range(nodes) for first in range(second)]
    order = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return draw(st.sampled_from([0, 0, 0, 1])), nodes, order


def recorded(cuda: MlxCuda, fake: FakeMlx, work: Sequence[Handed]) -> tuple[Graph, list[int]]:
    """The graph of it, and what the first encoder ran."""
    own = list[int]()

    def run() -> None:
        for place, (encoder, nodes, order) in enumerate(work):
            with newly_ran(fake) as found:
                fake.evaluate(*range(10 * place, 10 * place + nodes), order=order, encoder=encoder)
            assert len(found) == nodes
            own.extend(found if encoder == 0 else [])

    before = fake.live_programs
    graph = cuda.record(run)
    assert fake.live_programs - before == sum(encoder == 0 and nodes > 0 for encoder, nodes, _ in work)
    return graph, own


@given(works=st.lists(st.lists(handed_over(), max_size=5), max_size=3), data=st.data())
def test_whatever_is_queued_runs_again(build: Build, works: list[list[Handed]], data: st.DataObject) -> None:
    """Several records of one reader, launched in any order; what another encoder hands over is in none."""
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeMlx(build.fresh())
        play_mlx(patch, fake)
        cuda = MlxCuda()
        made = [recorded(cuda, fake, work) for work in works]
        for graph, want in data.draw(st.lists(st.sampled_from(made))) if made else []:
            with newly_ran(fake) as found:
                graph.launch()
            assert found == want
        for graph, _ in made:
            graph.close()
        assert fake.live_programs == fake.told("faults") == 0


def test_what_was_queued_before_is_not_recorded(fakes: Fakes) -> None:
    cuda, fake = fakes
    fake.queue(1, 2)
    graph = cuda.record(lambda: fake.evaluate(3))
    with newly_ran(fake) as found:
        graph.launch()
    assert found == [3]
    graph.close()


@pytest.mark.parametrize(("labels", "each"), [(range(1000), 0), (range(4), 60 << 20)])
def test_what_is_evaluated_at_once_is_one_program(fakes: Fakes, labels: range, each: int) -> None:
    """Otherwise MLX hands a graph over whenever it has so many nodes, or reads so much."""
    cuda, fake = fakes

    def run() -> None:
        fake.queue(*labels, bytes_each=each)
        before = len(fake.ran)
        fake.commit()
        ran_at_once.append(len(fake.ran) - before)

    ran_at_once: list[int] = []
    run()
    graph = cuda.record(run)
    assert ran_at_once[0] < len(labels) == ran_at_once[1]
    assert fake.live_programs == 1
    assert fake.limits() == LIMITS
    graph.close()


def test_the_order_is_added_once_and_mlx_finds_none_left(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver faults at a second time; the first is seen as MLX's own function is called."""
    cuda, fake = fakes
    left, real = [], cuda._commit

    def noted(encoder: int) -> None:
        left.append(fake.pending_orders())
        real(encoder)

    monkeypatch.setattr(cuda, "_commit", noted)
    graph = cuda.record(lambda: fake.evaluate(1, 2, 3, order=[(0, 1), (0, 2)]))
    assert left == [0]
    assert fake.told("orders") == 1
    graph.close()


def test_what_fails_while_it_is_recorded_leaves_mlx_as_it_was(fakes: Fakes) -> None:
    cuda, fake = fakes

    def run() -> None:
        assert min(fake.limits()) > 1 << 20
        fake.evaluate(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cuda.record(run)
    assert fake.live_programs == 0
    assert fake.limits() == LIMITS
    assert_unrecorded(fake)
    cuda.record(lambda: fake.queue(3)).close()


def test_programs_are_closed_once(fakes: Fakes) -> None:
    cuda, fake = fakes
    graph, _ = recorded(cuda, fake, [(0, 1, []), (0, 2, []), (0, 3, [])])
    assert fake.live_programs == 3
    for _ in range(2):
        graph.close()
        assert fake.live_programs == 0
        assert fake.told("destroyed") == 3


# --- a driver that refuses ---


@pytest.mark.parametrize("refusal", ["refuse_program", "refuse_order"])
@pytest.mark.parametrize("at", [0, 1])
def test_what_the_driver_makes_no_program_of_still_runs(fakes: Fakes, refusal: str, at: int) -> None:
    cuda, fake = fakes

    def run() -> None:
        for place in range(3):
            fake.tell(refusal, 2 if place == at else 0)
            fake.evaluate(10 * place, 10 * place + 1, order=[(0, 1)])

    with newly_ran(fake) as found, pytest.raises(CudaError, match=r"refused .* \(CUDA error 2\)"):
        cuda.record(run)
    assert found == [0, 1, 10, 11, 20, 21]
    assert fake.live_programs == 0
    assert fake.told("destroyed") == at
    cuda.record(lambda: fake.evaluate(1)).close()


def test_a_launch_that_is_refused_is_told(fakes: Fakes) -> None:
    cuda, fake = fakes
    graph = cuda.record(lambda: fake.evaluate(1))
    fake.tell("refuse_launch", 719)
    with newly_ran(fake) as found, pytest.raises(CudaError, match="CUDA error 719"):
        graph.launch()
    assert not found
    graph.close()
    assert fake.live_programs == 0


# --- memory ---


@given(sizes=st.lists(st.integers(1, 3), max_size=8), again=st.lists(st.integers(1, 3), max_size=4))
def test_freed_memory_is_listed_by_buffer(build: Build, sizes: list[int], again: list[int]) -> None:
    """Whatever was freed and taken again, before MLX is read and after."""
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeMlx(build.fresh())
        play_mlx(patch, fake)
        fake.free(*[fake.allocate(size << 14) for size in sizes])
        cuda, left = MlxCuda(), sorted(sizes)
        for size in again:
            fake.allocate(size << 14)
            if size in left:
                left.remove(size)
            assert sorted(cuda.freed()) == [size << 14 for size in left]


# --- an MLX that is not known ---


def more_freed(fake: FakeMlx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_cache_memory", lambda: fake.freed_bytes() + 1)


def more_active(fake: FakeMlx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_active_memory", lambda: fake.active_bytes() + 4)


def nodes_left(fake: FakeMlx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "synchronize", lambda: None)
    fake.queue(1, 2, 3)


def order_left(fake: FakeMlx, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_left(fake, monkeypatch)
    fake.queue(order=[(0, 1)])


def misstated(fake: FakeMlx, _: pytest.MonkeyPatch) -> None:
    one, other = fake.allocate(100), fake.allocate(200)
    fake.free(one, other)
    fake.misstate(one, 101)


Disturbance = Callable[[FakeMlx, pytest.MonkeyPatch], None]
DISTURBED: dict[str, tuple[Disturbance, str]] = {
    "another version": (lambda _, p: p.setattr(mlx_cuda, "version", lambda _: "9.9"), r"MLX 9\.9 on x86_64"),
    "another machine": (lambda _, p: p.setattr("platform.machine", lambda: "aarch64"), r"on aarch64 is not known"),
    "no names": (lambda _, p: play_libraries(p, lambda _: "libm.so.6"), "undefined symbol"),
    "no driver": (
        lambda fake, p: play_libraries(p, lambda name: "libno.so.1" if "cuda" in name else fake.path),
        r"libno\.so\.1",
    ),
    "a poor driver": (
        lambda fake, p: play_libraries(p, lambda name: "libm.so.6" if "cuda" in name else fake.path),
        "cuGraph",
    ),
    "nodes": (nodes_left, "^nodes 3 for 0$"),
    "order": (order_left, "nodes in order"),
    "no nodes": (lambda fake, _: fake.limit(0, 100), "limits of 0 nodes and 100 MB"),
    "less than no nodes": (lambda fake, _: fake.limit(-1, 100), "limits of -1 nodes"),
    "any nodes": (lambda fake, _: fake.limit(1 << 30, 100), "limits of"),
    "no megabytes": (lambda fake, _: fake.limit(20, 0), "limits of 20 nodes and 0 MB"),
    "any megabytes": (lambda fake, _: fake.limit(20, 1 << 30), "limits of"),
    "other nodes": (lambda _, p: p.setenv("MLX_MAX_OPS_PER_BUFFER", "21"), "^most nodes 20 for 21$"),
    "other megabytes": (lambda _, p: p.setenv("MLX_MAX_MB_PER_BUFFER", "99"), "^most megabytes 100 for 99$"),
    "no number": (lambda _, p: p.setenv("MLX_MAX_OPS_PER_BUFFER", "twenty"), "^most nodes 20 for twenty$"),
    "more freed": (more_freed, "^freed bytes 700 for 701$"),
    "more active": (more_active, "^active bytes 5000 for 5004$"),
    "freed sizes": (misstated, "freed buffers don't add up"),
    "no stream": (lambda fake, _: fake.close_stream(), "CUDA error 400"),
    "a broken stream": (lambda fake, _: fake.tell("stream_state", 719), "CUDA error 719"),
}


@pytest.mark.parametrize(("disturb", "says"), DISTURBED.values(), ids=DISTURBED)
def test_an_mlx_that_is_not_known_is_told(
    fake: FakeMlx, monkeypatch: pytest.MonkeyPatch, disturb: Disturbance, says: str
) -> None:
    fake.allocate(5000)
    fake.free(fake.allocate(700))
    MlxCuda()
    disturb(fake, monkeypatch)
    with pytest.raises(UnknownMlxError, match=says):
        MlxCuda()


@pytest.mark.parametrize("option", ["-Wl,-Bsymbolic", "-Wl,-z,now,-z,relro"])
def test_an_mlx_whose_calls_cannot_be_taken_is_told(build: Build, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """One that calls its own functions directly, and one whose places were locked when it was loaded."""
    fake = FakeMlx(build.linked(option))
    play_mlx(monkeypatch, fake)
    with pytest.raises(UnknownMlxError, match="in another way"):
        MlxCuda()


def test_a_busy_stream_and_limits_that_are_asked_for_are_known(fake: FakeMlx, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.tell("stream_state", 600)
    fake.limit(50, 60)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "50")
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "60")
    MlxCuda().record(lambda: fake.evaluate(1)).close()
    assert fake.limits() == (50, 60)


# --- places of functions ---


def test_mlx_calls_what_stands_in_the_place_of_its_function() -> None:
    library = ctypes.CDLL(str(MLX))
    slot, real = jump_slot(library, ALLOCATOR), library[ALLOCATOR]
    assert slot is not None
    real.argtypes, real.restype = [], ctypes.c_uint64
    calls = list[int]()

    def allocator() -> int:
        calls.append(real())
        return calls[-1]

    def allocate() -> int:
        before = len(calls)
        assert mx.array([1.0, 2.0, 3.0]).tolist() == [1.0, 2.0, 3.0]
        return len(calls) - before

    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(allocator)
    assert allocate() == 0
    with slot.replaced(function):
        assert allocate() > 0
    assert allocate() == 0
    with pytest.raises(ZeroDivisionError), slot.replaced(function):
        raise ZeroDivisionError
    assert allocate() == 0
    assert {*calls} == {real()}


def test_a_function_that_a_library_does_not_call_has_no_place(build: Build) -> None:
    for name in ("strtok", "_ZN3mlx4core", ALLOCATOR + "x"):
        assert jump_slot(ctypes.CDLL(str(MLX)), name) is None
    assert jump_slot(ctypes.CDLL("libc.so.6"), COMMIT) is None
    assert jump_slot(ctypes.CDLL(str(build.fresh())), COMMIT) is not None


@pytest.mark.parametrize("option", ["-Wl,-Bsymbolic", "-Wl,-z,now,-z,relro"])
def test_a_place_that_cannot_be_written_to_is_none(build: Build, option: str) -> None:
    assert jump_slot(ctypes.CDLL(str(build.linked(option))), COMMIT) is None


def test_places_of_copies_of_a_library_are_their_own(build: Build) -> None:
    """One's function is replaced, the other calls its own."""
    one, other = FakeMlx(build.fresh()), FakeMlx(build.fresh())
    slot, calls = jump_slot(ctypes.CDLL(str(one.path)), COMMIT), list[int]()
    assert slot is not None
    with slot.replaced(ctypes.CFUNCTYPE(None, ctypes.c_uint64)(calls.append)):
        for fake in (one, other):
            fake.evaluate(1)
        assert one.ran == []
        assert other.ran == [1]
    one.commit()
    assert one.ran == [1]
    assert len(calls) == 1
