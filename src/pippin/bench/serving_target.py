"""What can be learned of a server before it is measured: its name, its model, how long its tokens are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import msgspec

from pippin.bench.serving_api import Answer
from pippin.bench.serving_data import Codec, Conversation, Ruler
from pippin.bench.serving_load import Target, ask
from pippin.bench.serving_options import DatasetOptions, TargetOptions
from pippin.errors import ConfigError, EngineError

PATIENCE = aiohttp.ClientTimeout(total=60)
SAMPLES = (32, 160)  # words of the two prompts that are measured
LONGEST_WARM_UP = 32  # tokens of an answer


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself; None where it doesn't."""

    model: str | None = None
    owner: str | None = None
    device: str | None = None
    version: str | None = None
    vocab_size: int | None = None


async def look(http: aiohttp.ClientSession, url: str) -> Facts:
    """Asks /v1/models and SGLang's /get_server_info. Raises EngineError if nobody answers, or not without a key."""
    models = await _get(http, url, "/v1/models", needs_key=True)
    info = await _get(http, url, "/get_server_info")
    cards = models.get("data")
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
    return Facts(
        model=_text(card.get("id")) or _text(info.get("served_model_name")) or _text(info.get("model_path")),
        owner=_text(card.get("owned_by")),
        device=_text(info.get("device")),
        version=_text(info.get("version")),
        vocab_size=info["vocab_size"] if isinstance(info.get("vocab_size"), int) else None,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


async def _get(http: aiohttp.ClientSession, url: str, path: str, needs_key: bool = False) -> dict[str, Any]:
    """A JSON object; empty if there is none at this path."""
    try:
        async with http.get(url + path, timeout=PATIENCE) as response:
            if needs_key and response.status in (401, 403):
                raise EngineError(f"{url} wants a key (HTTP {response.status}): set OPENAI_API_KEY")
            found = msgspec.json.decode(await response.read())
            return found if response.status == 200 and isinstance(found, dict) else {}
    except aiohttp.InvalidURL as error:
        raise ConfigError(f"{url} is no address", "--base-url") from error
    except aiohttp.ClientConnectorError as error:
        raise EngineError(
            f"nobody answers at {url} ({error.os_error}); say where the server is with --base-url"
        ) from error
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError, UnicodeError):
        return {}


async def post(http: aiohttp.ClientSession, url: str, path: str) -> str | None:
    """Tells the server something; what is wrong if it doesn't do it."""
    try:
        async with http.post(url + path, json={}, timeout=PATIENCE) as response:
            return None if response.status == 200 else f"{path}: HTTP {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"{path}: {error}"


async def find_ruler(
    http: aiohttp.ClientSession, target: Target, options: TargetOptions, dataset: DatasetOptions, facts: Facts
) -> tuple[Ruler, str]:
    """How prompts of a length are made, and how that is known. Raises ConfigError; EngineError if the server fails."""
    codec, vocab_size = _codec(options.tokenizer)
    if dataset.sends_tokens:
        if not target.backend.api.takes_tokens:
            raise ConfigError(f"{options.backend} takes messages, not token ids", "--tokenize-prompt")
        if (size := vocab_size or facts.vocab_size) is None:
            raise ConfigError(
                "the server doesn't say how many token ids there are: give --tokenizer", "--tokenize-prompt"
            )
        return Ruler(vocab_size=size), "token ids"
    if codec is not None:
        return Ruler(codec=codec), "tokenizer"
    counts = [await _prompt_tokens(http, target, words) for words in SAMPLES]
    if None in counts:
        return Ruler(), "guess"
    return Ruler(tokens_per_word=slope(SAMPLES, [c or 0 for c in counts])), "server"


def slope(words: Sequence[int], tokens: Sequence[int]) -> float:
    """Tokens a word, whatever a template or a beginning adds to both prompts."""
    return max(0.1, (tokens[1] - tokens[0]) / (words[1] - words[0]))


def _codec(path: str | None) -> tuple[Codec | None, int | None]:
    if path is None:
        return None, None
    from pippin.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    return tokenizer, tokenizer.vocab_size


async def _prompt_tokens(http: aiohttp.ClientSession, target: Target, words: int) -> int | None:
    """How many tokens the server counts in so many words."""
    answer = Answer()
    await ask(http, target, [Ruler().words(random.Random(words), words)], 2, answer)
    refuse(answer)
    return answer.prompt_tokens


def refuse(answer: Answer) -> None:
    """Raises EngineError for a request that failed before anything was measured. An answer may be empty."""
    if answer.error not in (None, "empty answer"):
        raise EngineError(f"the server fails a first request ({answer.error}): {answer.detail}")


async def warm_up(
    http: aiohttp.ClientSession, target: Target, conversations: Sequence[Conversation], ruler: Ruler, seed: int
) -> None:
    """Prompts as long as the first ones, but others, so that nothing of the run is cached. Raises EngineError."""
    rng = random.Random(f"warm-up {seed}")
    for conversation in conversations:
        turn = conversation.turns[0]
        length = ruler.tokens(turn.prompt) if isinstance(turn.prompt, str) else len(turn.prompt)
        answer = Answer()
        await ask(http, target, [ruler.prompt(rng, length)], min(turn.output_len, LONGEST_WARM_UP), answer)
        refuse(answer)


def named(target: Target, facts: Facts, options: TargetOptions) -> Target:
    """With the model's name. Raises ConfigError if nobody says it and the backend needs it."""
    model = options.model or facts.model
    if model is None and target.backend.api.path != "/generate":
        raise ConfigError(f"{target.url}/v1/models names no model: say which", "--model")
    return replace(target, model=model or "")
