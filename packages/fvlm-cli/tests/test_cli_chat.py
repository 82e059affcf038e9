"""`fvlm chat`: what is remembered of a dialogue, and what Ctrl-C leaves of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fvlm_cli.generate.answer import Answerer, Decoding
from fvlm_cli.generate.load import load_to_answer
from fvlm_cli.generate.open import answerer
from fvlm_cli.generate.questions import Conversation
from fvlm_cli.quickstart.folders import shipped_checkpoint

PROMPT = "Read the text."


def asks(name: Path | str) -> Answerer:
    return answerer(*load_to_answer(str(name)), Decoding(8), None)


def test_chat_remembers_what_was_said_and_shown(fvlm, handwriting_run: Path) -> None:
    # What is refused is taken back: what follows is answered as if it had not been asked, and its image waits.
    refused = "/image images/06.png\nwhat is <|image_pad|>?"
    typed = f"{PROMPT}\n/nothing\n{refused}\n/image images/05.png\nAnd these?\n/clear\n{PROMPT}\n/quit\nnot read\n"
    words = ("--image", "images/04.png", "--max-new-tokens", "8", "--json", "--system", "You read.")
    done = fvlm("chat", str(shipped_checkpoint()), *words, cwd=handwriting_run, stdin=typed)
    assert done.returncode == 0, done.stderr
    assert "/nothing is no command" in done.stderr
    assert "stands for an image" in done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["images"] for turn in turns] == [["images/04.png"], ["images/06.png", "images/05.png"], []]
    model, talk = asks(shipped_checkpoint()), Conversation()
    for turn in turns[:2]:
        paths = [str(handwriting_run / path) for path in turn["images"]]
        answer = model.answer([talk.ask(turn["user"], paths, "You read.")])[0]
        assert turn["assistant"] == answer
        talk.hear(answer)
    alone = model.answer([Conversation().ask(PROMPT, [], "You read.")])[0]
    assert turns[2]["assistant"] == alone != turns[0]["assistant"]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    handwriting_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import builtins

    from fvlm_cli.commands.chat import Session
    from fvlm_cli.output import Output

    monkeypatch.chdir(handwriting_run)
    session = Session(asks(shipped_checkpoint()), None, Output(quiet=True))
    session.show("images/04.png")
    spoken: list[str] = []
    original = builtins.print

    def interrupting(*words: object, **given: Any) -> None:
        spoken.append(str(words[0]) if words else "")
        if len(spoken) == 2:
            raise KeyboardInterrupt  # a signal may be looked at only when all has been said
        original(*words, **given)

    monkeypatch.setattr(builtins, "print", interrupting)
    assert session.take(PROMPT)
    monkeypatch.setattr(builtins, "print", original)
    said = session._talk.messages[-1]["content"]
    said = said if isinstance(said, str) else "".join(block["text"] for block in said)
    assert said == "".join(spoken[:2]).strip()
    whole = asks(shipped_checkpoint()).answer([Conversation().ask(PROMPT, ["images/04.png"])])[0]
    assert whole.startswith(said)
    assert len(said) < len(whole)
    capsys.readouterr()
    assert session.take("And now?")
    talk = Conversation()
    talk.ask(PROMPT, ["images/04.png"])
    talk.hear(said)
    expected = asks(shipped_checkpoint()).answer([talk.ask("And now?", [])])[0]
    assert capsys.readouterr().out.strip() == expected
