"""`fvlm report`: the page of a real run, read back: all in one file, its pictures, marks that spell the truth."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fvlm_cli.report.charts import Line, chart
from fvlm_cli.report.diff import parts
from fvlm_cli.report.gathered import gather
from fvlm_cli.report.run import write_run_report

VOID = {"meta", "img", "input", "br", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """A page read back; tags that are left open or closed without being open are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.cards: list[dict[str, Any]] = []
        self.labels: dict[str, str] = {}
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append((tag, values))
        if "id" in values:
            self.ids[str(values["id"])] += 1
        self.references += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag == "figure" and "card" in str(values.get("class")):
            self.cards.append({"class": str(values["class"]).split(), "images": [], "dt": [], "dd": []})
        if tag == "img":
            self.cards[-1]["images"].append(values["src"])
        if tag in ("dt", "dd"):
            self.cards[-1][tag].append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        names = [tag for tag, _ in self.open]
        for tag in ("dt", "dd"):
            if tag in names:
                mark = next((name for name in ("ins", "del", "span") if name in names), "same")
                self.cards[-1][tag][-1].append((mark, data))
        if "label" in names:
            self.labels[str(self.open[-1][1]["for"])] = data


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def other(handwriting_run: Path) -> Path:
    """A second run: the first, with another learning rate, and answers that are all right but one."""
    folder = handwriting_run / "run2"
    shutil.copytree(handwriting_run / "run", folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["learning_rate"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    answers = lines(folder / "eval/after.jsonl")
    for answer in answers[1:]:
        answer |= {"prediction": answer["truth"], "exact_match": 1.0, "cer": 0.0, "wer": 0.0, "anls": 1.0}
    answers[0] |= {"prediction": "<script>alert(1)</script>", "exact_match": 0.0, "cer": 5.0}
    (folder / "eval/after.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    return folder


def test_the_page_of_a_run(fvlm, handwriting_run: Path) -> None:
    done = fvlm("report", "run", "--json", cwd=handwriting_run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"report": "run/report.html", "rows": 5}
    page = Page(handwriting_run / "run/report.html")
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert page.tags["svg"] == 6

    after = {line["place"]: line for line in lines(handwriting_run / "run/eval/after.jsonl")}
    before = {line["place"]: line for line in lines(handwriting_run / "run/eval/before.jsonl")}
    worst_first = sorted(after.values(), key=lambda line: -line["cer"])
    assert len(page.cards) == len(worst_first) == 5
    for card, line in zip(page.cards, worst_first, strict=True):
        (source,) = card["images"]
        stored = (handwriting_run / "run/eval" / line["images"][0]).read_bytes()
        assert base64.b64decode(source.partition(",")[2]) == stored
        assert ["".join(text for _, text in part) for part in card["dt"]] == ["truth", "before", "after"]
        truth, was, now = card["dd"]
        assert truth == [("same", line["truth"])]
        for shown, row in ((was, before[line["place"]]), (now, line)):
            assert spelt(shown, "del") == row["prediction"]
            assert spelt(shown, "ins") == row["truth"]
    record = json.loads((handwriting_run / "run/run.json").read_text())
    for value in (record["eval_loss"], record["answers_before"]["cer"], record["answers_after"]["cer"]):
        assert f"{value:.4f}" in page.text
    assert "learning_rate: 0.002" in page.text


def spelt(shown: list[tuple[str, str]], without: str) -> str:
    """What a marked answer says without what is marked in one way."""
    return "".join(text for mark, text in shown if mark not in (without, "span")).removesuffix(" ")


def test_filters_and_their_numbers(handwriting_run: Path, other: Path) -> None:
    path = handwriting_run / "other.html"
    write_run_report(path, gather(other), None, 200)
    page = Page(path)
    kinds = Counter(name for card in page.cards for name in card["class"] if name.startswith("is-"))
    assert kinds["is-wrong"] == 1
    assert kinds["is-fixed"] + kinds["is-right"] == 4
    assert kinds["is-fixed"] >= 1
    assert kinds["is-worse"] == 1
    assert page.labels == {
        "f-all": "all (5)",
        "f-wrong": f"still wrong ({kinds['is-wrong']})",
        "f-fixed": f"put right by training ({kinds['is-fixed']})",
        "f-worse": f"made worse ({kinds['is-worse']})",
    }
    for name in ("wrong", "fixed", "worse"):
        assert f"#f-{name}:checked ~ .grid .card:not(.is-{name})" in page.source
    assert "is-wrong" in page.cards[0]["class"]  # the worst first
    assert "<script>" not in page.source
    assert "&lt;script&gt;" in page.source
    assert write_run_report(path, gather(other), None, 2) == 2
    assert len(Page(path).cards) == 2


def test_two_runs_side_by_side(handwriting_run: Path, other: Path) -> None:
    path = handwriting_run / "both.html"
    write_run_report(path, gather(handwriting_run / "run"), gather(other), 200)
    page = Page(path)
    for card in page.cards:
        assert "".join(text for _, text in card["dt"][3]) == "after, run2"
    assert re.search(r"train\.learning_rate\s*0\.002\s*0\.5", page.text)
    assert page.source.count("run2 moving average") == 1
    assert page.tags["svg"] == 6


def test_what_is_no_run_is_refused(handwriting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fvlm_cli.main import app

    monkeypatch.chdir(tmp_path)
    shutil.copytree(
        handwriting_run / "run", tmp_path / "torn", ignore=shutil.ignore_patterns("checkpoints", "report.html")
    )
    (tmp_path / "torn/history.json").write_text('[{"loss": ', encoding="utf-8")
    shutil.copytree(tmp_path / "torn", tmp_path / "bare")
    (tmp_path / "bare/history.json").unlink()
    next((tmp_path / "bare/eval/images").iterdir()).unlink()
    for folder, part in (
        ("nowhere", "no run.json"),
        ("torn", "history.json is damaged"),
        ("bare", "is missing, which"),
    ):
        done = CliRunner().invoke(app, ["report", folder])
        assert done.exit_code == 3, done.stderr
        assert part in done.stderr
        assert not (tmp_path / folder / "report.html").exists()


def test_history_has_time_and_memory_of_each_report(handwriting_run: Path) -> None:
    history = json.loads((handwriting_run / "run/history.json").read_text())
    reports = [entry for entry in history if "loss" in entry]
    assert len(reports) == 8
    for entry in reports:
        assert 0 < entry["seconds_per_step"] < 60
        assert 0.1 < entry.get("device_memory_gib", entry.get("host_memory_gib")) < 1000


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3749", "3749", [("3749", "same")]),
        ("3x49", "3749", [("3", "same"), ("7", "missing"), ("x", "extra"), ("49", "same")]),
        ("349", "3749", [("3", "same"), ("7", "missing"), ("49", "same")]),
        ("37499", "3749", [("3749", "same"), ("9", "extra")]),
        ("", "1", [("1", "missing")]),
        ("", "", []),
    ],
)
def test_marks(answer: str, truth: str, expected: list[tuple[str, str]]) -> None:
    found = [(part.text, part.mark) for part in parts(answer, truth)]
    if answer == "37499":  # which of the two nines is extra is the algorithm's choice
        assert "".join(text for text, mark in found if mark != "extra") == truth
    else:
        assert found == expected


def test_charts_share_no_names_and_draw_their_points() -> None:
    one = chart([Line("a", [1, 2, 3], [3.0, 1.0, 2.0])], "loss (nats)")
    two = chart([Line("a", [1, 2, 3], [3.0, 1.0, 2.0])], "norm")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] & ids[1] == set()
    for svg, names in zip((one, two), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= names
    path = re.search(r'id="loss-nats-line-0">\s*<path d="([^"]+)"', one)
    assert path is not None
    assert len(re.findall(r"[ML]", path[1])) == 3
