"""Masks against brute force: a token is allowed if, and only if, some text of the grammar goes on with it.

What can go on is judged by partial matches of the ``regex`` package, which knows nothing of llguidance or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import regex
from hypothesis import given, reject
from hypothesis import strategies as st
from llguidance import LLTokenizer

from pippin.errors import RequestError
from pippin.grammar.compiler import GrammarCompiler
from pippin.grammar.matcher import GrammarMatcher
from pippin.grammar.vocabulary import vocabulary_of
from pippin.mask_table import MaskTable
from pippin.masks import Bits, RowMasks
from pippin.sampler import SamplingInputs, SamplingPlan, allow, sample
from pippin.text.tokenizer import Tokenizer
from pippin.types import Grammar, Request, SamplingParams, Work
from tests.tokenizers_for_tests import byte_ids, byte_level, fallback, metaspace, python_bytes

LETTERS = ["a", "p", "l", "e", " ", "t", "h", "s", "o", "é", "日", "A", ".", "the ", "apple", "test"]


def literal(text: str) -> str:
    return f"(?:{regex.escape(text)})"


def patterns() -> st.SearchStrategy[str]:
    """Regexes that mean the same to both, over texts and over their UTF-8."""
    leaf = st.one_of(st.sampled_from(LETTERS).map(literal), st.sampled_from(["[a-e]", "[ht ]", "[0-9]"]).map(str))

    def more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.lists(inner, min_size=1, max_size=4).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
            st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}", "{0,2}"])).map(
                lambda p: f"(?:{p[0]}){p[1]}"
            ),
        )

    return st.recursive(leaf, more, max_leaves=8)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "fallback": fallback,
    "gemma": lambda: fallback(strip=False),
    "metaspace": metaspace,
    "python_bytes": python_bytes,
    "byte_ids": byte_ids,
}


@cache
def compiler(name: str) -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = TOKENIZERS[name]()
    future: Future[LLTokenizer] = Future()
    future.set_result(vocabulary_of(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids))
    return tokenizer, GrammarCompiler(future, tokenizer.vocab_size, tokenizer.eos_ids)


def matcher_of(made: GrammarCompiler, grammar: Grammar, tokens: Sequence[int] = ()) -> GrammarMatcher:
    return made.submit(grammar, tokens, False).result()


def mask_of(made: GrammarCompiler, matcher: GrammarMatcher, ends_at: int = 1) -> set[int]:
    """The ids that may come next."""
    request = Request("r", [0] * ends_at, 1, SamplingParams(), matcher=matcher)
    masks, failures = made.fill([Work(request, 0, ends_at, True)]).result()
    assert not failures
    return ids_of(masks.bits[0])


def ids_of(mask: Bits) -> set[int]:
    return {int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))}


def spelled_as(tokenizer: Tokenizer, token: int) -> bytes:
    """A token's text; of Metaspace's, with the space that decoding it alone would drop."""
    if tokenizer is metaspace():
        return (tokenizer.piece(token) or "").replace("\u2581", " ").encode()
    return tokenizer.token_bytes(token)


def judged(tokenizer: Tokenizer, pattern: bytes, said: bytes) -> set[int]:
    """By brute force; where that tries too many ways to match a text, the example is no use."""
    compiled = regex.compile(pattern)
    special = tokenizer.special_ids
    found = set()

    def match(text: bytes, partial: bool) -> regex.Match[bytes] | None:
        try:
            return compiled.fullmatch(text, partial=partial, timeout=1.0)
        except TimeoutError:
            reject()

    for token in range(tokenizer.vocab_size):
        spelled = spelled_as(tokenizer, token)
        if token not in special and spelled and match(said + spelled, True):
            found.add(token)
    if (whole := match(said, False)) is not None and not whole.partial:
        found |= set(tokenizer.eos_ids)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pattern=patterns(), data=st.data())
def test_a_token_is_allowed_if_some_text_goes_on_with_it(name: str, pattern: str, data: st.DataObject) -> None:
    compare_masks(name, pattern, pattern.encode(), data)


# A character that stands in a JSON string as it is, and that in UTF-8.
TEXT = r'[^"\\\x00-\x1F\x7F]'
TEXT_BYTES = (
    rb"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})"
)


@pytest.mark.parametrize("name", ["fallback", "gemma", "python_bytes"])
@given(bounds=st.tuples(st.integers(0, 4), st.integers(0, 12)), data=st.data())
def test_strings_of_bounded_length_are_as_long_as_they_may(
    name: str, bounds: tuple[int, int], data: st.DataObject
) -> None:
    """Tokens that may stand in a string are judged many at once, by how long they are (``vocabulary.SLICES``)."""
    least, most = bounds[0], sum(bounds)
    count = f"{{{least},{most}}}"
    compare_masks(name, f'"{TEXT}{count}"', b'"' + TEXT_BYTES + count.encode() + b'"', data)


def compare_masks(name: str, pattern: str, in_bytes: bytes, data: st.DataObject) -> None:
    """Draws a text token by token, and judges each mask on the way."""
    tokenizer, made = compiler(name)
    matcher = matcher_of(made, Grammar("regex", pattern))
    said = b""
    for _ in range(12):
        if matcher.ended:
            assert not judged(tokenizer, in_bytes, said) - set(tokenizer.eos_ids)
            break
        allowed, expected, forced = mask_of(made, matcher), judged(tokenizer, in_bytes, said), matcher.forced()
        if forced:  # then only the tokenizer's own way of writing what must come
            text = b"".join(spelled_as(tokenizer, t) for t in forced)
            spelled = [spelled_as(tokenizer, t) for t in expected]
            assert not expected & set(tokenizer.eos_ids)
            assert all(s.startswith(text) or text.startswith(s) for s in spelled)
            assert allowed == {forced[0]}
        else:
            assert allowed == expected, (pattern, said)
        token = data.draw(st.sampled_from(sorted(allowed)))
        matcher.take(token)
        if token in tokenizer.eos_ids:
            assert matcher.ended
            break
        said += spelled_as(tokenizer, token)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_no_text(name: str) -> None:
    """Their names may be written, in other tokens, but only the end of text may stand for itself."""
    tokenizer, made = compiler(name)
    for grammar in (Grammar("regex", r"(.|\n)*"), Grammar("regex", "[a-z ]{90}")):
        matcher = matcher_of(made, grammar)
        for _ in range(5):
            allowed = mask_of(made, matcher)
            assert not allowed & tokenizer.special_ids - set(tokenizer.eos_ids)
            assert bool(allowed & set(tokenizer.eos_ids)) == grammar.text.endswith("*")
            matcher.take(min(allowed - set(tokenizer.eos_ids)))


def test_a_text_that_no_tokens_can_write_fails_its_request() -> None:
    tokenizer, made = compiler("metaspace")
    unknown = "Ω"
    assert not any(unknown in (tokenizer.piece(i) or "") for i in range(tokenizer.vocab_size))
    matcher = matcher_of(made, Grammar("choice", json.dumps([unknown]), "guided_choice"))
    masks, failures = made.fill([Work(Request("r", [0], 1, SamplingParams(), matcher=matcher), 0, 1, True)]).result()
    assert failures[0].field == "guided_choice"
    assert masks.bits.all()


@given(data=st.data())
def test_only_what_the_mask_allows_is_drawn(data: st.DataObject) -> None:
    """Whatever else shapes the draw; without a mask's words, a row is free."""
    n = data.draw(st.integers(1, 100))
    allowed = data.draw(st.lists(st.sets(st.integers(0, n - 1), min_size=1), min_size=1, max_size=4))
    bits = np.zeros((len(allowed), -(-n // 32)), np.uint32)
    for row, ids in enumerate(allowed):
        for i in ids:
            bits[row, i // 32] |= np.uint32(1 << i % 32)
    rows = len(allowed) + 1
    logits = mx.array(np.random.default_rng(n).normal(size=(rows, n)).astype(np.float32))
    forbidden = data.draw(st.booleans())
    if forbidden:
        logits = mx.full((rows, n), -mx.inf)
    greedy, inputs = allow(SamplingPlan(n), SamplingInputs(), MaskTable(n).rows(RowMasks(range(len(bits)), bits), rows))
    assert greedy.masked
    drawn = np.asarray(sample(logits, greedy, inputs, mx.zeros((rows,), mx.int32)).tokens).tolist()
    for row, ids in enumerate(allowed):
        assert drawn[row] in ids
        if not forbidden:
            best = max(ids, key=lambda i: float(logits[row, i]))
            assert drawn[row] == best
    if not forbidden:
        assert drawn[-1] == int(mx.argmax(logits[-1]))


@given(data=st.data())
def test_masks_that_were_begun_are_those_that_are_asked_for(data: st.DataObject) -> None:
    """Whoever was moved ahead, whose mask was begun, who went on since, and who is asked about: each gets the mask that
    a matcher which took its tokens one by one has, and no mask is made twice."""
    _, made = compiler("byte_level")
    patterns = ["[ab]{2,9}c", "(apple|app){1,4}", "[^a]{3,30}", "a[0-9]{5}"]
    chosen = data.draw(st.lists(st.sampled_from(patterns), min_size=4, max_size=4))
    pairs = [[matcher_of(made, Grammar("regex", pattern)) for _ in range(2)] for pattern in chosen]
    maker = made._filler()
    for _ in range(4):
        live = [pair for pair in pairs if not pair[0].ended]
        begun = data.draw(st.sets(st.sampled_from(range(len(live))))) if live else set()
        drawn = [(pair, data.draw(st.sampled_from(sorted(mask_of(made, pair[1]))))) for pair in live]
        made.take([(matcher, token) for (matcher, _), token in drawn])
        for pair, token in drawn:
            for matcher in pair:
                matcher.take(token)
        before = maker.computed
        made.begin([live[i][0] for i in sorted(begun)])
        made.wait()
        advanced = set()
        moved = data.draw(st.sets(st.sampled_from(range(len(live))))) if live else set()
        for i in moved:
            if forced := live[i][0].forced():
                advanced.add(i)
                for matcher in live[i]:
                    matcher.take(forced[0])
        going = [i for i, (matcher, _) in enumerate(live) if not matcher.ended]
        asked = data.draw(st.permutations(going))[: data.draw(st.integers(0, len(going)))]
        works = [Work(Request("r", [0], 1, SamplingParams(), matcher=live[i][0]), 0, 1, True) for i in asked]
        found, _ = made.fill(works).result()
        assert maker.computed - before == len(begun) + len(set(asked) - (begun - advanced))
        masks = {row: mask.copy() for row, mask in zip(found.rows, found.bits, strict=True)}
        for row, i in enumerate(asked):
            fresh, _ = made.fill([works[row]]).result()
            assert np.array_equal(masks[row], fresh.bits[0])
            assert ids_of(masks[row]) == mask_of(made, live[i][1])


@pytest.mark.parametrize("name", ["byte_level", "fallback", "byte_ids"])
@given(data=st.data())
def test_what_is_forced_is_all_that_a_mask_allows(name: str, data: st.DataObject) -> None:
    """So that only where a mask has one token does anybody ask what comes after it."""
    _, made = compiler(name)
    tests = {"type": "object", "properties": {"test": {"enum": ["apple", "that"]}, "a": {}}, "required": ["test"]}
    matcher = matcher_of(
        made,
        data.draw(
            st.one_of(
                patterns().map(lambda pattern: Grammar("regex", pattern)),
                st.sampled_from(
                    [Grammar("json_schema", json.dumps(tests)), Grammar("regex", "(apple|apples){2}-[0-9]")]
                ),
            )
        ),
    )
    for _ in range(8):
        if matcher.ended:
            break
        ids = sorted(mask_of(made, matcher))
        forced = matcher._compiled.compute_ff_tokens()
        assert not forced or ids == forced[:1]
        made.begin([matcher])
        made.wait()
        assert matcher.forced() == forced
        matcher.take(data.draw(st.sampled_from(ids)))


@given(data=st.data())
def test_what_was_looked_ahead_at_and_not_taken_is_taken_back(data: st.DataObject) -> None:
    """Steps fail after their tokens were read: what they drew is then drawn again, perhaps otherwise."""
    _, made = compiler("byte_level")
    patterns = ["[ab]{2,9}c", "(apple|app){1,4}", "[^a]{3,30}", "a[0-9]{5}", "ab?"]
    chosen = data.draw(st.lists(st.sampled_from(patterns), min_size=1, max_size=3))
    pairs = [[matcher_of(made, Grammar("regex", pattern)) for _ in range(2)] for pattern in chosen]
    maker = made._filler()
    for _ in range(6):
        live = [pair for pair in pairs if not pair[1].ended]
        allowed = [sorted(mask_of(made, plain)) for _, plain in live]
        looked = [(matcher, data.draw(st.sampled_from(ids))) for (matcher, _), ids in zip(live, allowed, strict=True)]
        made.follow(lambda looked=looked: looked)  # type: ignore[misc]
        drawn = []
        for (pair, ids), (_, seen) in zip(zip(live, allowed, strict=True), looked, strict=True):
            drawn.append((pair, data.draw(st.sampled_from([seen, seen, None, data.draw(st.sampled_from(ids))]))))
        made.take([(pair[0], token) for pair, token in drawn if token is not None])
        for pair, token in drawn:
            if token is not None:
                pair[0].take(token)
                pair[1].take(token)
        before = maker.computed
        going = [(pair, token) for pair, token in drawn if not pair[0].ended]
        works = [Work(Request("r", [0], 1, SamplingParams(), matcher=pair[0]), 0, 1, True) for pair, _ in going]
        masks, _ = made.fill(works).result()
        remaining = [ids_of(mask) for mask in masks.bits.copy()]
        seen_by = dict(looked)
        assert maker.computed - before == sum(token != seen_by[pair[0]] for pair, token in going)
        for (pair, _), left in zip(going, remaining, strict=True):
            assert left == mask_of(made, pair[1])
            assert pair[0].forced() == pair[1].forced()


def test_a_matcher_that_was_moved_ahead_takes_that_token_once() -> None:
    tokenizer, made = compiler("byte_level")
    (letter,) = tokenizer.encode("a")
    (other,) = tokenizer.encode("b")
    pair = [matcher_of(made, Grammar("regex", "[ab]{3}")) for _ in range(2)]
    made.take([(matcher, letter) for matcher in pair])
    for matcher in pair:
        for token in (letter, letter, other):
            assert not matcher.ended
            matcher.take(token)
        assert mask_of(made, matcher) == {*tokenizer.eos_ids}
    made.take([(matcher, letter) for matcher in pair])
    for matcher in pair:
        with pytest.raises(RequestError, match="can't go on"):
            matcher.take(letter)
