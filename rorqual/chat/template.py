"""The chat format as a Jinja template, for every tool that calls one: written beside a checkpoint on export.

It renders what `encode` writes wherever a template can say it. It can't parse JSON, so arguments must be mappings (as
transformers asks, and as vLLM and SGLang make them); it checks less; and it writes the generation prompt after every user
message and tool result, whatever add_generation_prompt says, as the format has no turn without one.
Variables: messages, tools and response_format (beside the messages or on them), thinking or enable_thinking (default true),
drop_thinking (default true).
"""

from __future__ import annotations

import json

from rorqual.chat.markers import ASSISTANT, BOS, CLOSE, END_THINK, EOS, OPEN, RESERVED, THINK, USER, escape_markers
from rorqual.chat.prompts import DEVELOPER, RESPONSE_FORMAT, TOOLS_HEAD, TOOLS_TAIL

FILE = "chat_template.jinja"

_TEMPLATE = r"""
{%- set thinking = thinking if thinking is defined else (enable_thinking if enable_thinking is defined else true) -%}
{%- set drop_thinking = drop_thinking if drop_thinking is defined else true -%}
{%- set request_tools = tools if tools is defined and tools else none -%}
{%- set request_format = response_format if response_format is defined and response_format else none -%}
{%- set reserved = @RESERVED@ -%}

{%- macro text(content) -%}
  {%- set found = namespace(text='') -%}
  {%- if content is none -%}
  {%- elif content is string -%}{%- set found.text = content -%}
  {%- else -%}
    {%- for part in content -%}
      {%- if part is string -%}{%- set found.text = found.text + part -%}
      {%- elif part.type == 'text' -%}{%- set found.text = found.text + part.text -%}
      {%- else -%}{{- raise_exception('the format holds text only, found a part of type ' ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- for pair in reserved if pair[0] in found.text -%}
    {{- raise_exception('a message holds the marker ' ~ pair[0]) -}}
  {%- endfor -%}
  {{- found.text -}}
{%- endmacro -%}

{%- macro value(name, content) -%}
  {%- set found = namespace(is_hostile=false, text='') -%}
  {%- if content is string -%}
    {%- for pair in reserved if pair[0] in content -%}{%- set found.is_hostile = true -%}{%- endfor -%}
  {%- endif -%}
  {%- if content is string and not found.is_hostile -%}
    {{- @OPEN_PARAMETER@ ~ name ~ '" string="true">' ~ content -}}
  {%- else -%}
    {%- set found.text = content | tojson -%}
    {%- for pair in reserved -%}{%- set found.text = found.text.replace(pair[0], pair[1]) -%}{%- endfor -%}
    {{- @OPEN_PARAMETER@ ~ name ~ '" string="false">' ~ found.text -}}
  {%- endif -%}
  {{- @CLOSE_PARAMETER@ -}}
{%- endmacro -%}

{%- macro offers(tools, response_format) -%}
  {%- if tools -%}
    {{- '\n\n' ~ @TOOLS_HEAD@ -}}
    {%- for tool in tools -%}{{- ('\n' if not loop.first else '') ~ (tool.function | tojson) -}}{%- endfor -%}
    {{- @TOOLS_TAIL@ -}}
  {%- endif -%}
  {%- if response_format -%}{{- @RESPONSE_FORMAT@ ~ (response_format | tojson) -}}{%- endif -%}
{%- endmacro -%}

{%- macro calls(message) -%}
  {{- '\n\n' ~ @OPEN_CALLS@ -}}
  {%- for call in message.tool_calls -%}
    {%- if call.function.arguments is string -%}
      {{- raise_exception('a template takes the arguments of a call as an object, not as JSON text') -}}
    {%- endif -%}
    {{- '\n' ~ @OPEN_INVOKE@ ~ call.function.name ~ '">\n' -}}
    {%- for name, content in call.function.arguments.items() -%}
      {{- ('\n' if not loop.first else '') ~ value(name, content) -}}
    {%- endfor -%}
    {{- '\n' ~ @CLOSE_INVOKE@ -}}
  {%- endfor -%}
  {{- '\n' ~ @CLOSE_CALLS@ -}}
{%- endmacro -%}

{%- set ns = namespace(last_user=-1, system=-1, caller=-1, opener='') -%}
{%- for message in messages -%}
  {%- if message.role in ('user', 'developer') -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
  {%- if message.role == 'system' and ns.system < 0 -%}{%- set ns.system = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- @BOS@ -}}
{%- if ns.system < 0 -%}{{- offers(request_tools, request_format) -}}{%- endif -%}
{%- for message in messages -%}
  {%- set index = loop.index0 -%}
  {%- set reasoning = message.reasoning_content or message.reasoning or '' -%}
  {%- set own_tools = message.tools if not request_tools else (request_tools if index == ns.system else none) -%}
  {%- set own_format = message.response_format if not request_format else (request_format if index == ns.system else none) -%}
  {%- set next = messages[index + 1] if not loop.last else none -%}
  {%- set is_kept = next and next.role == 'assistant' and not drop_thinking
      and (next.reasoning_content or next.reasoning or next.tool_calls) -%}
  {%- set opener = @THINK@ if thinking and (index >= ns.last_user or is_kept) else @END_THINK@ -%}
  {%- if message.role != 'tool' and message.role != 'assistant' -%}{%- set ns.caller = -1 -%}{%- endif -%}
  {%- if message.role == 'system' -%}
    {{- text(message.content) ~ offers(own_tools, own_format) -}}
  {%- elif message.role == 'developer' -%}
    {{- @USER@ ~ offers(own_tools, own_format) ~ @DEVELOPER@ ~ text(message.content) ~ @ASSISTANT@ ~ opener -}}
  {%- elif message.role == 'user' -%}
    {{- @USER@ ~ text(message.content) ~ @ASSISTANT@ ~ opener -}}
  {%- elif message.role == 'assistant' -%}
    {%- if thinking and (index > ns.last_user or (not drop_thinking and (reasoning or message.tool_calls))) -%}
      {%- if not reasoning and not message.tool_calls -%}
        {{- raise_exception('message ' ~ index ~ ' needs reasoning_content or tool_calls in thinking mode') -}}
      {%- endif -%}
      {{- text(reasoning) ~ @END_THINK@ -}}
    {%- endif -%}
    {{- text(message.content) -}}
    {%- if message.tool_calls -%}{{- calls(message) -}}{%- endif -%}
    {{- @EOS@ -}}
    {%- set ns.caller = index if message.tool_calls else -1 -%}
  {%- elif message.role == 'tool' -%}
    {%- if ns.caller < 0 -%}{{- raise_exception('message ' ~ index ~ ' is a tool result without a call') -}}{%- endif -%}
    {%- set place = index - ns.caller - 1 -%}
    {%- set asked = messages[ns.caller].tool_calls -%}
    {%- if place >= asked | length -%}{{- raise_exception('message ' ~ index ~ ' is one tool result too many') -}}{%- endif -%}
    {%- set found = namespace(result=message, is_over=false) -%}
    {%- for other in messages[ns.caller + 1:] -%}
      {%- if other.role != 'tool' -%}{%- set found.is_over = true -%}{%- endif -%}
      {%- if not found.is_over and asked[place].id and other.tool_call_id == asked[place].id -%}
        {%- set found.result = other -%}
      {%- endif -%}
    {%- endfor -%}
    {{- '\n\n<function_results>' if place == 0 else '' -}}
    {{- '\n<result>' ~ text(found.result.content) ~ '</result>' -}}
    {{- '\n</function_results>\n\n' ~ opener if place + 1 == asked | length else '' -}}
  {%- else -%}
    {{- raise_exception('unknown role ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template() -> str:
    """The text of chat_template.jinja."""
    parts = {
        "RESERVED": "[" + ", ".join(f"[{_quoted(marker)}, {_quoted(escape_markers(marker))}]" for marker in RESERVED) + "]",
        "BOS": BOS, "EOS": EOS, "USER": USER, "ASSISTANT": ASSISTANT, "THINK": THINK, "END_THINK": END_THINK,
        "TOOLS_HEAD": TOOLS_HEAD, "TOOLS_TAIL": TOOLS_TAIL, "RESPONSE_FORMAT": RESPONSE_FORMAT, "DEVELOPER": DEVELOPER,
        "OPEN_CALLS": f"{OPEN}function_calls>", "CLOSE_CALLS": f"{CLOSE}function_calls>",
        "OPEN_INVOKE": f'{OPEN}invoke name="', "CLOSE_INVOKE": f"{CLOSE}invoke>",
        "OPEN_PARAMETER": f'{OPEN}parameter name="', "CLOSE_PARAMETER": f"{CLOSE}parameter>",
    }  # fmt: skip
    template = _TEMPLATE.lstrip("\n")
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text if name == "RESERVED" else _quoted(text))
    return template


def _quoted(text: str) -> str:
    """A Jinja string literal, which knows JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
