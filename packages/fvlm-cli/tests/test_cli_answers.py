"""`fvlm infer` and `eval`, and the answers of `train`: through the installed script on real handwriting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fvlm_cli.data.row import Row
from fvlm_cli.evaluation.metrics import score, summary
from fvlm_cli.generate.answer import Answerer, Decoding
from fvlm_cli.generate.load import load_to_answer
from fvlm_cli.generate.open import answerer
from fvlm_cli.generate.questions import Conversation, Question, question_of
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.reading import LONGEST_ANSWER, transcribe
from fvlm_core.errors import DataError

PROMPT = "Read the text."


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asks(name: Path | str, tokens: int = 8, **options: Any) -> Answerer:
    return answerer(*load_to_answer(str(name), **options), Decoding(tokens), None)


def test_infer_answers_for_a_folder_what_a_direct_call_gives(fvlm, handwriting_run: Path) -> None:
    words = ("--image", "images", "--prompt", PROMPT, "--max-new-tokens", "8", "--batch-size", "7")
    done = fvlm("infer", "run/adapter", *words, "--output", "answers.jsonl", cwd=handwriting_run)
    assert done.returncode == 0, done.stderr
    found = lines(handwriting_run / "answers.jsonl")
    assert [line["images"] for line in found] == [[f"images/{number:02}.png"] for number in range(24)]
    model, processor = load_to_answer(str(handwriting_run / "run/adapter"))
    pictures = [Image.open(handwriting_run / line["images"][0]).convert("RGB") for line in found]
    assert [line["answer"] for line in found] == transcribe(model, processor, pictures)
    assert len({line["answer"] for line in found}) > 3


def test_infer_reads_a_page_and_a_text_as_a_direct_call_does(fvlm, handwriting_run: Path, tmp_path: Path) -> None:
    """Grey pictures of other sizes than any that it was trained on, alone and together in a batch."""
    import skimage.data

    pictures = {name: Image.fromarray(getattr(skimage.data, name)()) for name in ("page", "text")}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    adapter = str(handwriting_run / "run/adapter")
    model, processor = load_to_answer(adapter)
    expected = [transcribe(model, processor, [picture.convert("RGB")])[0] for picture in pictures.values()]
    rows = [{"prompt": PROMPT, "image": f"{name}.png"} for name in pictures]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ("--max-new-tokens", str(LONGEST_ANSWER), "--quiet")
    many = fvlm("infer", adapter, "--input", "questions.jsonl", "--output", "answers.jsonl", *words, cwd=tmp_path)
    assert many.returncode == 0, many.stderr
    assert lines(tmp_path / "answers.jsonl") == [
        {**row, "answer": answer} for row, answer in zip(rows, expected, strict=True)
    ]
    one = fvlm("infer", adapter, "--image", "text.png", "--prompt", PROMPT, *words, cwd=tmp_path)
    assert one.stdout.strip() == expected[1] != ""


def test_infer_streams_one_answer_and_takes_questions_from_a_file(
    handwriting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from fvlm_cli.main import app

    monkeypatch.chdir(handwriting_run)
    base = str(shipped_checkpoint())
    options = ("--max-new-tokens", "8", "--precision", "4bit", "--quiet")
    one = CliRunner().invoke(app, ["infer", base, "--image", "images/03.png", "--prompt", PROMPT, *options])
    assert one.exit_code == 0, one.stderr
    many = CliRunner().invoke(app, ["infer", base, "--input", "train.jsonl", *options, "--json"])
    found = json.loads(many.stdout)
    assert found["answers"] == 24
    assert found["lines"][3]["answer"] == one.stdout.strip() != ""
    assert found["lines"][3]["messages"] == lines(handwriting_run / "train.jsonl")[3]["messages"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--image", "images/00.png"), 2, "give --prompt"),
        (("--image", "nowhere.png", "--prompt", "x"), 3, "nowhere.png cannot be read"),
        (("--image", "images", "--image", "images/00.png", "--prompt", "x"), 2, "is a folder"),
        (("--input", "train.jsonl", "--prompt", "x"), 2, "brings its own questions"),
        (("--input", "config.yaml"), 2, "none of .jsonl"),
        (("--input", "train.jsonl", "--output", "config.yaml"), 2, "config.yaml exists already"),
        (("--image", "images/00.png", "--prompt", "<|image_pad|>"), 3, "stands for an image"),
    ],
)
def test_infer_refuses_in_one_sentence(
    handwriting_run: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, part: str
) -> None:
    from typer.testing import CliRunner

    from fvlm_cli.main import app

    monkeypatch.chdir(handwriting_run)
    done = CliRunner().invoke(app, ["infer", str(shipped_checkpoint()), *words, "--quiet"])
    assert done.exit_code == code, done.stderr
    assert part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "pixtral", "gemma3"])
def test_a_batch_answers_as_each_alone(tmp_path: Path, family: str) -> None:
    from fvlm_core.testing import tiny_checkpoint

    model = asks(tiny_checkpoint(family, tmp_path / "base"), tokens=6)
    pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((56, 56), (112, 56), (84, 112))]
    questions = [Conversation().ask("what?" * (n + 1), [picture]) for n, picture in enumerate(pictures)]
    questions.insert(1, Conversation().ask("no image here", []))
    together = model.answer(questions)
    assert together == [model.answer([question])[0] for question in questions]
    spoken: list[str] = []
    assert model.stream(questions[0], spoken.append) == "".join(spoken).strip() == together[0]


def test_eval_scores_every_row_and_its_loss_is_that_of_the_logits(fvlm, handwriting_run: Path) -> None:
    words = ("eval", "run/adapter", "config.yaml", "eval.rows=4", "--output", "scored", "--json")
    done = fvlm(*words, cwd=handwriting_run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = lines(handwriting_run / "scored/predictions.jsonl")
    assert (found["rows"], len(rows)) == (4, 4)
    scores = [score(row["prediction"], row["truth"]) for row in rows]
    assert {name: found[name] for name in ("exact_match", "cer", "wer", "anls")} == summary(scores)
    after = lines(handwriting_run / "run/eval/after.jsonl")
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in after[:4]]
    assert found["loss"] == pytest.approx(_direct_loss(handwriting_run, rows), rel=1e-4)


def _direct_loss(folder: Path, rows: Sequence[dict[str, Any]]) -> float:
    """The same by the processor and cross_entropy alone."""
    model, processor = load_to_answer(str(folder / "run/adapter"))
    total, count = 0.0, 0
    for row in rows:
        question = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        opening = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        image = Image.open(folder / "run/eval" / row["images"][0]).convert("RGB")
        inputs = processor(text=[opening + row["truth"] + "<|im_end|>"], images=[image], return_tensors="pt")
        start = processor(text=[opening], images=[image], return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        targets = inputs["input_ids"][0, start:]
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="sum")
        total, count = total + float(losses), count + len(targets)
    return total / count


def test_train_keeps_the_answers_before_and_after(handwriting_run: Path) -> None:
    record = json.loads((handwriting_run / "run/run.json").read_text())
    before, after = (lines(handwriting_run / f"run/eval/{when}.jsonl") for when in ("before", "after"))
    assert [row["place"] for row in before] == [row["place"] for row in after]
    assert len(before) == 5
    base = asks(shipped_checkpoint())
    pictures = [str(handwriting_run / "run/eval" / row["images"][0]) for row in before]
    asked = [Conversation().ask(PROMPT, [picture]) for picture in pictures]
    assert base.answer(asked) == [row["prediction"] for row in before]
    assert record["answers_after"]["cer"] != record["answers_before"]["cer"]
    assert record["answers_after"] == summary([score(row["prediction"], row["truth"]) for row in after])


def test_asking_for_answers_leaves_the_losses_as_they_are(
    handwriting_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvlm_cli.config.read import read_config
    from fvlm_cli.output import Output
    from fvlm_cli.training.run import run

    monkeypatch.chdir(handwriting_run)
    run(read_config("config.yaml", ["eval.rows=null", "save.output_dir=unasked"]), Output(quiet=True), resume=False)
    histories = [json.loads((handwriting_run / name / "history.json").read_text()) for name in ("run", "unasked")]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_asking_leaves_the_model_in_training_as_it_was(
    handwriting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvlm_cli.config.read import read_config
    from fvlm_cli.data.read import read_data
    from fvlm_cli.output import Output
    from fvlm_cli.training.answers import Answers
    from fvlm_cli.training.build import load
    from fvlm_cli.training.run_folder import RunFolder
    from fvlm_core.checkpointing import checkpointing_mode

    monkeypatch.chdir(handwriting_run)
    config = read_config("config.yaml", ["eval.rows=1", "model.gradient_checkpointing=true"])
    model, processor = load(config)
    _, rows = read_data(config.data, config.train.seed, lambda found, total: found)
    record = Answers(config, model, processor, rows, RunFolder(tmp_path), Output(quiet=True)).take("before")
    assert set(record["answers_before"]) == set(config.eval.metrics)
    assert (model.training, checkpointing_mode(model)) == (True, True)
    assert model.config.get_text_config().use_cache is False


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (" 42 \n", "42", (1, 0.0, 0.0, 1.0)),
        ("total 41", "Total 42", (0, 2 / 8, 1.0, 1 - 1 / 8)),
        ("abc", "xyz", (0, 1.0, 1.0, 0.0)),
        ("a b d", "a b c d", (0, 2 / 7, 1 / 4, 1 - 2 / 7)),
        ("", "", (1, 0.0, 0.0, 1.0)),
        ("ab", "", (0, 2.0, 1.0, 0.0)),
    ],
)
def test_metrics_by_hand(answer: str, truth: str, expected: tuple[float, ...]) -> None:
    found = score(answer, truth)
    values = tuple(found.value(metric) for metric in ("exact_match", "cer", "wer", "anls"))
    assert values == pytest.approx(expected)


def test_error_rates_are_of_the_whole_text() -> None:
    found = summary([score("b", "a"), score("0123456789", "0123456789")])
    assert found == {"exact_match": 0.5, "cer": 1 / 11, "wer": 1 / 2, "anls": 0.5}


def test_questions_of_rows() -> None:
    dialogue = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "one?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "two?"}]},
    ]

    def asked(sample: dict[str, Any]) -> Question:
        return question_of(Row(sample, "here"))

    open_end = asked({"messages": dialogue})
    assert (open_end.asked, open_end.images, open_end.truth) == ("two?", ["a.png", "b.png"], None)
    closed = asked({"messages": [*dialogue, {"role": "assistant", "content": "2"}]})
    assert (closed.asked, closed.truth, len(closed.messages)) == ("two?", "2", 3)
    earlier = asked({"messages": dialogue[:2]})
    assert (earlier.images, earlier.truth) == (["a.png"], "1")
    assert asked({"prompt": "q", "image": "a.png"}).truth is None
    assert asked({"prompt": "q", "completion": "a"}).truth == "a"
    with pytest.raises(DataError, match="here: nothing is asked"):
        asked({"messages": [{"role": "assistant", "content": "1"}]})
