"""`data.train: owner/name`: datasets from the Hub, played by the Hub of fvlm-export's tests on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs

import datasets
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "packages/fvlm-export/tests/hub/conftest.py"
NAME = r"([^/]+/[^/]+)"
ANSWERS = [f"number {row}" for row in range(40)]


def parquet() -> bytes:
    """Forty rows with an image each, as `datasets` writes them."""
    rows: dict[str, list[Any]] = {"question": [], "answer": [], "photo": []}
    for row, answer in enumerate(ANSWERS):
        rows["question"].append("Read it.")
        rows["answer"].append(answer)
        rows["photo"].append(Image.new("RGB", (56, 56), (6 * row, 20, 90)))
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "photo": datasets.Image()}
    )
    out = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(out, batch_size=8)
    return out.getvalue()


def paths_info(handler: Any, body: bytes, name: str, revision: str) -> None:
    try:
        wanted = json.loads(body)["paths"]
    except json.JSONDecodeError:
        wanted = parse_qs(body.decode())["paths"]
    files = handler.files(name, revision) or {}
    found = [
        {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
        for path in wanted
        if path in files
    ]
    handler.answer(200, found)


def tree(handler: Any, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
    """One folder with its folders, or with ``recursive`` all below it: the client walks down level by level."""
    files = handler.files(name, revision)
    if files is None:
        return
    start = f"{folder}/" if folder else ""
    deep = "recursive=true" in handler.path.lower()
    below = {path: "file" for path in files if path.startswith(start)}
    below |= {str(parent): "directory" for path in below for parent in PurePosixPath(path).parents}
    found = [
        {
            "type": kind,
            "path": path,
            "size": len(files.get(path, b"")),
            "oid": hashlib.sha1(path.encode()).hexdigest(),
        }
        for path, kind in below.items()
        if path != "." and path.startswith(start) and (deep or "/" not in path.removeprefix(start))
    ]
    handler.answer(200 if found or not start else 404, found)


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """A Hub that has the dataset me/numbers."""
    spec = importlib.util.spec_from_file_location("hub_server_of_data", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["hub_server_of_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)

    server = ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    server.daemon_threads = True
    made = module.Hub(f"http://127.0.0.1:{server.server_address[1]}")
    module.Handler.hub = made
    handler = module.Handler
    module.ROUTES += [
        ("GET", rf"/api/datasets/{NAME}/tree/([^/]+)(?:/(.*))?", tree),
        ("POST", rf"/api/datasets/{NAME}/paths-info/(.+)", paths_info),
        ("GET", rf"/api/datasets/{NAME}/revision/(.+)", handler.info),
        ("GET", rf"/api/datasets/{NAME}", handler.info),
        ("GET", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", handler.resolve),
        ("HEAD", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", handler.resolve),
    ]
    made.add("me/numbers", {"data/train-00000-of-00001.parquet": parquet()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def fvlm(folder: Path, url: str, *words: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": offline,
    }
    environment.pop("HF_TOKEN", None)
    script = str(Path(sys.executable).with_name("fvlm"))
    done = subprocess.run(
        [script, *words, "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(qwen2_vl_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        f"""
model: {{name: {qwen2_vl_folder}, precision: 16bit, max_seq_length: 128}}
lora: {{r: 2}}
data:
  train: {{path: me/numbers, columns: {{prompt: question, completion: answer, image: photo}}}}
train: {{max_steps: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, warmup_steps: 0}}
""",
        encoding="utf-8",
    )
    return tmp_path


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_rows_come_from_the_hub_with_their_images(hub: Any, folder: Path, streaming: str) -> None:
    done = fvlm(folder, hub.url, "preview", "config.yaml", f"data.streaming={streaming}", "-n", "3", "--check", "5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == (40 if streaming == "false" else 5)
    assert found["fates"]["whole"] == 5
    for number, sample in enumerate(found["samples"]):
        assert sample["place"] == f"me/numbers on the Hub, train, row {number}"
        trained = "".join(piece["text"] for piece in sample["pieces"] if piece["kind"] == "trained")
        assert ANSWERS[number] in trained
        assert sample["images"][0]["original"] == [56, 56]


def test_a_stream_from_the_hub_is_trained_on(hub: Any, folder: Path) -> None:
    done = fvlm(folder, hub.url, "train", "config.yaml", "data.streaming=true", "--quiet")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["status"], record["steps"], record["rows"]) == ("finished", 2, None)


def test_a_hub_that_cannot_be_reached_or_has_no_such_dataset_is_said_in_one_sentence(hub: Any, folder: Path) -> None:
    words = ("preview", "config.yaml")
    offline = fvlm(folder, hub.url, *words, offline="1")
    assert offline.returncode == 5, offline.stderr
    nowhere = fvlm(folder, hub.url, *words, "data.train.path=me/nothing")
    assert nowhere.returncode in (3, 5), nowhere.stderr
    split = fvlm(folder, hub.url, *words, "data.train.split=tset")
    assert split.returncode == 3, split.stderr
    for done, name in ((offline, "me/numbers"), (nowhere, "me/nothing"), (split, "tset")):
        said = json.loads(done.stdout)["error"]
        assert name in said
        assert "check the path, the id" in said
        assert "\n" not in said
