"""Structural tags: free text in which a trigger begins a tag, and what a tag holds follows a grammar.

Spellings are SGLang's and xgrammar's. The older one has ``structures`` (begin, schema, end) and ``triggers``; the newer
one a ``format`` made of parts. Both become Lark as llguidance understands it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llguidance import LLTokenizer, regex_to_lark

from pippin.errors import RequestError

Json = Mapping[str, Any]

ANY_TEXT = r"/(.|\n)*/"

# What each type of part may hold beside its type.
FIELDS: Mapping[str, frozenset[str]] = {
    "const_string": frozenset({"value"}),
    "json_schema": frozenset({"json_schema"}),
    "regex": frozenset({"pattern"}),
    "grammar": frozenset({"grammar"}),
    "any_text": frozenset({"excludes"}),
    "sequence": frozenset({"elements"}),
    "or": frozenset({"elements"}),
    "tag": frozenset({"begin", "content", "end"}),
    "triggered_tags": frozenset({"triggers", "tags", "at_least_one", "stop_after_first", "excludes"}),
    "tags_with_separator": frozenset({"tags", "separator", "at_least_one", "stop_after_first"}),
}


def grammar_of_tag(tag: Any, options: Json, vocabulary: LLTokenizer, lark: Callable[[str], str]) -> str:
    """llguidance's grammar of a structural tag.

    ``options`` are llguidance's for JSON, ``lark`` turns GBNF into Lark. Special tokens' names in begins and ends
    stand for those tokens. Raises RequestError.
    """
    if not isinstance(tag, dict):
        raise RequestError("a structural tag must be a JSON object")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise RequestError(f'its type must be "structural_tag", not {tag["type"]!r}')
    _only(tag, {"format"} if "format" in tag else {"structures", "triggers"}, "structural_tag")
    rules = _Rules(options, vocabulary, lark)
    return rules.grammar(tag["format"] if "format" in tag else _older(tag))


def _older(tag: Json) -> Json:
    """The older spelling as a format."""
    structures = tag.get("structures")
    if not isinstance(structures, list) or not structures:
        raise RequestError("a structural tag needs a format, or structures and triggers")
    tags = []
    for i, part in enumerate(structures):
        if not isinstance(part, dict):
            raise RequestError(f"structures[{i}] must be an object with begin, schema and end")
        _only(part, {"begin", "schema", "end"}, f"structures[{i}]")
        content = {"type": "json_schema", "json_schema": part.get("schema", {})}
        tags.append({"type": "tag", "begin": part.get("begin"), "content": content, "end": part.get("end", "")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


class _Rules:
    """The rules of one grammar, named as they come."""

    def __init__(self, options: Json, vocabulary: LLTokenizer, lark: Callable[[str], str]) -> None:
        self._options = dict(options)
        self._vocabulary = vocabulary
        self._lark = lark
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []

    def grammar(self, part: Any) -> str:
        start = self._rule(part, "format", last=True)
        text = "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"
        return json.dumps({"grammars": [{"lark_grammar": text}, *self._others]})

    def _add(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _rule(self, part: Any, where: str, last: bool = False) -> str:
        """The name of the rule for a part; ``last`` if nothing follows it."""
        if not isinstance(part, dict):
            raise RequestError(f"{where} must be an object with a type")
        _only_its_fields(part, where)
        match part.get("type"):
            case "const_string":
                return self._add(self._literal(_text(part, "value", where)))
            case "json_schema":
                return self._add(self._json(part.get("json_schema"), where))
            case "regex":
                return self._add(self._terminal(f"/{regex_to_lark(_text(part, 'pattern', where), 'd')}/"))
            case "grammar":
                name = f"other{len(self._others)}"
                self._others.append({"name": name, "lark_grammar": self._lark(_text(part, "grammar", where))})
                return self._add(f"@{name}")
            case "any_text" if last and not part.get("excludes"):
                return self._add(self._terminal(ANY_TEXT))
            case "any_text":
                raise RequestError(f"{where}: any_text must come last or be what a tag holds, and can exclude nothing")
            case "sequence":
                parts = _parts(part, "elements", where)
                rules = [self._rule(p, at, last and p is parts[-1][1]) for at, p in parts]
                return self._add(" ".join(rules))
            case "or":
                return self._add(" | ".join(self._rule(p, at, last) for at, p in _parts(part, "elements", where)))
            case "tag":
                return self._add(self._tag(part, where, self._literal(_text(part, "begin", where))))
            case "triggered_tags":
                return self._triggered(part, where, last)
            case "tags_with_separator":
                return self._separated(part, where)
            case other:
                raise RequestError(f"{where}.type {other!r} is not supported")

    def _tag(self, part: Json, where: str, begin: str) -> str:
        """What a tag is, from ``begin`` on."""
        end = part.get("end", "")
        if isinstance(end, list) and len(end) == 1:
            end = end[0]
        if not isinstance(end, str):
            raise RequestError(f"{where}.end must be a string")
        content, literal = part.get("content"), self._literal(end)
        if not isinstance(content, dict):
            raise RequestError(f"{where}.content must be an object with a type")
        _only_its_fields(content, f"{where}.content")
        if content.get("type") == "any_text" and end and not content.get("excludes"):
            text = self._terminal(ANY_TEXT)
            if literal.startswith("<"):
                return f"{begin} {text} {literal}"
            return f"{begin} {self._add(text, f'[suffix={_quoted(end)}]')}"
        return f"{begin} {self._rule(content, f'{where}.content')} {literal}"

    def _triggered(self, part: Json, where: str, last: bool) -> str:
        """Free text, and tags wherever one of the triggers is in it."""
        triggers = part.get("triggers")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise RequestError(f"{where}: triggers must be a list of strings that are not empty")
        if not last or part.get("excludes"):
            raise RequestError(f"{where}: triggered_tags must come last, and can exclude nothing")
        tags, direct = [], []
        for at, tag in _parts(part, "tags", where):
            _only(tag, FIELDS["tag"], at)
            begin = _text(tag, "begin", at)
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                raise RequestError(f"{at}.begin must start with one of the triggers")
            tags.append(self._add(self._tag(tag, at, self._trigger(trigger, begin))))
            direct.append(self._add(self._tag(tag, at, self._literal(begin))))
        any_tag, rest = " | ".join(tags), self._add(self._terminal(ANY_TEXT))
        if not part.get("at_least_one"):
            return self._add(f"({any_tag})? {rest}" if part.get("stop_after_first") else f"({any_tag})* {rest}")
        first = f"({' | '.join(direct)})"
        return self._add(first if part.get("stop_after_first") else f"{first} (({any_tag})* {rest})")

    def _trigger(self, trigger: str, begin: str) -> str:
        """Any text up to a trigger, and what of ``begin`` is left after it."""
        literal, text = self._literal(trigger), self._terminal(ANY_TEXT)
        if literal.startswith("<"):
            return f"{text} {self._literal(begin)}"
        head = self._add(f"{text} {literal}", "[lazy]")
        return f"{head} {self._literal(begin[len(trigger) :])}"

    def _separated(self, part: Json, where: str) -> str:
        """Tags one after the other."""
        tags = [self._rule({"type": "tag", **tag}, at) for at, tag in _parts(part, "tags", where)]
        one, more = f"({' | '.join(tags)})", self._literal(_text(part, "separator", where))
        body = one if part.get("stop_after_first") else f"{one} ({more} {one})*"
        return self._add(body if part.get("at_least_one") else f"({body})?")

    def _json(self, schema: Any, where: str) -> str:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise RequestError(f"{where}: a JSON schema must be an object")
        return "%json " + json.dumps({**schema, "x-guidance": self._options})

    def _literal(self, text: str) -> str:
        """Text as it stands in a rule, the names of special tokens in it as those tokens."""
        found: list[str] = []
        plain: list[int] = []
        for token in self._vocabulary.tokenize_str(text, parse_special=True):
            if not self._vocabulary.is_special_token(token):
                plain.append(token)
                continue
            found += [_quoted(self._vocabulary.decode_str(plain))] if plain else []
            found.append(f"<[{token}]>")
            plain = []
        found += [_quoted(self._vocabulary.decode_str(plain))] if plain else []
        return " ".join(found)


def _only_its_fields(part: Json, where: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind in FIELDS:
        _only(part, FIELDS[kind], where)


def _only(part: Json, known: Collection[str], where: str) -> None:
    """Raises RequestError for what would be ignored in silence."""
    for name, value in part.items():
        if name != "type" and name not in known and value is not None:
            raise RequestError(f"unknown field {where}.{name}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text(part: Json, name: str, where: str) -> str:
    value = part.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string")
    return value


def _parts(part: Json, name: str, where: str) -> Sequence[tuple[str, Any]]:
    """The parts in a list, each with where it is."""
    value = part.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(p, dict) for p in value):
        raise RequestError(f"{where}.{name} must be a list of objects that is not empty")
    return [(f"{where}.{name}[{i}]", p) for i, p in enumerate(value)]
