"""Pushing with the real huggingface_hub client to a Hub on this machine: bytes, retries, errors, nothing half done."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from fvlm_core.errors import ConfigError, ExportError
from fvlm_export import push_to_hub_merged, read_report, save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")
SHARD = r"/lfs/"


@pytest.fixture(scope="module")
def model(tools: Any) -> Any:
    return tools.adapted(tools.load(tools.checkpoint()))


def push(model: Any, tools: Any, tokens: dict[str, str], **kwargs: Any) -> str:
    kwargs.setdefault("token", tokens["write"])
    processor = tools.processor(tools.checkpoint())
    return push_to_hub_merged(
        model,
        kwargs.pop("repo_id", "me/model"),
        processor,
        max_shard_size="400KB",
        progress=False,
        verify=False,
        **kwargs,
    )


def test_round_trip(hub: Any, model: Any, tools: Any, tokens: Any, tmp_path: Path) -> None:
    url = push(model, tools, tokens, private=True, commit_message="the first")
    repo = hub.repos["me/model"]
    assert url.startswith(f"{hub.url}/me/model/commit/")
    assert repo.private
    assert repo.commits == [("main", "the first")], "one commit, not one per file"
    got = huggingface_hub.snapshot_download("me/model", local_dir=tmp_path / "got", token=tokens["write"])
    report = read_report(got)
    assert len(report.files) > 1
    for name, digest in report.files.items():
        assert hashlib.sha256((Path(got) / name).read_bytes()).hexdigest() == digest
    base = tools.checkpoint()
    assert tools.distance(tools.logits(tools.load(Path(got)), Path(got)), tools.logits(model, base)) < 1e-5
    assert not any(tokens["write"].encode() in content for content in repo.branches["main"].values())


def test_a_cut_upload_is_sent_again_and_a_failed_push_goes_on(hub: Any, model: Any, tools: Any, tokens: Any) -> None:
    hub.fail("PUT", SHARD, "cut", times=2)
    push(model, tools, tokens)
    first = len(hub.puts)
    assert first > 1
    assert len(set(hub.puts)) == first, "no object was stored twice"

    hub.repos.clear()
    hub.objects.clear()
    hub.puts.clear()
    hub.fail("POST", "/commit/", 500, times=1000)
    with pytest.raises(ExportError, match=r"answered 500 .* push again"):
        push(model, tools, tokens)
    assert hub.repos["me/model"].branches["main"] == {}, "nothing shows before the commit"
    hub.faults.clear()
    push(model, tools, tokens)
    assert len(hub.puts) == first, "what was uploaded is not sent twice"
    assert hub.repos["me/model"].commits


def test_an_upload_that_never_gets_through(hub: Any, model: Any, tools: Any, tokens: Any) -> None:
    hub.fail("PUT", SHARD, "cut", times=1000)
    with pytest.raises(ExportError, match="check the network and push again"):
        push(model, tools, tokens)
    assert hub.repos["me/model"].branches["main"] == {}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_are_retried(hub: Any, model: Any, tools: Any, tokens: Any, status: int) -> None:
    hub.fail("POST", "/commit/", status, times=2)
    hub.fail("POST", "/api/repos/create", status, times=1)
    push(model, tools, tokens)
    assert len(hub.repos["me/model"].commits) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"token": "hf_wrong"}, "asks for a valid token"),
        ({"token": "read"}, "may not write to 'me/model'"),
        ({"repo_id": "someone/model"}, "may not write to 'someone/model'"),
    ],
)
def test_refusals_in_one_sentence_before_any_work(
    hub: Any, model: Any, tools: Any, tokens: Any, caplog: Any, arguments: dict[str, str], sentence: str
) -> None:
    if "token" in arguments:
        arguments = {"token": tokens.get(arguments["token"], arguments["token"])}
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ExportError, match=sentence) as caught:
        push(model, tools, tokens, **arguments)
    text = str(caught.value) + caplog.text
    assert "hf_" not in text
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not any("preupload" in line for line in hub.seen)


def test_gated_missing_and_rate_limited(hub: Any, model: Any, tools: Any, tokens: Any) -> None:
    push(model, tools, tokens, create_pr=False)
    hub.fail("POST", "/preupload/", 403, times=1000, **{"X-Error-Code": "GatedRepo"})
    with pytest.raises(ExportError, match="is gated"):
        push(model, tools, tokens)
    hub.faults.clear()
    hub.fail("POST", "/preupload/", 404, times=1000, **{"X-Error-Code": "RepoNotFound"})
    with pytest.raises(ExportError, match="does not exist or is not visible"):
        push(model, tools, tokens)
    hub.faults.clear()
    hub.fail("POST", "/preupload/", 429, times=1000)
    with pytest.raises(ExportError, match="limits the rate"):
        push(model, tools, tokens)
    with pytest.raises(ConfigError, match="'a/b/c'"):
        push(model, tools, tokens, repo_id="a/b/c")


def test_branch_and_pull_request(hub: Any, model: Any, tools: Any, tokens: Any) -> None:
    push(model, tools, tokens, revision="trained")
    repo = hub.repos["me/model"]
    assert "config.json" in repo.branches["trained"]
    assert repo.branches["main"] == {}
    url = push(model, tools, tokens, create_pr=True)
    assert url == f"{hub.url}/me/model/discussions/1"
    assert repo.branches["main"] == {}
    assert "config.json" in repo.branches["refs/pr/1"]


def test_stale_weights_and_adapters_do_not_survive(hub: Any, model: Any, tools: Any, tokens: Any) -> None:
    push(model, tools, tokens, save_method="lora")
    main = hub.repos["me/model"].branches["main"]
    assert "adapter_config.json" in main
    main["model.safetensors"] = b"old weights in one file"
    main["notes.txt"] = b"mine"
    push(model, tools, tokens)
    names = set(hub.repos["me/model"].branches["main"])
    assert not {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} & names
    assert "notes.txt" in names
    push(model, tools, tokens, save_method="lora")
    assert "model.safetensors.index.json" in hub.repos["me/model"].branches["main"], (
        "an adapter push leaves a model alone"
    )


def test_staging_folder_is_gone(hub: Any, model: Any, tools: Any, tokens: Any, tmp_path: Path) -> None:
    push(model, tools, tokens, working_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.is_tensor(next(model.parameters()))


def test_shards_are_deleted_as_they_are_sent(hub: Any, model: Any, tools: Any, tokens: Any, tmp_path: Path) -> None:
    push(model, tools, tokens)
    whole = {n: c for n, c in hub.repos["me/model"].branches["main"].items() if n.endswith(".safetensors")}
    hub.repos.clear()
    hub.objects.clear()
    held: list[int] = []
    hub.on_put = lambda: held.append(len(list(tmp_path.rglob("*.safetensors"))))
    push(model, tools, tokens, working_dir=tmp_path, delete_uploaded=True)
    assert held == [1] * len(whole)
    again = {n: c for n, c in hub.repos["me/model"].branches["main"].items() if n.endswith(".safetensors")}
    assert again == whole


def test_a_finished_folder_is_sent_as_it_is(hub: Any, model: Any, tools: Any, tokens: Any, tmp_path: Path) -> None:
    folder = save_pretrained_merged(model, tmp_path / "merged", tools.processor(tools.checkpoint()), progress=False)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    push_to_hub_merged(folder, "me/model", token=tokens["write"], progress=False)
    sent = hub.repos["me/model"].branches["main"]
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"xx")
    with pytest.raises(ExportError, match=r"is not what fvlm_export\.json"):
        push_to_hub_merged(folder, "me/model", token=tokens["write"], progress=False)
