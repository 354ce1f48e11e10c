"""Text deltas over an engine that is played by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.completion import Delta, answer_ids, check_prompt, complete
from pippin.errors import EngineError, RequestError
from pippin.messages import ModelInfo, Output
from pippin.profile.timeline import Timeline
from pippin.types import Finish, SamplingParams, TokenLogprob
from tests.tokenizers_for_tests import TOKENIZERS, byte_level
from tests.waiting import comes_true

INFO = ModelInfo(
    model_path="m",
    tokenizer_path="m",
    model_type="qwen3",
    dtype="float32",
    quantization=None,
    vocab_size=500,
    context_length=100,
    eos_token_ids=[2],
    attention_backend="rows",
    attention_reason="",
    max_total_tokens=400,
    max_running_requests=4,
    chunked_prefill_size=64,
    page_size=1,
    weight_bytes=0,
    pool_bytes=0,
    device="cpu",
)

LENGTH = Finish("length")


@dataclass
class ScriptedClient:
    """Answers every request with the same tokens, ``step`` at a time, then ``finish`` (never, if that is None)."""

    tokens: Sequence[int]
    finish: Finish | None = LENGTH
    step: int = 1
    logprobs: bool = False
    fails_after: int | None = None
    asked: dict[str, SamplingParams] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    info: ModelInfo = INFO
    timeline: Timeline | None = None

    async def submit(
        self, tokens: Sequence[int], params: SamplingParams, priority: int = 0, id: str | None = None
    ) -> AsyncGenerator[Output, None]:
        assert id is not None
        self.asked[id] = params
        self.open.add(id)
        try:
            for at in range(0, len(self.tokens), self.step):
                await asyncio.sleep(0)
                if self.fails_after is not None and at >= self.fails_after:
                    raise EngineError("the engine process ended")
                new = list(self.tokens[at : at + self.step])
                last = at + self.step >= len(self.tokens)
                yield Output(
                    id,
                    new,
                    [TokenLogprob(t, -0.5) for t in new] if params.logprobs else [],
                    [TokenLogprob(t, None) for t in tokens] if params.prompt_logprobs and at == 0 else [],
                    num_cached=3,
                    finish=self.finish if last else None,
                )
            if self.finish is None:
                await asyncio.Event().wait()
        except (GeneratorExit, asyncio.CancelledError):
            if self.finish is None:
                self.closed.append(id)
            raise
        finally:
            self.open.discard(id)

    def abort(self, id: str) -> None:
        self.aborted.append(id)


def collect(client: ScriptedClient, params: SamplingParams, tokenizer_name: str = "byte-level") -> list[Delta]:
    async def run() -> list[Delta]:
        tokenizer = TOKENIZERS[tokenizer_name]()
        stream = complete(client, tokenizer, [5, 6, 7], params, rid="r", draw_seed=lambda: 40)
        return [delta async for delta in stream]

    return asyncio.run(run())


def text_of(deltas: Sequence[Delta], index: int = 0) -> str:
    return "".join(d.text for d in deltas if d.index == index)


def tokens_of(deltas: Sequence[Delta], index: int = 0) -> list[int]:
    return [t for d in deltas if d.index == index for t in d.tokens]


names = st.sampled_from(sorted(TOKENIZERS))


@given(st.data(), names, st.integers(1, 7))
def test_text_and_tokens_arrive_whole(data: st.DataObject, name: str, step: int) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    deltas = collect(ScriptedClient(ids, step=step), SamplingParams(), name)
    assert text_of(deltas) == tokenizer.decode(ids)
    assert tokens_of(deltas) == ids
    assert [d.finish for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish == Finish("length")
    assert {(d.num_prompt, d.num_cached) for d in deltas} == {(3, 3)}


@given(st.integers(1, 9), st.booleans())
def test_a_stop_string_ends_the_answer_and_the_request(step: int, keep: bool) -> None:
    tokenizer = byte_level()
    ids = [tokenizer.encode(c, False)[0] for c in "say END and more"]
    client = ScriptedClient(ids, step=step, finish=None)
    deltas = collect(client, SamplingParams(stop=("END", "more"), logprobs=True, no_stop_trim=keep))
    assert text_of(deltas) == ("say END" if keep else "say ")
    assert tokens_of(deltas) == ids[:7]
    assert [x.token for d in deltas for x in d.logprobs] == ids[:7]
    assert deltas[-1].finish == Finish("stop", "END")
    assert client.aborted == ["r"]
    assert not client.open


def test_stops_that_are_special_tokens_end_it_though_they_are_no_text() -> None:
    """Clients send the names of their model's special tokens as stop strings."""
    tokenizer = byte_level()
    end = tokenizer.encode("<|im_start|>")[0]
    client = ScriptedClient([*tokenizer.encode("well!", False), end], finish=Finish("stop", end))
    deltas = collect(client, SamplingParams(stop=("<|im_start|>", "!!"), stop_token_ids=(9,)))
    assert client.asked["r"].stop_token_ids == (9, end)
    assert text_of(deltas) == "well!"
    assert deltas[-1].finish == Finish("stop", "<|im_start|>")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_tokenizers_own_end_ends_it(ignore_eos: bool) -> None:
    """Fine-tuned checkpoints often name their chat's end in the tokenizer's files alone."""
    client = ScriptedClient(byte_level().encode("abc", False), info=msgspec.structs.replace(INFO, eos_token_ids=[7]))
    collect(client, SamplingParams(ignore_eos=ignore_eos))
    assert client.asked["r"].stop_token_ids == (() if ignore_eos else byte_level().eos_ids)


def test_held_text_comes_with_the_end() -> None:
    tokenizer = byte_level()
    deltas = collect(ScriptedClient([tokenizer.encode(c, False)[0] for c in "good EN"]), SamplingParams(stop=("END",)))
    assert text_of(deltas) == "good EN"
    assert text_of(deltas[:-1]) == "good "


@pytest.mark.parametrize("no_stop_trim", [False, True])
def test_the_token_that_ended_it_is_counted_but_not_shown(no_stop_trim: bool) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("well!", False)
    client = ScriptedClient(ids, finish=Finish("stop", ids[-1]))
    deltas = collect(client, SamplingParams(no_stop_trim=no_stop_trim, stop_token_ids=(ids[-1],)))
    assert tokens_of(deltas) == ids
    assert text_of(deltas) == ("well!" if no_stop_trim else "well")
    assert client.aborted == []


@given(st.integers(1, 5), st.one_of(st.none(), st.sampled_from([0, 7, 2**64 - 1, -(2**63)])))
def test_answers_differ_in_seed_alone(n: int, seed: int | None) -> None:
    client = ScriptedClient(byte_level().encode("abc", False))
    deltas = collect(client, SamplingParams(n=n, seed=seed, prompt_logprobs=True))
    assert list(client.asked) == answer_ids("r", n)
    seeds = [p.seed for p in client.asked.values()]
    assert seeds[0] == (40 if seed is None else seed)
    assert len(set(seeds)) == n
    assert {p.n for p in client.asked.values()} == {1}
    assert [i for i in range(n) if any(d.prompt_logprobs for d in deltas if d.index == i)] == [0]
    for i in range(n):
        assert text_of(deltas, i) == "abc"
        assert [d.finish for d in deltas if d.index == i][-1] == Finish("length")


@pytest.mark.parametrize("n", [1, 3])
def test_closing_aborts_what_is_unfinished(n: int) -> None:
    client = ScriptedClient(byte_level().encode("abcdef", False), finish=None)

    async def run() -> None:
        async with aclosing(complete(client, byte_level(), [5], SamplingParams(n=n), rid="r")) as stream:
            async for _ in stream:
                break

    asyncio.run(run())
    assert client.open == set()
    assert set(client.closed) == set(client.asked)


def test_cancelling_aborts_too() -> None:
    client = ScriptedClient(byte_level().encode("abc", False), finish=None)

    async def read() -> None:
        async for _ in complete(client, byte_level(), [5], SamplingParams(n=2), rid="r"):
            pass

    async def run() -> None:
        task = asyncio.create_task(read())
        await comes_true(lambda: len(client.asked) == 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert client.open == set()
    assert sorted(client.closed) == ["r-0", "r-1"]


@pytest.mark.parametrize("n", [1, 3])
def test_an_engine_error_reaches_the_reader_and_ends_the_rest(n: int) -> None:
    client = ScriptedClient(byte_level().encode("a b c d e f", False), fails_after=2)
    with pytest.raises(EngineError, match="ended"):
        collect(client, SamplingParams(n=n))
    assert client.open == set()


# --- what can't be asked ---


def test_a_prompt_fits_or_is_refused() -> None:
    params = SamplingParams(max_new_tokens=50, min_new_tokens=30)
    assert check_prompt([1] * 50, params, INFO) is params
    cut = check_prompt([1] * 80, params, INFO)
    assert (cut.max_new_tokens, cut.min_new_tokens) == (20, 20)
    assert check_prompt([1] * 99, params, INFO).max_new_tokens == 1
    for prompt, said in (([1] * 100, "100 tokens"), ([], "empty"), ([500], "between 0 and 499"), ([-1], "between")):
        with pytest.raises(RequestError, match=said) as caught:
            check_prompt(prompt, params, INFO, "input_ids")
        assert caught.value.field == "input_ids"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(stop_token_ids=(500,)), "stop_token_ids"),
        (SamplingParams(logit_bias={900: 1.0}), "logit_bias"),
    ],
)
def test_token_ids_in_parameters_must_exist(params: SamplingParams, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_prompt([1], params, INFO)
    assert caught.value.field == field
