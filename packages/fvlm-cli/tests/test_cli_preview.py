"""`fvlm preview`: it says what the collator does, for every way in which a row can end up whole, cut, or left out."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fvlm_cli.config.read import read_config
from fvlm_cli.output import Output
from fvlm_cli.preview.histogram import histogram, quantile
from fvlm_cli.preview.look import Preview, look
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings


def row(image: str, answer: str) -> dict[str, Any]:
    question = [{"type": "image", "image": image}, {"type": "text", "text": "Read the text."}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits, and one row for each thing that can be wrong."""
    folder = tmp_path_factory.mktemp("handwriting")
    texts = []
    for number, writing in enumerate(writings(6, 0, test=False)):
        writing.image.save(folder / f"{number}.png")
        texts.append(writing.text)
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:60])
    Image.open(folder / "1.png").resize((256, 256)).save(folder / "large.png")
    (folder / "same.png").write_bytes((folder / "2.png").read_bytes())
    rows = [row(f"{number}.png", text) for number, text in enumerate(texts)]
    rows += [
        row("3.png", "9" * 80),  # line 7: truncated
        row("large.png", "1"),  # 8: skipped, its image does not fit
        row("torn.png", "1"),  # 9: its header is whole
        row("nowhere.png", "1"),  # 10: no such file
        row("same.png", texts[2]),  # 11: a duplicate of line 3 under another name
        {"messages": [{"role": "user", "content": "no answer"}]},  # 12
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "eval.jsonl").write_text(json.dumps(row("4.png", "another answer")), encoding="utf-8")
    (folder / "config.yaml").write_text(
        f"model: {{name: {shipped_checkpoint()}, max_seq_length: 64}}\n"
        "data: {train: train.jsonl, eval: eval.jsonl, train_on_responses_only: true}\n",
        encoding="utf-8",
    )
    return folder


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[Image.Image] = []
        self.classes: dict[str, str] = {}
        self.sources: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._open = values.get("class") or ""
        if "href" in values or (tag == "script" and "src" in values):
            self.sources.append(tag)
        if tag == "img":
            payload = str(values["src"]).removeprefix("data:image/png;base64,")
            self.images.append(Image.open(io.BytesIO(base64.b64decode(payload))))

    def handle_data(self, data: str) -> None:
        self.classes[self._open] = self.classes.get(self._open, "") + data


def test_the_command_tells_what_becomes_of_every_row(fvlm, handwriting: Path) -> None:
    done = fvlm("preview", "config.yaml", "-n", "8", "--html", "page.html", "--json", cwd=handwriting)
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["eval_rows"], found["checked"]) == (10, 1, 10)
    assert found["fates"] == {"whole": 7, "truncated": 1, "skipped": 1, "refused": 1}
    truncated, skipped = found["changed"]
    assert truncated["place"] == "train.jsonl, line 7"
    assert "model.max_seq_length is 64" in truncated["reason"]
    assert (skipped["place"], skipped["fate"]) == ("train.jsonl, line 8", "skipped")
    assert "its images end at token" in skipped["reason"]
    refused = "\n".join(found["refused"])
    for part in ("line 9: the image", "line 10: the image nowhere.png", "line 12: a sample has no assistant turn"):
        assert part in refused
    assert found["duplicates"] == [{"place": "train.jsonl, line 11", "first": "train.jsonl, line 3"}]
    assert found["evaluated_on_trained_images"] == [{"place": "eval.jsonl, line 1", "first": "train.jsonl, line 5"}]

    first, *_ = found["samples"]
    trained = [piece["text"] for piece in first["pieces"] if piece["kind"] == "trained"]
    assert "".join(trained) == writings(6, 0, test=False)[0].text + "<|im_end|>"
    assert first["tokens"]["media"] == 16 + 2
    assert first["images"] == [{"original": [128, 32], "width": 128, "height": 32, "tiles": 1, "tokens": 16}]
    cut = found["samples"][6]
    assert cut["tokens"]["cut"] == found["lengths"][6] - 64
    assert sum(item["rows"] for item in found["histogram"]) == len(found["lengths"]) == 9

    page = Page()
    page.feed((handwriting / "page.html").read_text(encoding="utf-8"))
    assert page.sources == []
    assert len(page.images) == 8
    assert np.array_equal(page.images[0], Image.open(handwriting / "0.png").convert("RGB"))
    assert "".join(trained) in page.classes["trained"]


def test_without_colour_trained_text_is_bracketed(handwriting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fvlm_cli.main import app

    monkeypatch.chdir(handwriting)
    done = CliRunner().invoke(app, ["preview", "config.yaml", "data.limit=2", "-n", "1"])
    assert done.exit_code == 0, done.stderr
    assert f"⟦{writings(6, 0, test=False)[0].text}<|im_end|>⟧" in done.stdout
    assert "<|image_pad|>×16" in done.stdout
    assert "\x1b[" not in done.stdout


def preview(folder: Path, model: Path, *words: str) -> Preview:
    (folder / "family.yaml").write_text(
        f"model: {{name: {model}, max_seq_length: 2048}}\ndata: {{train: {folder}/pictures.jsonl}}\n", encoding="utf-8"
    )
    return look(read_config(folder / "family.yaml", words), Output(quiet=True), show=2, check=0)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen3_vl", "mllama", "pixtral", "gemma3", "idefics3", "internvl", "llava_onevision"]
)
def test_pictures_are_what_each_family_gets(tmp_path: Path, family: str) -> None:
    from fvlm_core.testing import tiny_checkpoint

    # Left half red, right half blue: a wrong undoing of patches, tiles or channels shows.
    picture = Image.new("RGB", (112, 112), "red")
    picture.paste("blue", (56, 0, 112, 112))
    picture.save(tmp_path / "a.png")
    one = {"prompt": "What is it?", "completion": "Two colours: äöü €", "image": "a.png"}
    two = {"prompt": "Compare.", "completion": "Equal.", "images": ["a.png", "a.png"]}
    (tmp_path / "pictures.jsonl").write_text(json.dumps(one) + "\n" + json.dumps(two), encoding="utf-8")
    found = preview(tmp_path, tiny_checkpoint(family, tmp_path / "base"))
    first, second = found.shown
    assert [shown.fate for shown in found.shown] == ["whole", "whole"]
    (seen,) = first.images
    assert len(second.images) == 2
    assert seen.original == (112, 112)
    media = [piece for piece in first.pieces if piece.kind == "media"]
    assert 0 < seen.tokens <= sum(len(piece.ids) for piece in media)
    assert second.images[0].tokens == seen.tokens
    height, width = seen.picture.height // -(-seen.tiles // 4), seen.picture.width // min(4, seen.tiles)
    assert (width, height) == (seen.width, seen.height)
    last = np.asarray(seen.picture, dtype=int)[:height, :width]  # the first tile, or the whole
    left = last[height // 2, 1]
    assert left[0] > 200
    assert left[2] < 60
    if seen.tiles == 1:
        right = last[height // 2, -2]
        assert right[2] > 200
        assert right[0] < 60
    trained = "".join(piece.text for piece in first.pieces if piece.kind == "trained")
    assert "Two colours: äöü €" in trained
    assert "What is it?" not in trained


def test_videos_are_found_beside_their_file_and_shown_as_media(tmp_path: Path) -> None:
    from fvlm_core.testing import tiny_checkpoint

    for number in range(4):
        Image.new("RGB", (56, 56), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    frames = [f"{number}.png" for number in range(4)]
    inline = [{"type": "video", "video": frames}, {"type": "text", "text": "What moves?"}]
    answer = {"role": "assistant", "content": "Nothing."}
    rows = [
        {"messages": [{"role": "user", "content": inline}, answer]},
        {"prompt": "What moves?", "completion": "Nothing.", "videos": [frames]},
        {"prompt": "What moves?", "completion": "Nothing.", "videos": [frames[::-1]]},
    ]
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = preview(tmp_path, tiny_checkpoint("qwen2_vl", tmp_path / "base"))
    assert (found.fates["whole"], found.refused) == (3, [])
    assert found.shown[0].images == []
    assert found.shown[0].count("media") == found.shown[1].count("media") > 4
    assert [place.rpartition(", ")[2] for place, _ in found.duplicates] == ["line 2"]  # line 3 runs backwards


def test_overflow_skip_is_told_as_such(handwriting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(handwriting)
    config = read_config("config.yaml", ["data.overflow=skip"])
    found = look(config, Output(quiet=True), show=0, check=7)
    assert found.fates == {"whole": 6, "truncated": 0, "skipped": 1, "refused": 0}
    assert "data.overflow is skip" in found.changed[0][2]


def test_the_first_token_is_predicted_from_nothing(handwriting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(handwriting)
    config = read_config("config.yaml", ["data.train_on_responses_only=false"])
    (shown,) = look(config, Output(quiet=True), show=1, check=1).shown
    assert [piece.kind for piece in shown.pieces[:2]] == ["masked", "trained"]


def test_histogram_and_quantiles() -> None:
    bins = histogram([1, 1, 5, 24], bins=12)
    assert [(item.low, item.high, item.rows) for item in bins][:3] == [(1, 2, 2), (3, 4, 0), (5, 6, 1)]
    assert bins[-1].rows == 1
    assert sum(item.rows for item in bins) == 4
    assert (quantile([4, 1, 3, 2], 0.5), quantile([4, 1, 3, 2], 0.95)) == (2, 4)
    assert histogram([]) == []
