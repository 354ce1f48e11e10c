"""Streamed text: its pieces joined are the text decoded at once, and stop strings end it wherever they lie."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.text.detokenizer import TextStream, WindowDetokenizer, detokenizer
from pippin.text.stops import StopAutomaton
from pippin.text.tokenizer import Tokenizer
from pippin.types import SamplingParams
from tests.tokenizers_for_tests import TOKENIZERS, byte_level, fallback

names = st.sampled_from(sorted(TOKENIZERS))
texts = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("aehlo STOPEND日🙂")), max_size=60)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> str:
    stream = detokenizer(tokenizer, skip)
    return "".join([*map(stream.push, ids), stream.flush()])


@given(st.data(), names, st.booleans())
def test_pieces_joined_equal_decoding_at_once(data: st.DataObject, name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(ids_of(tokenizer))
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


@given(names, st.sampled_from(["", " ", "   "]), texts)
def test_text_comes_back_whole(name: str, spaces: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = spaces + text
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids, False) == tokenizer.decode(ids, False)
    if tokenizer.scheme.kind == "bytes":
        assert streamed(tokenizer, ids, False) == text


@given(st.text(min_size=1, max_size=30))
def test_no_half_characters_on_the_way(text: str) -> None:
    tokenizer = byte_level()
    stream = detokenizer(tokenizer)
    shown = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        shown += stream.push(token)
        assert text.startswith(shown)


def test_a_byte_run_waits_until_it_ends() -> None:
    tokenizer = fallback()
    stream = detokenizer(tokenizer)
    run = [3 + b for b in "語".encode()]
    assert [stream.push(t) for t in run] == ["", "", ""]
    he = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == "he")
    assert stream.push(he) == "語he"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a<|im_end|>b<think>c")
    assert streamed(tokenizer, ids, True) == "ab<think>c"
    assert streamed(tokenizer, ids, False) == "a<|im_end|>b<think>c"


@given(texts)
def test_the_window_waits_for_whole_characters(text: str) -> None:
    """A decoder that is only known by its results may have byte tokens too."""
    tokenizer = byte_level()
    ids = tokenizer.encode(text, False)
    stream = WindowDetokenizer(tokenizer, False, True)
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


def test_the_window_gives_up_waiting() -> None:
    """Half a character never completed must not hold everything after it back."""
    tokenizer = byte_level()
    half = tokenizer.encode("\u00e9", False)[:1] * 40
    stream = WindowDetokenizer(tokenizer, True, True)
    shown = [stream.push(t) for t in half]
    assert sum(map(len, shown)) >= 16


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_time_grows_with_length_only(name: str) -> None:
    """Twenty times the tokens take far less than twenty times twenty the time."""
    tokenizer = TOKENIZERS[name]()
    ids = [(7 * i) % tokenizer.vocab_size for i in range(10_000)]

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            streamed(tokenizer, ids[:count], True)
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(10_000) < 100 * max(seconds(500), 1e-4)


# --- stop strings ---


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """By definition: the stop string that ends first, the longest of those; with its end."""
    for end in range(1, len(text) + 1):
        if ends := [s for s in stops if text[:end].endswith(s)]:
            return end, max(ends, key=len)
    return None


def stop_stream(stops: Sequence[str], **options: bool | int) -> TextStream:
    params = SamplingParams(stop=tuple(stops), max_new_tokens=10_000, **options)  # type: ignore[arg-type]
    return TextStream(byte_level(), params)


def run(stream: TextStream, groups: Sequence[Sequence[int]]) -> tuple[str, str | None, int]:
    """All shown text, what matched, and how many tokens count."""
    text, count = "", 0
    for group in groups:
        piece = stream.push(group)
        text, count = text + piece.text, count + piece.num_tokens
        if piece.matched is not None:
            return text, piece.matched, count
    last = stream.finish()
    return text + last.text, last.matched, count


letters = st.text(alphabet="ab", max_size=30)
patterns = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=6)


@given(letters, patterns, st.booleans(), st.randoms(use_true_random=False))
def test_stops_are_found_by_definition(text: str, stops: list[str], keep: bool, random: object) -> None:
    """However tokens fall into steps, and whichever tokens spell the text."""
    tokenizer = byte_level()
    spelled = [tokenizer.encode(c, False)[0] for c in text]
    whole = tokenizer.encode(text, False)
    expected = first_stop(text, stops)
    for groups in ([[t] for t in spelled], [spelled], [[t] for t in whole], [whole]):
        shown, matched, count = run(stop_stream(stops, no_stop_trim=keep), groups)
        if expected is None:
            assert (shown, matched) == (text, None)
            assert count == sum(map(len, groups))
        else:
            end, stop = expected
            assert (shown, matched) == (text[: end if keep else end - len(stop)], stop)
            tokens = [t for group in groups for t in group]
            assert len(tokenizer.decode(tokens[: count - 1])) < end <= len(tokenizer.decode(tokens[:count]))


@given(letters, patterns)
def test_nothing_shown_is_taken_back(text: str, stops: list[str]) -> None:
    tokenizer = byte_level()
    stream, shown = stop_stream(stops), ""
    expected = first_stop(text, stops)
    final = text if expected is None else text[: expected[0] - len(expected[1])]
    for token in tokenizer.encode(text, False):
        piece = stream.push([token])
        shown += piece.text
        assert final.startswith(shown)
        if piece.matched is not None:
            break


@given(letters, patterns)
def test_no_more_is_held_back_than_must_be(text: str, stops: list[str]) -> None:
    """What is held is the longest suffix that begins a stop string."""
    if first_stop(text, stops):
        return
    stream = stop_stream(stops)
    shown = stream.push(byte_level().encode(text, False)).text
    beginnings = {s[:n] for s in stops for n in range(len(s) + 1)}
    held = max((text[i:] for i in range(len(text) + 1) if text[i:] in beginnings), key=len)
    assert shown == text[: len(text) - len(held)]


@given(st.integers(0, 12))
def test_stops_within_the_least_tokens_are_text(least: int) -> None:
    tokenizer = byte_level()
    ids = [tokenizer.encode(c, False)[0] for c in "abXcdXefXgh"]
    shown, matched, count = run(stop_stream(["X"], min_new_tokens=least), [[t] for t in ids])
    end = next((i + 1 for i in (2, 5, 8) if i + 1 >= least), None)
    assert count == (end or len(ids))
    assert (shown, matched) == (("abXcdXefXgh"[: end - 1], "X") if end else ("abXcdXefXgh", None))


def test_a_stop_may_complete_in_the_flush() -> None:
    tokenizer = fallback()
    stream = TextStream(tokenizer, SamplingParams(stop=("語",)))
    piece = stream.push([3 + b for b in "語".encode()])
    assert (piece.text, piece.matched) == ("", None)
    assert stream.finish().matched == "語"


def test_many_stops_cost_no_more() -> None:
    few = StopAutomaton(["zq"])
    many = StopAutomaton([f"zq{i}" for i in range(2000)])
    text = "abc zq" * 3000

    def seconds(automaton: StopAutomaton) -> float:
        began, state = time.thread_time(), 0
        for char in text:
            state = automaton.step(state, char)
        return time.thread_time() - began

    assert min(seconds(many) for _ in range(3)) < 10 * min(seconds(few) for _ in range(3))
