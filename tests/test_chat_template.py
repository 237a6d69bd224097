"""Chat templates: the same ids as transformers', no control token from what a user types, no template that runs for ever."""

# ruff: noqa: E501  templates as they are published
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_tokenizer import (
    llama2_model,
    llama3_model,
    transformers_llama2,
    transformers_llama3,
    transformers_mistral3,
    transformers_qwen,
    write_json,
)
from transformers.utils.chat_template_utils import render_jinja_template

import chat_template
from chat_template import CHATML, LLAMA2, LLAMA3, MISTRAL, ChatTemplate, render
from tokenizer import load_tokenizer

# ---------------------------------------------------------------- templates as checkpoints have them

LLAMA3_PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token +"
    " content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31_PUBLISHED = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2_PUBLISHED = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = "
    "'<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_PUBLISHED = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial system message!') }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL3_PUBLISHED = """{{- bos_token }}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
CHATML_PUBLISHED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25_PUBLISHED = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_LIKE = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' ~ tool_call.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "  Hello,\nworld! 👋 \n")],
    [("system", "Be brief."), ("user", "What is 2 + 2?")],
    [
        ("user", "def f(x):\n\treturn x"),
        ("assistant", " It returns x.\n"),
        ("user", "如何?"),
        ("assistant", "So."),
        ("user", "a <b> [c]"),
    ],
    [
        ("system", " Sprich Deutsch. "),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "4\n\n"),
        ("user", "5 </div>"),
    ],
    [("user", "What is it?"), ("assistant", "An answer that ends the conversation")],
    [("user", ""), ("assistant", ""), ("user", "<|"), ("assistant", "<|eot|> <"), ("user", "\n")],
]


def messages_of(conversation):
    return [{"role": role, "content": content} for role, content in conversation]


FAMILIES = {  # name: the tokenizer, its published templates
    "llama3": ("llama3", [LLAMA3_PUBLISHED, LLAMA31_PUBLISHED]),
    "llama2": ("llama2", [LLAMA2_PUBLISHED]),
    "mistral": ("llama2", [MISTRAL_PUBLISHED]),
    "mistral3": ("mistral3", [MISTRAL3_PUBLISHED]),
    "chatml": ("qwen", [CHATML_PUBLISHED, QWEN25_PUBLISHED, QWEN3_LIKE]),
}


def make(kind, directory, real=False):
    """A checkpoint's directory and transformers' tokenizer for it."""
    if kind == "llama3":
        return transformers_llama3(llama3_model(directory, real))
    if kind == "llama2":
        return transformers_llama2(llama2_model(directory, real))
    reference = transformers_qwen() if kind == "qwen" else transformers_mistral3(llama2_model(directory / "pieces", real))
    reference.save_pretrained(directory)
    return reference


@pytest.fixture(scope="module", params=["llama3", "llama2", "mistral3", "qwen"])
def small(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return load_tokenizer(directory) if make(request.param, directory) else None


def with_template(directory, template):
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return load_tokenizer(directory)


def count_bos(tokenizer, ids):
    return sum(i == tokenizer.bos_id for i in ids)


# ---------------------------------------------------------------- the same ids as transformers'


@pytest.mark.parametrize(
    ("family", "size"),
    [(family, size) for family in FAMILIES for size in ("small", "real") if (family, size) != ("chatml", "real")],
)
def test_ids_are_transformers(family, size, tmp_path):
    kind, templates = FAMILIES[family]
    reference = make(kind, tmp_path, real=size == "real")
    for template in templates:
        tokenizer = with_template(tmp_path, template)
        assert tokenizer.template == template
        for conversation in CONVERSATIONS:
            messages = messages_of(conversation)
            for prompt in (True, False):
                expected = reference.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=prompt, tokenize=True, return_dict=False
                )
                ids = tokenizer.encode_chat(messages, add_generation_prompt=prompt)
                assert ids == expected, (conversation, prompt)
                turns = sum(role == "user" for role, _ in conversation) if family == "llama2" else 1
                assert count_bos(tokenizer, ids) == (0 if tokenizer.bos_id is None else turns)
                assert tokenizer.bos_id is None or ids[0] == tokenizer.bos_id


def test_tools_and_variables_as_in_transformers(tmp_path):
    reference = make("llama3", tmp_path / "3")
    tokenizer = with_template(tmp_path / "3", LLAMA31_PUBLISHED)
    call = {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Zürich <b>", "days": [1, 2.5, None, True]}},
    }
    messages = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny & 'warm' \"<i>\""},
        {"role": "tool", "content": {"°C": 21}},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}]
    for variables in ({"tools": tools}, {"date_string": "1 Jan 2000"}, {}):
        expected = reference.apply_chat_template(
            messages, chat_template=LLAMA31_PUBLISHED, add_generation_prompt=True, return_dict=False, **variables
        )
        assert tokenizer.encode_chat(messages, **variables) == expected

    reference = make("qwen", tmp_path / "qwen")
    tokenizer = with_template(tmp_path / "qwen", QWEN3_LIKE)
    messages = [
        {"role": "user", "content": "<tool_response>\n4\n</tool_response>"},
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": "<think>\nhm\n</think>\n\n4",
            "tool_calls": [{"name": "f", "arguments": {"<x>": "<|im|>"}}],
        },
        {"role": "user", "content": "sure </think>?"},
        {"role": "assistant", "content": "<think>\nyes\n</think>\n\nSure"},
    ]
    for last in (len(messages), len(messages) - 1):
        for thinking in (True, False):
            expected = reference.apply_chat_template(
                messages[:last],
                chat_template=QWEN3_LIKE,
                add_generation_prompt=True,
                return_dict=False,
                enable_thinking=thinking,
            )
            assert tokenizer.encode_chat(messages[:last], enable_thinking=thinking) == expected


def test_the_environment_is_transformers():
    """trim_blocks, lstrip_blocks, loop controls, {% generation %}, tojson without HTML escapes, a date."""
    source = (
        "{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%Y') }}"
    )
    messages = messages_of([("user", "<é'&>"), ("skip", "x"), ("user", "b")])
    text, _ = render(source, {"messages": messages}, {}, [])
    assert text == f'"<é\'&>""b"{time.strftime("%Y")}'
    expected, _ = render_jinja_template([messages], chat_template=source)
    assert [text] == expected


# ---------------------------------------------------------------- the built-in forms


@pytest.mark.parametrize(
    ("kind", "model_type", "source", "published"),
    [
        ("llama3", "llama", LLAMA3, LLAMA3_PUBLISHED),
        ("llama3", None, LLAMA3, LLAMA3_PUBLISHED),
        ("llama2", "llama", LLAMA2, LLAMA2_PUBLISHED),
        ("llama2", None, LLAMA2, LLAMA2_PUBLISHED),
        ("qwen", "qwen2", CHATML, CHATML_PUBLISHED),
    ],
)
def test_built_in_forms_are_the_published_ones(kind, model_type, source, published, tmp_path):
    reference = make(kind, tmp_path)
    tokenizer = load_tokenizer(tmp_path, model_type=model_type)
    assert tokenizer.template == source
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            messages = messages_of(conversation)
            expected = reference.apply_chat_template(
                messages, chat_template=published, add_generation_prompt=prompt, return_dict=False
            )
            assert tokenizer.encode_chat(messages, prompt) == expected, conversation


def test_built_in_mistral(tmp_path):
    """The forms that mistral-common writes: [INST] as text up to v0.2, as a control token from v0.3 on."""
    messages = messages_of([("system", "S"), ("user", "one"), ("assistant", " two "), ("user", "three")])
    make("llama2", tmp_path / "2")
    tokenizer = load_tokenizer(tmp_path / "2", model_type="mistral")
    assert tokenizer.template == MISTRAL
    text, mark = tokenizer.chat.render(messages)
    assert text.replace(mark, "") == "<s>[INST] S\n\none [/INST] two</s>[INST] three [/INST]"
    make("mistral3", tmp_path / "3")
    tokenizer = load_tokenizer(tmp_path / "3", model_type="mistral")
    text, mark = tokenizer.chat.render(messages)
    assert text.replace(mark, "") == "<s>[INST] S\n\none[/INST] two</s>[INST] three[/INST]"
    names = ("[INST]", "[/INST]", "<s>", "</s>")
    counts = {name: tokenizer.encode_chat(messages).count(tokenizer.special_tokens[name]) for name in names}
    assert counts == {"[INST]": 2, "[/INST]": 2, "<s>": 1, "</s>": 1}


@pytest.mark.parametrize(("kind", "model_type"), [("llama2", "llama"), ("llama2", "mistral")])
def test_roles_must_alternate(kind, model_type, tmp_path):
    make(kind, tmp_path)
    tokenizer = load_tokenizer(tmp_path, model_type=model_type)
    for conversation in ([("user", "a"), ("user", "b")], [("assistant", "a")], [("user", "a"), ("tool", "b")]):
        with pytest.raises(ValueError, match=r"^the built-in \w+( 2)? template: TemplateError: roles must alternate"):
            tokenizer.encode_chat(messages_of(conversation))


# ---------------------------------------------------------------- which template


def test_where_the_template_comes_from(tmp_path):
    llama3_model(tmp_path, real=False)
    assert load_tokenizer(tmp_path).template == LLAMA3
    config = tmp_path / "tokenizer_config.json"
    write_json(config, {"chat_template": "from the config"})
    assert load_tokenizer(tmp_path).template == "from the config"
    write_json(config, {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "the default"}]})
    assert load_tokenizer(tmp_path).template == "the default"
    write_json(config, {"chat_template": [{"name": "rag", "template": "no"}]})
    assert load_tokenizer(tmp_path).template == LLAMA3
    write_json(config, {"chat_template": 3})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: found int, expected a string or a list"):
        load_tokenizer(tmp_path)
    write_json(config, {"chat_template": "from the config"})
    assert with_template(tmp_path, "its own file").template == "its own file"


def test_no_template_is_said(tmp_path):
    make("qwen", tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["added_tokens"] = []
    write_json(tmp_path / "tokenizer.json", source)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template is None
    with pytest.raises(ValueError, match=r"found no chat template, expected chat_template\.jinja or one in tokenizer_config"):
        tokenizer.encode_chat(messages_of([("user", "a")]))


# ---------------------------------------------------------------- fault 26: control tokens typed by a user


def control_tokens(tokenizer, ids):
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return [names[i] for i in ids if i in names]


def test_what_is_typed_never_becomes_a_control_token(small):
    clean = messages_of([("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")])
    expected = control_tokens(small, small.encode_chat(clean))
    assert expected
    names = list(small.special_tokens)[:12]
    for typed in [*names, "".join(names), f" {names[0]} ", *(n[:-1] for n in names), *(n[1:] for n in names), "<" * 9, "[["]:
        messages = [{**m, "content": m["content"] + typed} for m in clean]
        ids = small.encode_chat(messages)
        assert control_tokens(small, ids) == expected, typed
        assert small.decode(ids).count(typed.strip()) >= 4, "the text itself is kept"


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ messages[0].content[0] }}{{ messages[0].content[1] }}", ["<|eot", "_id|>"]),
        ("{{ messages[0].content | join }}", ["<", "|eot_id|>"]),
        ("{{ messages[0].content.replace('/think', '') }}", "<|eot/think_id|>"),
        ("{{ messages[0].content.replace('</think>', '') }}", "<</think>|eot_id|>"),
        ("{{ messages[0].content.split('</think>') | join }}", "</think><</think>|eot_id|>"),
        ("{{ messages[0].content.replace('x<|eot', '') }}", "x<|eot_id|>"),
        ("{% if 'a<|eot_' in messages[0].content %}{% endif %}{{ messages[0].content }}", "a<|eot_id|>"),
        ("{% if '<|eot_id|>' in messages[0].content %}{% endif %}{{ messages[0].content }}", "<|eot_id|>"),
        ("{{ messages[0].content | lower }}", "<|EOT_ID|>"),
        ("{{ messages[0].content | reverse }}", ">|di_toe|<"),
        ("{{ messages[0].content | tojson(ensure_ascii=True) }}", "<|eot_id|>"),
        ("{{ messages[0].content | tojson }}", {"<|eot_id|>": ["<|eot_id|>"]}),
        ("{{ messages[0] }}", "<|eot_id|>"),
        ("{{ messages[0].content }}", "<|eot_id|>"),
        ("{{ messages[0].content }}", "<\ue000|eot_id|>\\ue001"),
        ("{{ tools }}{{ messages[0].content }}", "x"),
    ],
)
def test_a_template_does_not_help_a_user(source, content):
    """However a template cuts and joins, a control token needs a first character of the template's own."""
    variables = {"messages": [{"role": "user", "content": content}], "tools": ["<|eot_id|>"]}
    control = ["<|eot_id|>", "<|eot_other|>"]
    plain, mark = render(source + "{{ '<|eot_id|>' }}", variables, {}, control)
    assert plain.count("<|eot_id|>") == (2 if "reverse" in source else 1), "only the last one"
    assert "\\u" not in plain or "\\ue001" in plain
    assert mark not in json.dumps(variables, ensure_ascii=False)


def test_named_tokens_are_control_tokens():
    text, _ = render(
        "{{ bos_token }}{{ messages[0].content }}", {"messages": [{"content": "<s>"}]}, {"bos_token": "<s>"}, ["<s>"]
    )
    assert text.count("<s>") == 1
    assert text.startswith("<s>")


# ---------------------------------------------------------------- fault 27: hostile templates


def template_of(source, **more):
    return ChatTemplate(source, "chat_template.jinja", {}, ["<s>"], **more)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ cycler.__init__.__globals__ }}", "SecurityError: access to attribute '__init__'"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError: access to attribute '__init__'"),
        (
            "{{ raise_exception.__globals__ }}",
            "SecurityError: access to attribute '__globals__' of 'function' object is unsafe",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: .* is not safely callable|SecurityError: access to attribute 'append'"),
        ("{{ messages[0].update({'role': 1}) }}", "SecurityError: access to attribute 'update'"),
        ("{{ '{0.__class__}'.format(1) }}", "SecurityError: access to attribute '__class__'"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
        ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
        ("{{ 'x' * 10**11 }}", "MemoryError"),
        (
            "{% set ns = namespace(x='x' * 2**20) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "MemoryError|no end after",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError|its process died"),
        ("{{ raise_exception('one\nline') }}", "TemplateError: one line$"),
    ],
)
def test_hostile_templates_are_refused(source, message):
    template = template_of(source)
    with pytest.raises(ValueError, match=f"^chat_template.jinja: .*({message})") as error:
        template.render(messages_of([("user", "a")]))
    assert "\n" not in str(error.value)


NESTED_RANGE = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("source", [NESTED_RANGE, "{{ (messages | length * 9) ** (9**9) }}"])
def test_the_time_limit_is_real(source):
    """Also within one call that never comes back to the interpreter."""
    template = template_of("{% if messages[0].content == 'go' %}ok{% else %}" + source + "{% endif %}", time_limit_sec=1.0)
    assert template.render(messages_of([("user", "go")]))[0] == "ok"
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^chat_template\.jinja: found no end after 1 s, expected a template that renders$"):
        template.render(messages_of([("user", "stop")]))
    assert 0.9 < time.monotonic() - start < 3
    assert template.render(messages_of([("user", "go")]))[0] == "ok", "the next one gets a new process"


@pytest.fixture
def children(monkeypatch):
    """The processes that a test starts."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    return started


def test_no_child_is_left_behind(children):
    template = template_of(NESTED_RANGE, time_limit_sec=0.5)
    with pytest.raises(ValueError, match="no end after"):
        template.render(messages_of([("user", "a")]))
    with pytest.raises(ValueError, match="no end after"):  # before it is even rendered: jinja2 folds constants
        template_of("{{ 9**(9**9) }}", time_limit_sec=0.5).render(messages_of([("user", "a")]))
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2
    template = template_of("ok")
    template.render(messages_of([("user", "a")]))
    assert children[2].poll() is None
    del template
    assert children[2].returncode == -signal.SIGKILL, "a template takes its process with it"


def test_a_child_that_died_is_said_and_replaced():
    template = template_of("ok")
    template.render(messages_of([("user", "a")]))
    template._child.kill()
    template._child.wait()
    with pytest.raises(ValueError, match=r"found that its process died, expected a template that renders"):
        template.render(messages_of([("user", "a" * 10**6)]))
    assert template.render(messages_of([("user", "a")]))[0] == "ok"


def test_an_interrupted_answer_is_not_the_next_ones(monkeypatch):
    """Ctrl-C while the child works: its late answer must not be taken for the next question's."""
    template = template_of("{{ messages[0].content }}")
    template.render(messages_of([("user", "one")]))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(template._child, "stdout", type("Pipe", (), {"readline": interrupted, "close": lambda self: None})())
    with pytest.raises(KeyboardInterrupt):
        template.render(messages_of([("user", "two")]))
    assert template.render(messages_of([("user", "three")]))[0] == "three"


def test_threads_get_their_own_answers():
    template = template_of("{{ messages[0].content }}")
    wrong = []

    def ask(name):
        wrong.extend(name for _ in range(20) if template.render(messages_of([("user", name)]))[0] != name)

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_program_ends_with_its_input():
    """A parent that is killed leaves no process behind."""
    done = subprocess.run([sys.executable, chat_template.__file__], input="", text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "messages",
    [
        *([], None, "hi", ["hi"], [{"content": "no role"}], [{"role": "user"}], [{"role": "user", "content": {1, 2}}]),
        *([{"role": "user", "content": "a"}, {"role": 5, "content": "a"}],),
    ],
)
def test_messages_are_checked(messages):
    with pytest.raises(ValueError, match=r"^messages: found .*, expected (a list|plain JSON)"):
        template_of("x").render(messages)
    with pytest.raises(ValueError, match="expected plain JSON"):
        template_of("x").render(messages_of([("user", "a")]), tools=[object()])


@pytest.mark.parametrize("content", [None, 5, [], ["a", {"b": 1}], [{"type": "text", "text": "a"}]], ids=str)
@pytest.mark.parametrize("source", ["LLAMA3", "CHATML", "LLAMA2", "MISTRAL"])
def test_built_in_forms_want_texts(source, content):
    """What is none would be written as Python has it. A checkpoint's own template decides for itself."""
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    with pytest.raises(ValueError, match=r"found content .*, expected a text"):
        template_of(getattr(chat_template, source)).render(conversation)
    with pytest.raises(ValueError, match=r"found content null, expected a text"):
        template_of(getattr(chat_template, source)).render([{"role": "user", "tool_calls": []}])
    assert template_of("{{ messages[1]['content'] is none }}").render(conversation)[0] == str(content is None)


def test_a_lone_surrogate_in_a_message(tmp_path):
    llama3_model(tmp_path, real=False)
    with pytest.raises(ValueError, match="lone surrogate"):
        load_tokenizer(tmp_path).encode_chat(messages_of([("user", "a\ud83d")]))


def test_an_answer_without_end_is_refused(monkeypatch):
    """40 MB of text, which the template makes in a moment and the tokenizer would chew on for minutes."""
    template = template_of("{{ 'x' * 40000000 }}", time_limit_sec=60)
    with pytest.raises(ValueError, match=r"^chat_template\.jinja: found more than 16777216 characters, expected a template"):
        template.render(messages_of([("user", "a")]))


ESCAPED = """
import chat_template, socket
chat_template.restrict()
def attempt(what):
    try:
        what()
    except OSError as error:
        print(error.strerror)
attempt(lambda: open("/etc/passwd"))
attempt(lambda: open("mark", "w"))
attempt(socket.socket)
try:
    bytearray(2**31)
except MemoryError:
    print("MemoryError")
"""


def test_what_would_escape_the_sandbox_finds_nothing_to_open(tmp_path):
    """Code that runs in the child outside jinja2's sandbox opens no file and no socket, and takes no memory."""
    env = {"PYTHONPATH": str(Path(chat_template.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", ESCAPED], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines() == ["Too many open files"] * 3 + ["MemoryError"], done.stderr
    assert list(tmp_path.iterdir()) == []
