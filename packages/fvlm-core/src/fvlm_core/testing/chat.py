"""Chat templates: string and block content, images and videos, generation prompt, and marked assistant spans.

``{% generation %}`` marks what the assistant says, so that
``apply_chat_template(..., return_assistant_tokens_mask=True)`` and `train_on_responses_only` find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatStyle:
    """How a family writes a conversation.

    Attributes:
        turns: role → what opens and what closes its turn. An assistant's turn is trained up to and with what closes
            it, and what opens it is the generation prompt.
        image: what stands for one image before the processor expands it.
        video: the same for a video, or None when the family has no videos.
        begin: what opens the conversation, e.g. the beginning-of-text token.
        gap: what stands between a turn's end and the next turn.
    """

    turns: Mapping[str, tuple[str, str]]
    image: str
    video: str | None = None
    begin: str = ""
    gap: str = ""


def chatml(image: str, video: str | None = None) -> ChatStyle:
    """Return the style of Qwen and of those that follow it."""
    turns = {role: (f"<|im_start|>{role}\n", "<|im_end|>") for role in ("system", "user", "assistant")}
    return ChatStyle(turns, image=image, video=video, gap="\n")


def _quoted(text: str) -> str:
    """Write a string as a Jinja literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


_BLOCKS = """
{%- macro blocks(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for block in content -%}
      {%- if block['type'] == 'image' -%}
        {{- IMAGE -}}
      {%- elif block['type'] == 'video' -%}
        {{- VIDEO -}}
      {%- elif block['type'] == 'text' -%}
        {{- block['text'] -}}
      {%- else -%}
        {{- raise_exception('Unknown content type ' + block['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_TURNS = """
{%- set opens = OPENS -%}
{%- set closes = CLOSES -%}
{{- BEGIN -}}
{%- for message in messages -%}
  {%- if message['role'] not in opens -%}
    {{- raise_exception('Unknown role ' + message['role']) -}}
  {%- endif -%}
  {{- opens[message['role']] -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- blocks(message['content']) + closes['assistant'] -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- blocks(message['content']) + closes[message['role']] -}}
  {%- endif -%}
  {{- GAP -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- opens['assistant'] -}}
{%- endif -%}
"""


def chat_template(style: ChatStyle) -> str:
    """Return the Jinja chat template of a style."""
    opens = ", ".join(f"{_quoted(role)}: {_quoted(opened)}" for role, (opened, _) in style.turns.items())
    closes = ", ".join(f"{_quoted(role)}: {_quoted(closed)}" for role, (_, closed) in style.turns.items())
    no_videos = "raise_exception('This model takes no videos: send the frames as images.')"
    blocks = _BLOCKS.replace("IMAGE", _quoted(style.image))
    blocks = blocks.replace("VIDEO", no_videos if style.video is None else _quoted(style.video))
    turns = _TURNS.replace("OPENS", f"{{{opens}}}").replace("CLOSES", f"{{{closes}}}")
    turns = turns.replace("BEGIN", _quoted(style.begin)).replace("GAP", _quoted(style.gap))
    return (blocks + turns).strip()
