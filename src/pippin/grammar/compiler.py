"""Grammars to matchers, in threads of their own, each grammar once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pippin.config import EngineConfig
from pippin.errors import RequestError
from pippin.grammar.matcher import GrammarMatcher, Masks
from pippin.grammar.source import WHITESPACE, JsonStyle, explained, llguidance_grammar
from pippin.grammar.vocabulary import in_background, load_vocabulary
from pippin.masks import RowMasks
from pippin.messages import ModelInfo
from pippin.types import Grammar, Token, Work

THREADS = 2
CACHED = 256  # grammars; a compiled one is some hundred kB

_LIMITS = LLParserLimits(verbose_errors=False)  # llguidance's own: about a second at worst, mostly a few ms

Key = tuple[str, str]


class GrammarCompiler:
    """Matchers for one model, and masks for what they allow.

    llguidance lets go of the interpreter while it compiles, so steps go on meanwhile. ``vocabulary`` may still be
    loading. ``style`` says how JSON is laid out.
    """

    def __init__(
        self,
        vocabulary: Future[LLTokenizer],
        vocab_size: int,
        eos_ids: Sequence[Token] = (),
        style: JsonStyle | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_ids = tuple(id for id in eos_ids if id < vocab_size)
        self._style = style or JsonStyle()
        self._masks: Masks | None = None
        self._begun: Future[None] | None = None
        self._compiled: OrderedDict[Key, Future[LLMatcher]] = OrderedDict()
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(THREADS, "grammar")
        self._filling = ThreadPoolExecutor(1, "masks")
        self.compiled = 0

    def submit(self, grammar: Grammar, generated: Sequence[Token], ignore_eos: bool) -> Future[GrammarMatcher]:
        """A matcher that has taken ``generated`` (of a stream that is resumed), some time soon.

        The future raises RequestError where the grammar is none, or is too large, or those tokens don't fit it.
        """
        return self._threads.submit(self._make, grammar, list(generated), self._eos_ids if ignore_eos else ())

    def fill(self, works: Sequence[Work]) -> Future[tuple[RowMasks, dict[int, RequestError]]]:
        """``Masks.fill``, beside the caller, for works that sample: for those whose matchers decide what is drawn.

        Until it is done, no one else may use their matchers.
        """
        waiting = {}
        for row, work in enumerate(works):
            request = work.request
            matcher = request.matcher
            if isinstance(matcher, GrammarMatcher) and request.finish is None and work.end == len(request.tokens):
                waiting[row] = matcher
        self.wait()
        filler = self._filler()
        if filler.ready([*waiting.values()]):
            done: Future[tuple[RowMasks, dict[int, RequestError]]] = Future()
            done.set_result(filler.fill(waiting))
            return done
        return self._filling.submit(filler.fill, waiting)

    def follow(self, drawn: Callable[[], Sequence[tuple[GrammarMatcher, Token]]]) -> None:
        """Takes what ``drawn`` waits for, and begins masks, beside the caller, who calls ``wait`` before the matchers
        are used again. What they are then not given to ``take`` is taken back; an error comes up again there.
        """
        filler = self._filler()
        self._begun = self._filling.submit(lambda: filler.follow(drawn()))

    def take(self, tokens: Sequence[tuple[GrammarMatcher, Token]]) -> None:
        """Tells matchers what they will be given next, all in parallel: taking it is then no work."""
        self.wait()
        if tokens:
            self._filler().take(tokens)

    def begin(self, matchers: Sequence[GrammarMatcher]) -> None:
        """Begins masks that are missing beside the caller, who calls ``wait`` before the matchers are used again."""
        if matchers and not self._filler().ready(matchers):
            self._begun = self._filling.submit(self._filler().begin, matchers)

    def wait(self) -> None:
        """Until what was begun is done. An error in it is ``fill``'s, which makes what is missing."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.exception()

    def _filler(self) -> Masks:
        if self._masks is None:
            self._masks = Masks(self._vocab_size, self._vocabulary.result().vocab_size)
        return self._masks

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._filling.shutdown(wait=False, cancel_futures=True)

    def _make(self, grammar: Grammar, generated: list[Token], barred: Sequence[Token]) -> GrammarMatcher:
        matcher = GrammarMatcher(self._of(grammar).deep_copy(), barred, grammar.field)
        for token in generated:
            matcher.take(token)
        return matcher

    def _of(self, grammar: Grammar) -> LLMatcher:
        """The grammar at its beginning; whoever comes first compiles it. Raises RequestError."""
        key = grammar.kind, grammar.text
        with self._lock:
            mine = key not in self._compiled
            future = self._compiled.setdefault(key, Future())
            self._compiled.move_to_end(key)
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        if mine:
            _settle(future, partial(self._compile, grammar))
            self.compiled += 1
        try:
            return future.result()
        except RequestError as error:  # perhaps of a request that spelled its field otherwise
            raise RequestError(f"{grammar.field}: {error.message}", grammar.field, error.status) from error
        except Exception:  # of the moment, perhaps: the next one may try again
            with self._lock:
                if self._compiled.get(key) is future:
                    del self._compiled[key]
            raise

    def _compile(self, grammar: Grammar) -> LLMatcher:
        vocabulary = self._vocabulary.result()
        text = llguidance_grammar(grammar, self._style, vocabulary)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise explained(grammar, matcher.get_error())
        return matcher


def compiler_of(config: EngineConfig, info: ModelInfo) -> GrammarCompiler | None:
    """What compiles a model's grammars, its vocabulary still loading; None where that is switched off."""
    if config.grammar_backend == "none":
        return None
    whitespace = config.constrained_json_whitespace_pattern
    style = JsonStyle(config.constrained_json_disable_any_whitespace, WHITESPACE if whitespace is None else whitespace)
    directory, vocab_size, ends = Path(info.tokenizer_path), info.vocab_size, info.eos_token_ids
    load = partial(load_vocabulary, directory, vocab_size, ends, config.trust_remote_code)
    return GrammarCompiler(in_background(load), vocab_size, ends, style)


def _settle(future: Future[LLMatcher], work: partial[LLMatcher]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
