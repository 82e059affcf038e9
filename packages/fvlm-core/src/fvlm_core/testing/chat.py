"""Chat templates: string and block content, images and videos, generation prompt, and marked assistant spans.

``{% generation %}`` marks what the assistant says, so that
``apply_chat_template(..., return_assistant_tokens_mask=True)`` and `train_on_responses_only` find it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatStyle:
    """How a family writes a conversation.

    Attributes:
        turn: what opens a turn, with ``{role}`` where the role's name goes.
        end: what closes a turn; an assistant's turn is trained up to and with it.
        image: what stands for one image before the processor expands it.
        video: the same for a video, or None when the family has no videos.
        gap: what stands between a turn's end and the next turn.
        begin: what opens the conversation, e.g. the beginning-of-text token.
        assistant: how the family names the assistant.
    """

    turn: str
    end: str
    image: str
    video: str | None = None
    gap: str = ""
    begin: str = ""
    assistant: str = "assistant"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def chat_template(style: ChatStyle) -> str:
    """Return the Jinja chat template of a style."""
    before, after = style.turn.split("{role}")
    video = (
        _quoted(style.video)
        if style.video is not None
        else "raise_exception('This model takes no videos; send the frames as images.')"
    )
    head = f"{{{{- {_quoted(before)} + role + {_quoted(after)} -}}}}"
    prompt = _quoted(before + style.assistant + after)
    return f"""
{{%- macro blocks(content) -%}}
  {{%- if content is string -%}}
    {{{{- content -}}}}
  {{%- else -%}}
    {{%- for block in content -%}}
      {{%- if block['type'] == 'image' -%}}
        {{{{- {_quoted(style.image)} -}}}}
      {{%- elif block['type'] == 'video' -%}}
        {{{{- {video} -}}}}
      {{%- elif block['type'] == 'text' -%}}
        {{{{- block['text'] -}}}}
      {{%- else -%}}
        {{{{- raise_exception('Unknown content type ' + block['type']) -}}}}
      {{%- endif -%}}
    {{%- endfor -%}}
  {{%- endif -%}}
{{%- endmacro -%}}
{{{{- {_quoted(style.begin)} -}}}}
{{%- for message in messages -%}}
  {{%- if message['role'] == 'assistant' -%}}
    {{%- set role = {_quoted(style.assistant)} -%}}
    {head}
    {{%- generation -%}}
      {{{{- blocks(message['content']) -}}}}
      {{{{- {_quoted(style.end)} -}}}}
    {{%- endgeneration -%}}
  {{%- else -%}}
    {{%- set role = message['role'] -%}}
    {head}
    {{{{- blocks(message['content']) -}}}}
    {{{{- {_quoted(style.end)} -}}}}
  {{%- endif -%}}
  {{{{- {_quoted(style.gap)} -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
  {{{{- {prompt} -}}}}
{{%- endif -%}}
"""
