"""Messages to prompts, and what a template's refusal looks like to a client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import ConfigError, RequestError
from pippin.text.chat import ChatTemplate, read_template
from pippin.text.tokenizer import Tokenizer
from tests.tokenizers_for_tests import CHATML, byte_level, chat_tokenizer, fallback

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(source: str | None = None) -> ChatTemplate:
    return ChatTemplate(byte_level(), source)


def test_renders_roles_in_order() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "tool", "content": "ok", "tool_call_id": "x"},
    ]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert chat().render(messages) == expected + "<|im_start|>assistant\n"
    assert chat().render(messages, add_generation_prompt=False) == expected


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_text_parts_are_joined_with_newlines(texts: list[str]) -> None:
    parts = [{"type": "text", "text": t} for t in texts]
    as_text = chat().render([{"role": "user", "content": "\n".join(texts)}])
    assert chat().render([{"role": "user", "content": parts}]) == as_text


def test_special_tokens_of_the_template_are_tokens() -> None:
    ids = chat().encode(HELLO)
    start = byte_level().encode("<|im_start|>")[0]
    assert ids[0] == start
    assert ids.count(start) == 2


def test_developer_is_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert chat().render(messages).startswith("<|im_start|>system\n")
    knows = "{% for m in messages %}{{ m.role if m.role == 'developer' else 'no' }}{% endfor %}"
    assert chat(knows).render(messages) == "developer"


def test_tools_and_calls_reach_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}
    messages: list[dict[str, Any]] = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = chat().render(messages, tools=[TOOL])
    assert text.startswith("<|im_start|>tools\n" + json.dumps([TOOL]))
    assert '[add {"a": 1, "b": "é"}]' in text
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": "é"}'}, "the client's message is untouched"
    assert "tools" not in chat().render(messages, tools=[])


def test_empty_arguments_are_an_empty_object() -> None:
    call = {"function": {"name": "now", "arguments": ""}}
    assert "[now {}]" in chat().render([{"role": "assistant", "tool_calls": [call]}])


def test_a_tokenizers_template_for_tools_is_used() -> None:
    hf = chat_tokenizer()
    hf.chat_template = {"default": "plain", "tool_use": "with tools"}
    both = ChatTemplate(Tokenizer(hf))
    assert both.render(HELLO) == "plain"
    assert both.render(HELLO, tools=[TOOL]) == "with tools"
    hf.chat_template = {"rag": "x", "other": "y"}
    with pytest.raises(RequestError, match="multiple chat templates"):
        both.render(HELLO)


def test_template_kwargs() -> None:
    assert chat().render(HELLO, chat_template_kwargs={"quiet": True}).endswith("assistant\nshh\n")


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "tokenize", "add_generation_prompt"])
def test_template_kwargs_may_not_take_over(name: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        chat().render(HELLO, chat_template_kwargs={name: "x"})
    assert caught.value.field == "chat_template_kwargs"


def test_the_last_message_can_be_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    text = chat().render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant\nThe answer is ")
    with pytest.raises(RequestError) as caught:
        chat().render(messages, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": "x"}, "messages[1].role"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": 3}, "messages[1].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_bad_messages_are_named(message: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat().render([*HELLO, message])
    assert caught.value.field == field


def test_no_messages() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        chat().render([])


# --- templates that fail, templates that attack ---


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{% broken",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
    ],
)
def test_template_errors_are_request_errors(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(source).render(HELLO)
    assert caught.value.field == "messages"
    assert caught.value.status == 400


def test_a_templates_own_words_reach_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}").render(HELLO)


def test_no_template_says_how_to_give_one() -> None:
    with pytest.raises(RequestError, match="--chat-template FILE"):
        ChatTemplate(fallback()).render(HELLO)


def test_template_files(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "chat.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "bad.json").write_text("[]")
    assert read_template(str(tmp_path / "chat.jinja")) == CHATML
    assert read_template(str(tmp_path / "chat.json")) == CHATML
    assert ChatTemplate(fallback(), CHATML).render(HELLO).startswith("<|im_start|>user\nHello")
    (tmp_path / "broken.jinja").write_text("{% if messages %}\n{{ messages[0] }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"broken.jinja is no Jinja template: line 2: .*endfor"):
        read_template(str(tmp_path / "broken.jinja"))
    for name in ("bad.json", "missing.jinja"):
        with pytest.raises(ConfigError) as caught:
            read_template(str(tmp_path / name))
        assert caught.value.option == "--chat-template"


MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}"


def test_a_broken_template_is_known_before_anybody_chats() -> None:
    assert chat().fault() is None
    assert chat(MARKED).fault() is None
    assert chat(MARKED).render(HELLO) == "Hello"
    assert ChatTemplate(fallback()).fault() is None
    tokenizer = byte_level()
    tokenizer.hf.chat_template = {"default": CHATML, "tool_use": "{{ messages"}
    assert "line 1" in str(ChatTemplate(tokenizer).fault())
    assert ChatTemplate(tokenizer, CHATML).fault() is None
