"""How streams reach their sockets: in how many writes, in which turn, no faster than they are read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from pippin.client import EngineClient, Live
from pippin.config import ServerConfig
from pippin.messages import Command, Output, Ready, Stats, StepOutput, Submit
from pippin.server import create_app
from pippin.server.connection import Connection
from pippin.server.guard import Guard
from pippin.server.http import PIECES, EventStream, JsonResponse
from pippin.server.launch import http_config
from pippin.server.tally import Tokens
from pippin.server.turns import Turns
from pippin.server.writes import MOST_WAITING, Gathered, Writes
from pippin.text.chat import ChatTemplate
from pippin.transport import OnEnd, OnEvent
from pippin.types import Finish, SamplingParams
from tests.fake_core import fake_info
from tests.server.conftest import byte_tokenizer


@dataclass
class Wire(asyncio.Transport):
    """A transport that keeps what is written to it."""

    writes: list[bytes] = field(default_factory=list)
    closed: bool = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 100))


async def passes(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- writes ---


@given(st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=3)), max_size=40))
def test_what_one_pass_writes_to_a_connection_leaves_in_one_piece(said: list[tuple[int, bytes]]) -> None:
    async def main() -> None:
        writes, wires = Writes(asyncio.get_running_loop()), [Wire() for _ in range(5)]
        transports = [Gathered(wire, writes) for wire in wires]
        for _ in range(2):
            for i, data in said:
                transports[i].write(data)
            assert not any(wire.writes for wire in wires)
            await passes(1)
            for i, wire in enumerate(wires):
                whole = b"".join(data for j, data in said if j == i)
                assert wire.writes == ([whole] if whole else [])
                wire.writes = []

    run(main())


def test_a_crowd_is_not_waited_for() -> None:
    async def main() -> None:
        writes, wires = Writes(asyncio.get_running_loop()), [Wire() for _ in range(MOST_WAITING + 1)]
        for wire in wires:
            Gathered(wire, writes).write(b"x")
        assert [len(wire.writes) for wire in wires] == [1] * MOST_WAITING + [0]
        await passes(1)
        assert [wire.writes for wire in wires] == [[b"x"]] * len(wires)

    run(main())


def test_closing_sends_what_was_written_and_aborting_drops_it() -> None:
    async def main() -> None:
        writes, closed, aborted, broken = Writes(asyncio.get_running_loop()), Wire(), Wire(), Wire()
        for wire in (closed, aborted, broken):
            transport = Gathered(wire, writes)
            transport.write(b"last words")
            if wire is closed:
                transport.close()
                transport.write(b"too late")
            elif wire is aborted:
                transport.abort()
        broken.closed = True  # by its peer
        await passes()
        assert closed.writes == [b"last words"]
        assert aborted.writes == broken.writes == []

    run(main())


# --- responses on a connection ---

Answer = Callable[[], Any]


def connected(answer: Answer, without: bool = False) -> tuple[Wire, Connection]:
    """A connection whose requests get that answer; ``without`` our extension, by which pieces go straight there."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if without:
            del scope["extensions"][PIECES]
        while (await receive()).get("more_body"):
            pass
        await answer()(scope, receive, send)

    ((wire, connection),) = connect(app)
    return wire, connection


def connect(app: ASGIApp, count: int = 1) -> list[tuple[Wire, Connection]]:
    """So many connections of one server."""
    config = http_config(app, ServerConfig())
    config.load()
    made = []
    for _ in range(count):
        connection = cast(Any, config.http_protocol_class)(config=config, server_state=ServerState(), app_state={})
        connection.connection_made(wire := Wire())
        made.append((wire, connection))
    return made


def request(version: str = "1.1") -> bytes:
    return f"POST / HTTP/{version}\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode()


def test_a_whole_answer_is_one_write() -> None:
    async def main() -> None:
        wire, connection = connected(lambda: JsonResponse({"a": 1}))
        connection.data_received(request())
        await passes()
        (answer,) = wire.writes
        assert answer.endswith(b'\r\n\r\n{"a":1}')
        connection.connection_lost(None)

    run(main())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@given(pieces=st.lists(st.binary(max_size=20), max_size=6))
def test_straight_or_through_all_middleware_the_bytes_are_the_same(version: str, pieces: list[bytes]) -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        for piece in pieces:
            yield piece
            await passes(3)

    async def said(without: bool) -> tuple[bytes, int]:
        wire, connection = connected(lambda: EventStream(events()), without)
        connection.data_received(request(version))
        await passes(40)
        assert wire.closed == (version == "1.0")
        connection.connection_lost(None)
        return b"".join(wire.writes), len(wire.writes)

    async def main() -> None:
        straight, writes = await said(False)
        assert straight == (await said(True))[0]
        assert writes <= 2 + sum(map(bool, pieces))  # each piece is one, and so are head and end

    run(main())


@pytest.mark.parametrize("without", [False, True])
def test_who_reads_nothing_gets_nothing_more(without: bool) -> None:
    made = 0

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal made
        while made < 10:
            made += 1
            yield b"%d" % made
            await passes(1)

    async def main() -> None:
        wire, connection = connected(lambda: EventStream(events()), without)
        connection.data_received(request())
        while made < 3:
            await passes(1)
        connection.pause_writing()
        await passes(30)
        before = len(wire.writes)
        assert made <= 4  # the one that waits
        await passes(30)
        assert len(wire.writes) == before
        connection.resume_writing()
        await passes(60)
        assert made == 10
        assert wire.writes[-1].endswith(b"0\r\n\r\n")
        connection.connection_lost(None)

    run(main())


def test_events_are_closed_when_the_client_goes_away() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def main() -> None:
        wire, connection = connected(lambda: EventStream(events()))
        connection.data_received(request())
        await passes()
        assert wire.writes
        assert not closed
        connection.connection_lost(ConnectionResetError())
        await passes()
        assert closed == [True]

    run(main())


# --- steps of the engine ---


@dataclass
class Link:
    """A transport to no engine: what is asked is kept, and ``tell`` is what an engine would say."""

    sent: list[Command] = field(default_factory=list)
    tell: OnEvent = lambda event: None

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        self.tell = on_event

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def trouble(self) -> None:
        return None

    async def close(self, patience: float) -> None:
        pass

    @property
    def asked(self) -> list[Submit]:
        return [command for command in self.sent if isinstance(command, Submit)]

    def step(self, token: int, finish: Finish | None = None) -> None:
        """Every request has a token."""
        self.tell(StepOutput([Output(submit.id, [token], finish=finish) for submit in self.asked], Stats()))


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/completions": {"prompt": "hi", "max_tokens": 9},
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 9}},
}


def text_of(path: str, said: bytes) -> str:
    """What a stream says in all."""
    events = [json.loads(event) for event in re.findall(rb"data: (\{.*\})", said)]
    if path == "/generate":
        return str(events[-1]["text"])
    choices = [event["choices"][0] for event in events]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


@pytest.mark.parametrize("path", BODIES)
def test_a_step_is_one_write_to_each_stream_and_so_is_what_waited(path: str) -> None:
    async def main() -> None:
        link, tokenizer = Link(), byte_tokenizer()
        client = EngineClient(link)
        starting = asyncio.create_task(client.start())
        await passes(1)
        link.tell(Ready(fake_info()))
        await starting
        app = create_app(client, tokenizer, ChatTemplate(tokenizer), ServerConfig())
        body = json.dumps(BODIES[path] | {"stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        asked = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        streams = connect(app, 8)
        for _, connection in streams:
            connection.data_received(asked)
        await passes(60)
        assert len(link.asked) == len(streams)
        for letters in ("a", "b", "cde", "f"):  # of one step each, or of three that came while nobody looked
            before = [len(wire.writes) for wire, _ in streams]
            for letter in letters:
                link.step(ord(letter))
            await passes(10 if letters == "a" else 2)  # one to read and write, one to send
            assert [len(wire.writes) for wire, _ in streams] == [count + 1 for count in before]
        link.step(ord("g"), Finish("length"))
        await passes()
        for wire, connection in streams:
            assert text_of(path, b"".join(wire.writes)) == "abcdefg"
            connection.connection_lost(None)

    run(main())


# --- turns ---


@given(st.integers(1, 12), st.sets(st.integers(0, 11)))
def test_one_turn_in_a_pass_in_the_order_of_asking(count: int, left: set[int]) -> None:
    async def main() -> None:
        turns, taken = Turns(), list[tuple[int, int]]()
        number = 0

        async def clock() -> None:
            nonlocal number
            while True:
                number += 1
                await asyncio.sleep(0)

        async def one(i: int) -> None:
            await turns.take()
            taken.append((number, i))

        ticking = asyncio.create_task(clock())
        tasks = [asyncio.create_task(one(i)) for i in range(count)]
        await passes(1)
        gone = [i for i in range(1, count) if i in left]  # the first has had its turn
        for i in gone:
            tasks[i].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [i for _, i in taken] == [i for i in range(count) if i not in gone]
        assert len({number for number, _ in taken}) == len(taken)
        await passes(2)
        before = number
        await one(count)  # alone, it waits for nobody
        assert number == before
        ticking.cancel()

    run(main())


def test_a_turn_that_is_still_held_is_not_asked_for_again() -> None:
    async def main() -> None:
        turns = Turns()
        held = await turns.take()
        others = [asyncio.create_task(turns.take()) for _ in range(3)]
        await passes(1)
        assert await turns.take(held) != held  # it was passed on: behind the others
        assert all(task.done() for task in others)
        later = [task.result() for task in others]
        assert len({held, *later}) == 4

        async def twice() -> tuple[int, int]:
            turn = await turns.take()
            return turn, await turns.take(turn)

        pairs = await asyncio.gather(*(twice() for _ in range(4)))
        assert all(first == second for first, second in pairs)

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_requests_of_one_moment_begin_in_turns(whole: bool) -> None:
    """One begins in each pass, from its head on; one whose body came later gets a turn with that."""

    async def main() -> None:
        passed, begun, read = 0, list[int](), list[int]()

        async def clock() -> None:
            nonlocal passed
            while True:
                passed += 1
                await asyncio.sleep(0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.append(passed)
            await receive()
            read.append(passed)

        guard = Guard(app, ServerConfig())
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        come = asyncio.Event()

        async def body() -> Message:
            if not whole:
                await come.wait()
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def sent(message: Message) -> None: ...

        ticking = asyncio.create_task(clock())
        tasks = [asyncio.create_task(guard(dict(scope), body, sent)) for _ in range(5)]
        await passes(20)
        assert len(set(begun)) == len(begun) == 5
        assert read == (begun if whole else [])
        come.set()
        await asyncio.gather(*tasks)
        assert len(set(read)) == len(read) == 5
        ticking.cancel()

    run(main())


# --- a reader of outputs ---


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_a_reader_that_is_behind_gets_all_at_once(bursts: list[int]) -> None:
    async def main() -> None:
        live = Live(Submit("x", [1], 1, SamplingParams()))
        read: list[list[int]] = []

        async def reader() -> None:
            while True:
                read.append((await live.read()).tokens)

        task = asyncio.create_task(reader())
        await passes(1)
        token = 0
        expected: list[list[int]] = []
        for burst in bursts:
            for _ in range(burst):
                live.put(Output("x", [token]))
                token += 1
            expected.append([*range(token - burst, token)])
            await passes(2)
        assert read == expected  # woken once for each burst
        task.cancel()

    run(main())


# --- counts ---


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0, 10), st.integers(1, 3)), max_size=30))
def test_tallies_are_told_as_prometheus_histograms_are(values: list[tuple[str, float, int]]) -> None:
    bounds = (0.002, 0.1, 1, 2.5)
    tokens = Tokens("p:", bounds)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    ours.register(tokens)
    histogram = Histogram(
        "p:inter_token_latency_seconds", "From token to token.", ("model_name",), registry=theirs, buckets=bounds
    )
    for model, value, times in values:
        between, generated = tokens.of(model)
        between.add(value, times)
        generated[0] += times
        for _ in range(times):
            histogram.labels(model).observe(value)
    said, expected = told(ours), told(theirs)
    for model in {model for model, _, _ in values}:
        name = f'p:generation_tokens_total{{model_name="{model}"}}'
        assert said.pop(name) == sum(times for m, _, times in values if m == model)
    assert said == pytest.approx(expected)


def told(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#") and "_created" not in line)
    return {name: float(value) for name, _, value in pairs}
