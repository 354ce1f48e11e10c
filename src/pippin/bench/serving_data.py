"""What a load asks: conversations of one or more messages, made from a seed or read from a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pippin.bench.serving_options import DatasetOptions
from pippin.errors import ConfigError

Prompt = str | list[int]
Asked = tuple[Prompt, int]
"""A message and the most tokens of its answer."""

# Short and common, so that most tokenizers have each as one token.
WORDS = (  # noqa: SIM905 - a list would be a line a word
    "the he of and to in is you that at it was as for or on are with his they be one have this from had by hot "
    "but some so me what there here her we can out other were all your our when up us use word how said each she "
    "which do their time if will way about many man any then them would write like these long make thing see him "
    "two has look more day could go come did my sound no most number who over know now water than call first "
    "people may down own side been find new work part take get place made live where after back little only round "
    "year came show every very good give under name through just form much great think say help low line before "
    "turn cause same mean differ move right boy old too does tell sentence set three want air well also play "
    "small end put home read hand port large spell add even land must big high such follow act why ask men change "
    "went light kind off need house picture try again animal point mother world near build self earth father head "
    "stand "
).split()


class Codec(Protocol):
    """What is used of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Ruler:
    """Makes prompts of a length, and measures texts.

    With ``codec`` to the token (or nearly: what is cut in the middle of a word may join otherwise), else by
    ``tokens_per_word``, which was measured on the server. With ``vocab_size`` prompts are random token ids instead.
    """

    tokens_per_word: float = 1.3
    codec: Codec | None = None
    vocab_size: int | None = None

    def prompt(self, rng: random.Random, tokens: int) -> Prompt:
        if self.vocab_size is not None:  # the first ids are special in most vocabularies
            return [rng.randrange(min(256, self.vocab_size // 2), self.vocab_size) for _ in range(tokens)]
        if self.codec is None:
            return self.words(rng, max(1, round(tokens / self.tokens_per_word)))
        ids = self.codec.encode(self.words(rng, tokens + 8), add_special_tokens=False)
        return self.codec.decode(ids[:tokens])

    def words(self, rng: random.Random, count: int) -> str:
        """Separated, and ending, by spaces: texts can be put one behind the other."""
        return "".join(rng.choice(WORDS) + " " for _ in range(count))

    def tokens(self, text: str) -> int:
        if self.codec is not None:
            return len(self.codec.encode(text, add_special_tokens=False))
        return max(1, round(len(text.split()) * self.tokens_per_word))


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and the most tokens of its answer. ``pause`` is the seconds before it is sent."""

    prompt: Prompt
    output_len: int
    pause: float = 0.0
    warm: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, each sent with all before it and the answers to them. ``group``: who shares a beginning with whom."""

    turns: tuple[Turn, ...]
    group: object = field(default=None, compare=False)


def make_dataset(options: DatasetOptions, num_prompts: int, seed: int, ruler: Ruler) -> list[Conversation]:
    """All conversations in the order in which they are sent; the same for the same arguments.

    Raises ConfigError for a file that can't be read or has nothing to ask.
    """
    if options.tokenize_prompt and options.dataset_name not in TOKEN_DATASETS:
        raise ConfigError(f"works with {', '.join(TOKEN_DATASETS)}", "--tokenize-prompt")
    rng = random.Random(seed)
    return mark_warm(MAKERS[options.dataset_name](options, num_prompts, rng, ruler))


def mark_warm(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Says of each message whether the run asked its beginning before."""
    seen: set[object] = set()
    found = []
    for one in conversations:
        first, *others = one.turns
        known = one.group is not None and one.group in seen
        seen.add(one.group)
        found.append(replace(one, turns=(replace(first, warm=known), *(replace(t, warm=True) for t in others))))
    return found


def random_lengths(options: DatasetOptions, num_prompts: int, rng: random.Random, ruler: Ruler) -> list[Conversation]:
    """Prompts and answers of uniform length, from ``random_range_ratio`` of the longest on."""
    return [
        Conversation((Turn(ruler.prompt(rng, draw(rng, options.random_input_len, options)), output_len(rng, options)),))
        for _ in range(num_prompts)
    ]


def draw(rng: random.Random, longest: int, options: DatasetOptions) -> int:
    return rng.randint(max(1, int(longest * options.random_range_ratio)), longest)


def output_len(rng: random.Random, options: DatasetOptions) -> int:
    return draw(rng, options.random_output_len, options)


def shared_prefixes(options: DatasetOptions, num_prompts: int, rng: random.Random, ruler: Ruler) -> list[Conversation]:
    """Groups of prompts with one beginning, all shuffled."""
    found = []
    for group in range(options.gsp_num_groups):
        beginning = ruler.prompt(rng, options.gsp_system_prompt_len)
        for _ in range(options.gsp_prompts_per_group):
            prompt = joined(beginning, ruler.prompt(rng, options.gsp_question_len))
            warmth = group if options.gsp_system_prompt_len >= options.gsp_question_len else None
            found.append(Conversation((Turn(prompt, options.gsp_output_len),), warmth))
    rng.shuffle(found)
    return found


def joined(first: Prompt, second: Prompt) -> Prompt:
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    return [*first, *second]


def long_documents(options: DatasetOptions, num_prompts: int, rng: random.Random, ruler: Ruler) -> list[Conversation]:
    """Every document's first question, then every document's second, and so on: the first pass finds them all new."""
    documents = [ruler.prompt(rng, options.document_len) for _ in range(options.num_documents)]
    return [
        Conversation(
            (Turn(joined(text, ruler.prompt(rng, options.question_len)), output_len(rng, options)),),
            number if options.document_len >= options.question_len else None,
        )
        for _ in range(options.questions_per_document)
        for number, text in enumerate(documents)
    ]


def multi_turn(options: DatasetOptions, num_prompts: int, rng: random.Random, ruler: Ruler) -> list[Conversation]:
    """Chats, of random words or from a file, with an exponential pause before each further message."""
    asked: list[list[Asked]]
    if options.dataset_path:
        asked = picked(conversations_in(Path(options.dataset_path), options, ruler), num_prompts, rng)
    else:
        asked = [[random_message(options, rng, ruler) for _ in range(options.num_turns)] for _ in range(num_prompts)]
    return [
        Conversation(tuple(Turn(q, n, pause(rng, options) if i else 0.0) for i, (q, n) in enumerate(one)))
        for one in (messages[: options.num_turns] for messages in asked)
    ]


def random_message(options: DatasetOptions, rng: random.Random, ruler: Ruler) -> Asked:
    return ruler.prompt(rng, draw(rng, options.random_input_len, options)), output_len(rng, options)


def pause(rng: random.Random, options: DatasetOptions) -> float:
    return rng.expovariate(1 / options.think_time) if options.think_time else 0.0


def share_gpt(options: DatasetOptions, num_prompts: int, rng: random.Random, ruler: Ruler) -> list[Conversation]:
    """The first message of each conversation of a file, answered at its answer's length."""
    asked = conversations_in(Path(options.dataset_path or ""), options, ruler)
    return [Conversation((Turn(*messages[0]),)) for messages in picked(asked, num_prompts, rng)]


def picked(asked: list[list[Asked]], number: int, rng: random.Random) -> list[list[Asked]]:
    """So many of them in random order; all, and then again, if there are not enough."""
    rng.shuffle(asked)
    return [asked[i % len(asked)] for i in range(number)]


def conversations_in(path: Path, options: DatasetOptions, ruler: Ruler) -> list[list[Asked]]:
    """Messages and lengths of their answers, of a file in ShareGPT's form.

    ``{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}``, a list of them or one a
    line; or OpenAI's ``{"messages": [{"role": "user", "content": …}, …]}``. What has no answered message is left out.
    """
    found = []
    for entry in entries_of(path):
        said = spoken(entry)
        messages: list[Asked] = []
        for (who, question), (other, answer) in pairwise(said):
            if (who, other) == ("user", "assistant") and question and answer:
                messages.append((question, options.sharegpt_output_len or ruler.tokens(answer)))
        if messages and fits(messages, options, ruler):
            found.append(messages)
    if not found:
        raise ConfigError(f"{path} holds no conversation that can be asked", "--dataset-path")
    return found


def fits(messages: list[Asked], options: DatasetOptions, ruler: Ruler) -> bool:
    if options.sharegpt_context_len is None:
        return True
    return sum(ruler.tokens(str(q)) + n for q, n in messages) <= options.sharegpt_context_len


def entries_of(path: Path) -> list[Any]:
    """The objects of a JSON list, or of lines of JSON. Raises ConfigError if it can't be read as either."""
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"["):
            return list(msgspec.json.decode(content))
        return [msgspec.json.decode(line) for line in content.splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", "--dataset-path") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is neither a JSON list nor lines of JSON: {error}", "--dataset-path") from error


def spoken(entry: Any) -> list[tuple[str, str]]:
    """Who said what, in one entry of a file; empty if it is of another form."""
    said = entry.get("conversations") or entry.get("messages") if isinstance(entry, dict) else None
    found = []
    for one in said if isinstance(said, list) else ():
        if isinstance(one, dict):
            text = one.get("value", one.get("content"))
            found.append((ROLES.get(str(one.get("from", one.get("role")))), text if isinstance(text, str) else ""))
    return [(who, text) for who, text in found if who is not None]


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}

MAKERS: dict[str, Callable[[DatasetOptions, int, random.Random, Ruler], list[Conversation]]] = {
    "random": random_lengths,
    "random-ids": random_lengths,
    "generated-shared-prefix": shared_prefixes,
    "multi-turn": multi_turn,
    "long-document": long_documents,
    "sharegpt": share_gpt,
}
TOKEN_DATASETS = ("random", "random-ids", "generated-shared-prefix", "long-document")
