"""Calls of tools: every format, however its text is cut, and what is no call after all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pippin.text.json_scanner import JsonScanner
from pippin.text.parts import CallArguments, CallBegin, CallBroken, CallEnd, Part, Reasoning, Text
from pippin.text.reasoning import FORMATS as REASONING
from pippin.text.reply import Reply, Speech
from pippin.text.tools import FORMATS, format_named, format_of
from pippin.text.tools.mlx_formats import reader
from pippin.text.tools.offered import Offered

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object"},
        "flag": {"type": "boolean"},
    },
}
TOOLS = Offered(
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "now"}},
    ]
)
OSLO = {"city": "Oslo", "days": 3, "deep": {"a": [1, None]}, "flag": True}

Call = tuple[str, dict[str, Any]]


def joined(parts: Sequence[Part]) -> list[Part]:
    """Parts with neighbours of a kind made one: what doesn't depend on how the text was cut."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text | Reasoning | CallArguments) and type(last) is type(part):
            assert isinstance(last, Text | Reasoning | CallArguments)
            found[-1] = type(part)(last.text + part.text)
        else:
            found.append(part)
    return found


def parse(reply: Reply, pieces: Sequence[str]) -> list[Part]:
    return joined([part for piece in pieces for part in reply.push(piece)] + reply.finish())


def reply_of(name: str, reasoning: str | None = None, prompt: str = "", tools: Offered | None = TOOLS) -> Reply:
    return Reply(Speech(REASONING[reasoning] if reasoning else None, FORMATS[name]), prompt, tools)


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """Whole calls. Checks that each part is where it may be."""
    found, name, arguments = list[Call](), "", ""
    for part in parts:
        match part:
            case CallBegin(begun, _):
                assert not name
                name, arguments = begun, ""
            case CallArguments(text):
                assert name
                arguments += text
            case CallEnd():
                found.append((name, json.loads(arguments)))
                name = ""
            case CallBroken():
                name = ""
            case _:
                assert not name
    assert not name
    return found


def text_of(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text | CallBroken))


# --- one writer a format: calls to the text that the format has for them ---


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def tagged(begin: str, end: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: "\n".join(f'{begin}{{"name": "{n}", "arguments": {dumps(a)}}}{end}' for n, a in calls)


def plain_value(value: object) -> str:
    return value if isinstance(value, str) else dumps(value)


def qwen3_coder(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        rows = "".join(f"<parameter={k}>\n{plain_value(v)}\n</parameter>\n" for k, v in arguments.items())
        return f"<tool_call>\n<function={name}>\n{rows}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def glm(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        rows = "".join(
            f"<arg_key>{k}</arg_key>\n<arg_value>{plain_value(v)}</arg_value>\n" for k, v in arguments.items()
        )
        return f"<tool_call>{name}\n{rows}</tool_call>"

    return "\n".join(one(*call) for call in calls)


def deepseek(between: str, prefix: str = "", suffix: str = "") -> Callable[[Sequence[Call]], str]:
    def write(calls: Sequence[Call]) -> str:
        rows = [f"<｜tool▁call▁begin｜>{prefix}{n}{between}{dumps(a)}{suffix}<｜tool▁call▁end｜>" for n, a in calls]
        return "<｜tool▁calls▁begin｜>" + "\n".join(rows) + "<｜tool▁calls▁end｜>"

    return write


def deepseek_v32(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        rows = "".join(
            f'<｜DSML｜parameter name="{k}" string="{"true" if isinstance(v, str) else "false"}">'
            f"{plain_value(v)}</｜DSML｜parameter>\n"
            for k, v in arguments.items()
        )
        return f'<｜DSML｜invoke name="{name}">\n{rows}</｜DSML｜invoke>\n'

    return "<｜DSML｜function_calls>\n" + "".join(one(*c) for c in calls) + "</｜DSML｜function_calls>"


def kimi_k2(calls: Sequence[Call]) -> str:
    rows = [
        f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{dumps(a)}<|tool_call_end|>"
        for i, (n, a) in enumerate(calls)
    ]
    return "<|tool_calls_section_begin|>" + "".join(rows) + "<|tool_calls_section_end|>"


def harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{dumps(a)}<|call|>" for n, a in calls
    )


def pythonic(calls: Sequence[Call]) -> str:
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"


def gemma4(calls: Sequence[Call]) -> str:
    def value(v: object) -> str:
        if isinstance(v, dict):
            return "{" + ",".join(f"{k}:{value(w)}" for k, w in v.items()) + "}"
        if isinstance(v, list):
            return "[" + ",".join(map(value, v)) + "]"
        return f'<|"|>{v}<|"|>' if isinstance(v, str) else dumps(v)

    return "".join(f"<|tool_call>call:{n}{value(a)}<tool_call|>" for n, a in calls)


def minimax(calls: Sequence[Call]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        rows = "".join(f'<parameter name="{k}">{plain_value(v)}</parameter>\n' for k, v in arguments.items())
        return f'<invoke name="{name}">\n{rows}</invoke>\n'

    return "<minimax:tool_call>\n" + "".join(one(*c) for c in calls) + "</minimax:tool_call>"


def llama3(calls: Sequence[Call]) -> str:
    return "; ".join(dumps({"name": n, "parameters": a}) for n, a in calls)


def mistral(calls: Sequence[Call]) -> str:
    return "".join(f"{n}[ARGS]{dumps(a)}" for n, a in calls)


def listed(calls: Sequence[Call], key: str = "arguments") -> str:
    return dumps([{"name": n, key: a} for n, a in calls])


WRITERS: dict[str, tuple[str, Callable[[Sequence[Call]], str]]] = {
    "qwen": ("qwen", tagged("<tool_call>\n", "\n</tool_call>")),
    "qwen, a list": ("qwen", lambda calls: f"<tool_call>{listed(calls)}</tool_call>"),
    "qwen3_coder": ("qwen3_coder", qwen3_coder),
    "llama3": ("llama3", llama3),
    "llama3, python tag": ("llama3", lambda calls: "<|python_tag|>" + llama3(calls[:1])),
    "mistral": ("mistral", lambda calls: "[TOOL_CALLS]" + listed(calls)),
    "mistral v11": ("mistral", lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{dumps(a)}" for n, a in calls)),
    "mistral v11, one marker": ("mistral", lambda calls: "[TOOL_CALLS]" + mistral(calls)),
    "deepseek v3": ("deepseekv3", deepseek("\n```json\n", "function<｜tool▁sep｜>", "\n```")),
    "deepseek v3.1": ("deepseekv3", deepseek("<｜tool▁sep｜>")),
    "deepseek v3.2": ("deepseekv32", deepseek_v32),
    "glm": ("glm", glm),
    "kimi_k2": ("kimi_k2", kimi_k2),
    "gpt-oss": ("gpt-oss", harmony),
    "pythonic": ("pythonic", pythonic),
    "pythonic, marked": ("pythonic", lambda calls: f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"),
    "phi4": ("phi4", lambda calls: f"<|tool_call|>{listed(calls)}<|/tool_call|>"),
    "phi4, functools": ("phi4", lambda calls: f"functools{listed(calls)}"),
    "json": ("json", listed),
    "json, fenced": ("json", lambda calls: f"```json\n{listed(calls, 'parameters')}\n```"),
    "gemma4": ("gemma4", gemma4),
    "minimax_m2": ("minimax_m2", minimax),
}  # fmt: skip
SINGLE = {"llama3, python tag"}
AT_START = {"llama3", "llama3, python tag", "pythonic", "json", "json, fenced", "gpt-oss"}

TWO: list[Call] = [("get_weather", OSLO), ("now", {})]


def wanted(name: str, calls: Sequence[Call]) -> list[Call]:
    return [*calls[:1]] if name in SINGLE else [*calls]


@pytest.mark.parametrize("name", WRITERS)
def test_calls_are_found(name: str) -> None:
    format, write = WRITERS[name]
    parts = parse(reply_of(format), [write(TWO)])
    assert calls_of(parts) == wanted(name, TWO)
    assert text_of(parts) == ""


@pytest.mark.parametrize("name", WRITERS)
def test_any_cut_gives_the_same_parts(name: str) -> None:
    """Every place to cut once, and every character alone."""
    format, write = WRITERS[name]
    before = "" if name in AT_START else "Let me look. \n\n"
    text = before + write(TWO)
    whole = parse(reply_of(format), [text])
    assert text_of(whole) == before.rstrip()
    for i in range(len(text) + 1):
        assert parse(reply_of(format), [text[:i], text[i:]]) == whole
    assert parse(reply_of(format), list(text)) == whole


@pytest.mark.parametrize("name", WRITERS)
def test_no_markup_is_ever_shown(name: str) -> None:
    """Cut off anywhere, what was shown as text until then is only the words before the call."""
    format, write = WRITERS[name]
    before = "" if name in AT_START else "Let me look."
    text = before + write(TWO)
    reply = reply_of(format)
    for char in text:
        shown = [p for p in reply.push(char) if isinstance(p, Text | CallBroken)]
        assert all(p.text in before for p in shown)


@pytest.mark.parametrize(
    "name", sorted({format for format, _ in WRITERS.values()} - {"gemma4", "minimax_m2", "pythonic"})
)
def test_arguments_are_streamed(name: str) -> None:
    """Long before the call is whole, what there is of its arguments has been sent."""
    write = next(w for n, (f, w) in WRITERS.items() if f == name)
    text = write([("get_weather", {"city": "x" * 200})])
    reply = reply_of(name)
    parts = joined([p for char in text[: text.index("x" * 200) + 150] for p in reply.push(char)])
    assert isinstance(parts[-1], CallArguments)
    assert parts[-1].text.count("x") >= 140


WORDS = st.text(st.sampled_from("ab<>{}[]\"\\'\n |:,_ü🙂t/"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b c", '"']), inner, max_size=2),
    max_leaves=5,
)
JSON_FORMATS = ["qwen", "llama3", "mistral", "mistral v11", "deepseek v3.1", "kimi_k2", "gpt-oss", "phi4", "json"]


@given(
    name=st.sampled_from(JSON_FORMATS),
    arguments=st.dictionaries(st.sampled_from(["city", "x", 'q"uote']), VALUES, max_size=3),
    data=st.data(),
)
def test_any_arguments_arrive_as_they_are(name: str, arguments: dict[str, Any], data: st.DataObject) -> None:
    format, write = WRITERS[name]
    calls: list[Call] = [("get_weather", arguments)]
    text = write(calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts = parse(reply_of(format), pieces)
    assert calls_of(parts) == calls
    assert parts == parse(reply_of(format), [text])


MARKERS = sorted({m for f in FORMATS.values() for m in f.markers} | {m for f in REASONING.values() for m in f.markers})
FRAGMENTS = st.sampled_from(
    [*MARKERS, '{"name": "get_weather"', '"arguments": {', '"city": ', '"Oslo"', "}", "}}", "{", ", ", "\n", " ", "[",
     "]", "get_weather", "now", "now()", "[now()]", "text", "<function=now>", "</function>", "<parameter=city>",
     "functools",
     "</parameter>", "```json", "```", ";", "\\", "'", " to=functions.now", "analysis", "final", "é"]
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(FORMATS)),
    reasoning=st.none() | st.sampled_from(sorted(REASONING)),
    fragments=st.lists(FRAGMENTS, max_size=14),
    data=st.data(),
)
def test_any_text_cut_anywhere_gives_the_same_parts(
    name: str, reasoning: str | None, fragments: list[str], data: st.DataObject
) -> None:
    """Nothing fails, nothing depends on cuts, and calls that end are whole."""
    text = "".join(fragments)
    whole = parse(reply_of(name, reasoning), [text])
    calls_of(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(reply_of(name, reasoning), pieces) == whole
    assert parse(reply_of(name, reasoning), list(text)) == whole


# --- what is no call ---

BROKEN = {
    "qwen": [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": }}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os',
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        "<tool_call>get_weather</tool_call>",
        "<tool_call>",
    ],
    "qwen3_coder": ["<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo", "<tool_call>x</tool_call>"],
    "deepseekv3": [deepseek("<｜tool▁sep｜>")([("no", {})]).removesuffix("<｜tool▁calls▁end｜>")],
    "kimi_k2": [kimi_k2([("no", {})]).removesuffix("<|tool_calls_section_end|>")],
    "mistral": [
        "[TOOL_CALLS]no[ARGS]{}",
        "[TOOL_CALLS]get_weather[ARGS]{",
        "[TOOL_CALLS]get_weather",
        '[TOOL_CALLS][{"name": "no"}]',
    ],
    "llama3": ['{"name": "get_weather", "parameters": {"city"', '{"answer": 42}', "[1, 2]"],
    "glm": ["<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Os", "<tool_call>no</tool_call>"],
    "pythonic": ["[get_weather(city=f())]", "[no()]", "[1, 2]", "[get_weather(city='Os"],
    "json": ['[{"name": "get_weather", "arguments": {}}, {"name": 1}]'],
    "gemma4": ["<|tool_call>call:get_weather{city<tool_call|>", "<|tool_call>call:now{}"],
    "phi4": ["functools are fine", "<|tool_call|>[]<|/tool_call|>"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_a_broken_call_is_text_as_it_was_written(name: str, text: str) -> None:
    parts = parse(reply_of(name), ["I see. ", text] if name not in AT_START else [text])
    whole = [call for call in calls_of(parts) if name != "json"]
    assert whole == []
    if name != "json":
        for section in ("<｜tool▁calls▁begin｜>", "<|tool_calls_section_begin|>"):  # says nothing by itself
            text = text.replace(section, "")
        assert text_of(parts) == ("" if name in AT_START else "I see. ") + text


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("text", ["Hello, world.", "  1 < 2 and {x} or [y] \n", "", "\n", "a\n\n b "])
def test_ordinary_text_is_left_alone(name: str, text: str) -> None:
    assert text_of(parse(reply_of(name), list(text))) == text


def test_other_json_is_streamed_and_not_held_back() -> None:
    reply = reply_of("llama3")
    shown = text_of(joined([p for char in '{"answer": "forty' for p in reply.push(char)]))
    assert shown == '{"answer": "forty'


def test_special_tokens_of_a_broken_call_are_not_shown() -> None:
    speech = Speech(None, FORMATS["kimi_k2"], {m: i for i, m in enumerate(FORMATS["kimi_k2"].markers)})
    text = "Well. <|tool_calls_section_begin|><|tool_call_begin|>no<|tool_call_end|><|tool_calls_section_end|>"
    assert text_of(parse(Reply(speech, "", TOOLS), list(text))) == "Well. no"


def test_text_between_calls_stays_and_white_space_round_them_goes() -> None:
    text = 'One: \n<tool_call>{"name": "now"}</tool_call>\n\nand two\n<tool_call>{"name": "now"}</tool_call>\n'
    parts = parse(reply_of("qwen"), [text])
    assert [type(p) for p in parts if isinstance(p, Text | CallBegin)] == [Text, CallBegin, Text, CallBegin]
    assert text_of(parts) == "One:and two"


def test_kimis_ids_are_the_models_own() -> None:
    parts = parse(reply_of("kimi_k2"), [kimi_k2(TWO)])
    assert [p.id for p in parts if isinstance(p, CallBegin)] == ["functions.get_weather:0", "functions.now:1"]


# --- reasoning ---


@pytest.mark.parametrize("name", sorted(set(REASONING) - {"gpt-oss"}))
@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_is_told_apart(name: str, opened: bool) -> None:
    format = REASONING[name]
    prompt = f"assistant\n{format.begin}\n" if opened else "assistant\n"
    text = f"{'' if opened else format.begin}\nLet me think.\n\nYes.\n{format.end}\n\nHello <b> "
    for pieces in ([text], list(text)):
        parts = parse(reply_of("qwen", name, prompt), pieces)
        assert parts == [Reasoning("Let me think.\n\nYes."), Text("Hello <b>"), Text(" ")] or parts == [
            Reasoning("Let me think.\n\nYes."),
            Text("Hello <b> "),
        ]


def test_reasoning_that_never_ends_is_all_reasoning() -> None:
    assert parse(reply_of("qwen", "qwen3"), ["<think>\nhm </thi"]) == [Reasoning("hm </thi")]
    assert parse(reply_of("qwen", "qwen3", "a<think>"), ["hm"]) == [Reasoning("hm")]
    assert parse(reply_of("qwen", "deepseek-r1"), ["hm</think>so"]) == [Reasoning("hm"), Text("so")]


def test_an_answer_without_reasoning_is_text() -> None:
    assert text_of(parse(reply_of("qwen", "qwen3"), list("\n I <think> so"))) == "\n I <think> so"
    closed = "<think>\n\n</think>\n\n"
    assert parse(reply_of("qwen", "deepseek-r1", closed), ["so"]) == [Text("so")]


def test_calls_behind_reasoning_are_found_and_none_inside() -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    parts = parse(reply_of("qwen", "qwen3"), list(f"<think>say {call}?</think>\n{call}"))
    assert parts[0] == Reasoning(f"say {call}?")
    assert calls_of(parts) == [("now", {})]


HARMONY = (
    "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary<|message|>I will look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'
)


def test_harmony() -> None:
    reply = Reply(Speech(REASONING["gpt-oss"], FORMATS["gpt-oss"]), "", TOOLS)
    whole = parse(reply, [HARMONY])
    assert whole[:2] == [Reasoning("I think."), Text("I will look.")]
    assert calls_of(whole) == [("now", {"a": 1})]
    for i in range(len(HARMONY)):
        again = Reply(Speech(REASONING["gpt-oss"], FORMATS["gpt-oss"]), "", TOOLS)
        assert parse(again, [HARMONY[:i], HARMONY[i:]]) == whole
    final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>"
    assert parse(reply_of("gpt-oss", tools=None), list(final)) == [Reasoning("hm"), Text("Hi.")]


# --- which format ---


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("{% for tool in tools %}<tool_call>\\n<function=x>", "qwen3_coder"),
        ("tools <tool_call> {{ tool_call.name }}", "qwen"),
        ("tools [TOOL_CALLS]", "mistral"),
        ("tools <arg_key>", "glm"),
        ("tools <|channel|> <|message|>", "gpt-oss"),
        ("tools Environment: ipython", "llama3"),
        ("tools <｜tool▁call▁begin｜>", "deepseekv3"),
        ("tools in a way that nobody knows", "json"),
        ("messages only", None),
    ],
)
def test_the_template_tells_the_format(words: str, name: str | None) -> None:
    found = format_of(words)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    "name",
    ["qwen25", "qwen", "qwen3_coder", "llama3", "mistral", "deepseekv3", "deepseekv31", "deepseekv32", "glm", "glm45",
     "glm47", "gpt-oss", "kimi_k2", "pythonic", "minimax-m2", "interns1", "hermes"],
)  # fmt: skip
def test_sglangs_names_are_known(name: str) -> None:
    assert format_named(name) is not None


# --- JSON ---


@given(value=VALUES, cut=st.integers(0, 200))
def test_the_json_scanner_takes_all_of_a_value_and_no_more(value: object, cut: int) -> None:
    text = json.dumps(value, indent=cut % 3 or None)
    scanner = JsonScanner()
    taken = scanner.feed(text[:cut])
    taken += scanner.feed(text[cut:] + "\n, more")
    assert scanner.done
    assert text[:taken] == text


@st.composite
def almost_json(draw: st.DrawFn) -> str:
    """A JSON text with a character more, less or other."""
    text = json.dumps(draw(VALUES))
    at = draw(st.integers(0, len(text)))
    other: str = draw(st.sampled_from(["", *'{}[]:,"\\1e.-t \n']))
    return text[:at] + other + text[at + draw(st.integers(0, 1)) :]


@given(almost_json() | st.text(st.sampled_from('{}[]:,"\\ab1e.-0tnul \n'), max_size=14))
@example('{"a": 1,}')
@example("[1,]")
@example('{"a" 1}')
@example("[01]")
@example('"\t"')
def test_the_json_scanner_agrees_with_python(text: str) -> None:
    scanner = JsonScanner()
    taken = scanner.feed(text)
    try:
        json.loads(text)
        valid = True
    except ValueError:
        valid = False
    whole = taken == len(text) and scanner.could_end
    whole = whole or (scanner.done and not text[taken:].strip(" \t\r\n"))
    assert whole == valid


# --- beside mlx-lm's parsers, which we did not write ---

MLX_LM = {
    "qwen": ("json_tools", "<tool_call>", "</tool_call>"),
    "qwen3_coder": ("qwen3_coder", "<tool_call>", "</tool_call>"),
    "glm": ("glm47", "<tool_call>", "</tool_call>"),
    "kimi_k2": ("kimi_k2", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    "mistral": ("mistral", "[TOOL_CALLS]", ""),
    "mistral v11": ("mistral", "[TOOL_CALLS]", ""),
    "pythonic, marked": ("pythonic", "<|tool_call_start|>", "<|tool_call_end|>"),
}
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text(st.sampled_from("abü '.-"), min_size=1, max_size=8).map(str.strip).filter(bool),
        "days": st.integers(-99, 99),
        "flag": st.booleans(),
        "deep": st.dictionaries(st.sampled_from("ab"), st.integers(0, 9) | st.booleans(), max_size=2),
    },
)


@given(name=st.sampled_from(sorted(MLX_LM)), arguments=ARGUMENTS.filter(bool))
def test_calls_are_what_mlx_lm_finds(name: str, arguments: dict[str, Any]) -> None:
    module, begin, end = MLX_LM[name]
    format, write = WRITERS[name]
    text = write([("get_weather", arguments)])
    inner = text.removeprefix(begin).removesuffix(end)
    found = reader(module)(inner, TOOLS.list)
    theirs = [(call["name"], call["arguments"]) for call in (found if isinstance(found, list) else [found])]
    assert calls_of(parse(reply_of(format), [text])) == theirs
