"""`fvlm push` through the installed script, and the program that pushes, to the Hub of fvlm-export's tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "packages/fvlm-export/tests/hub/conftest.py"


@pytest.fixture(scope="module")
def hub_module() -> Any:
    spec = importlib.util.spec_from_file_location("hub_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_module: Any) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_module.Handler)
    server.daemon_threads = True
    made = hub_module.Hub(f"http://127.0.0.1:{server.server_address[1]}")
    hub_module.Handler.hub = made
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def adapter(qwen2_vl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fvlm_vision import FastVisionModel

    folder = tmp_path_factory.mktemp("push") / "adapter"
    model, processor = FastVisionModel.from_pretrained(str(qwen2_vl_folder), load_in_16bit=True)
    FastVisionModel.get_peft_model(model, r=2).save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return folder


def push(hub: Any, adapter: Path, token: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = str(Path(sys.executable).with_name("fvlm"))
    return run(hub, token, tmp_path, script, "push", str(adapter), "me/model", "--json", *words)


def run(hub: Any, token: str, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_an_adapter_is_merged_and_arrives(hub: Any, hub_module: Any, adapter: Path, tmp_path: Path) -> None:
    from fvlm_export import save_pretrained_merged

    done = push(hub, adapter, hub_module.TOKEN, tmp_path, "--private")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"].startswith(f"{hub.url}/me/model/commit/")
    assert hub.repos["me/model"].private
    here = save_pretrained_merged(adapter, tmp_path / "merged", progress=False)
    there = hub.repos["me/model"].branches["main"]
    assert there["model.safetensors"] == (here / "model.safetensors").read_bytes()
    assert "adapter_config.json" not in there


def test_the_program_that_saves_pushes_what_it_trained(hub: Any, hub_module: Any, tmp_path: Path) -> None:
    """The last of the four: `model.push_to_hub_merged(repo, tokenizer, token=...)` on the model in memory."""
    from fvlm_export import save_pretrained_merged

    program, out = str(ROOT / "examples/programs/saving.py"), tmp_path / "out"
    asked = ["--steps", "1", "--output", str(out), "--repo", "me/model"]
    done = run(hub, hub_module.TOKEN, tmp_path, sys.executable, program, *asked)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/model/commit/" in done.stdout
    there = hub.repos["me/model"].branches["main"]
    assert {"config.json", "tokenizer.json", "processor_config.json", "README.md"} <= there.keys()
    assert b"quantization_config" not in there["config.json"]
    here = save_pretrained_merged(out / "adapter", tmp_path / "merged", progress=False)
    assert there["model.safetensors"] == (here / "model.safetensors").read_bytes()
    assert not any(hub_module.TOKEN.encode() in content for content in there.values())
    assert not (out / "merged").exists()


def test_every_option_of_the_repository_is_honoured(hub: Any, hub_module: Any, adapter: Path, tmp_path: Path) -> None:
    """Sent shard by shard from a working folder to a branch, and as a pull request."""
    held: list[int] = []
    work = tmp_path / "work"
    work.mkdir()
    hub.on_put = lambda: held.append(len(list(work.rglob("*.safetensors"))))
    done = push(
        hub, adapter, hub_module.TOKEN, tmp_path, "--public", "--revision", "trained", "--commit-message", "mine",
        "--max-shard-size", "300KB", "--dtype", "bfloat16", "--working-dir", str(work), "--delete-uploaded",
        "--metric", "loss=0.5", "--data", "me/receipts",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/model"]
    assert not repo.private
    assert repo.commits == [("trained", "mine")]
    assert repo.branches["main"] == {}
    there = repo.branches["trained"]
    assert json.loads(there["config.json"])["dtype"] == "bfloat16"
    assert len([name for name in there if name.endswith(".safetensors")]) > 2
    assert set(held) == {1}
    assert list(work.iterdir()) == []
    report = json.loads(there["fvlm_export.json"])
    assert (report["metrics"], report["data"]) == ({"loss": 0.5}, ["me/receipts"])
    assert report["verified"]["weights"]
    assert not any(hub_module.TOKEN.encode() in content for content in there.values())
    done = push(hub, adapter, hub_module.TOKEN, tmp_path, "--create-pr", "--no-verify", "--save-method", "lora")
    assert json.loads(done.stdout)["url"] == f"{hub.url}/me/model/discussions/1"
    assert "adapter_config.json" in repo.branches["refs/pr/1"]
    assert repo.branches["main"] == {}


def test_the_token_is_on_no_command_line(hub: Any, hub_module: Any, adapter: Path, tmp_path: Path) -> None:
    """While a push runs, no process of this machine shows the token to `ps`."""
    shown: list[bytes] = []

    def look() -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                shown.append(path.read_bytes())

    hub.on_put = look
    assert push(hub, adapter, hub_module.TOKEN, tmp_path).returncode == 0
    assert any(b"push" in line and b"me/model" in line for line in shown), "the push itself was seen"
    assert not any(hub_module.TOKEN.encode() in line for line in shown)


def test_a_run_pushes_what_it_saved(hub: Any, hub_module: Any, qwen2_vl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}', encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        f"""
model: {{name: {qwen2_vl_folder}, precision: 16bit, token: "${{oc.env:MY_TOKEN}}"}}
lora: {{r: 2}}
data: {{train: rows.jsonl}}
train: {{max_steps: 1, per_device_train_batch_size: 1, gradient_accumulation_steps: 1}}
save: {{output_dir: run, push: me/run, private: true}}
""",
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "MY_TOKEN": hub_module.TOKEN,
    }
    environment.pop("HF_TOKEN", None)
    script = str(Path(sys.executable).with_name("fvlm"))
    done = subprocess.run(
        [script, "train", "config.yaml", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["pushed_to"].startswith(f"{hub.url}/me/run/commit/")
    assert json.loads((tmp_path / "run/run.json").read_text()) == record
    there = hub.repos["me/run"].branches["main"]
    saved = tmp_path / "run/adapter/adapter_model.safetensors"
    assert there["adapter_model.safetensors"] == saved.read_bytes()
    assert hub.repos["me/run"].private
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or hub_module.TOKEN.encode() not in path.read_bytes(), path


def test_a_token_without_rights_is_a_remote_failure(hub: Any, hub_module: Any, adapter: Path, tmp_path: Path) -> None:
    done = push(hub, adapter, hub_module.READ_ONLY, tmp_path, "--save-method", "lora")
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 5
    assert "write" in done.stderr
    assert hub.repos == {}
