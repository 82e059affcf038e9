"""Torn inputs, damaged output and full disks: a clear error, and never half a model."""

from __future__ import annotations

import errno
import json
import multiprocessing
import resource
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_export import safetensor_writer, save_pretrained_merged
from fvlm_export.safetensor_writer import SafetensorWriter
from fvlm_export.verify import _same_bytes

pytestmark = pytest.mark.filterwarnings("ignore")


def edit(folder: Path, to: Path, file: str, change: Any) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / file)
    change(tensors)
    save_file(tensors, to / file, metadata={"format": "pt"})
    return to


def merge(adapter: Path, out: Path, base: Path, **kwargs: Any) -> Path:
    return save_pretrained_merged(adapter, out, base=base, progress=False, **kwargs)


def empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_torn_base(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    cut = shutil.copytree(base, tmp_path / "cut")
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate((cut / "model.safetensors").stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated: tensor"):
        merge(adapter, outputs / "out", cut)
    (cut / "model.safetensors").write_bytes(b"\xff" * 4)
    with pytest.raises(CheckpointError, match="truncated"):
        merge(adapter, outputs / "out", cut)
    lacking = edit(base, tmp_path / "lacking", "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 parameters .* 'model.language_model.norm.weight'"):
        merge(adapter, outputs / "out", lacking)
    sharded = tmp_path / "sharded"
    tools.load(base).save_pretrained(sharded, max_shard_size="400KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[-1]
    (sharded / gone).unlink()
    with pytest.raises(CheckpointError, match=gone):
        merge(adapter, outputs / "out", sharded)
    with pytest.raises(CheckpointError, match="no such folder"):
        merge(adapter, outputs / "out", tmp_path / "nowhere")
    assert empty(outputs)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"weights": {}}', "holds no weight_map"),
        ('{"weight_map": {"lm_head.weight": 1}}', "holds no weight_map"),
        ('{"weight_map": {"lm_head.weight": "model-9.safetensors"}}', r"lacks model-9\.safetensors"),
        ('{"weight_map": {"lm_head.weight": "SHARD"}}', r"lacks \d+ parameters"),
    ],
)
def test_a_base_with_a_broken_index(tools: Any, adapter: Path, tmp_path: Path, written: str, sentence: str) -> None:
    base = tmp_path / "base"
    tools.load(tools.checkpoint()).save_pretrained(base, max_shard_size="400KB")
    shard = min(path.name for path in base.glob("*.safetensors"))
    (base / "model.safetensors.index.json").write_text(written.replace("SHARD", shard))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        merge(adapter, tmp_path / "out", base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_another_shard_or_is_left_over_misleads_nobody(
    tools: Any, adapter: Path, tmp_path: Path
) -> None:
    """What a file holds its header says; and transformers reads one file rather than an index beside it."""
    base, index = tmp_path / "base", "model.safetensors.index.json"
    tools.load(tools.checkpoint()).save_pretrained(base, max_shard_size="400KB")
    content = json.loads((base / index).read_text())
    shards = sorted(set(content["weight_map"].values()))
    following = dict(zip(shards, [*shards[1:], shards[0]], strict=True))
    content["weight_map"] = {name: following[shard] for name, shard in content["weight_map"].items()}
    (base / index).write_text(json.dumps(content))
    one = shutil.copytree(tools.checkpoint(), tmp_path / "one")
    (one / index).write_text(json.dumps(content))
    merged = [
        load_file(merge(adapter, tmp_path / name, folder) / "model.safetensors")
        for name, folder in {"whole": tools.checkpoint(), "mixed": base, "left over": one}.items()
    ]
    for other in merged[1:]:
        assert other.keys() == merged[0].keys()
        assert all(torch.equal(value, merged[0][name]) for name, value in other.items())


def test_torn_adapter(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    file = "adapter_model.safetensors"
    first = next(name for name in load_file(adapter / file) if "lora_B" in name)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first][0, 0] = float("nan")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 128)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first] = torch.ones(7, 4)

    cases = [
        ("nan", poison, rf"'{first}' holds NaN"),
        ("lacking", lambda t: t.pop(first), rf"lacks '{first}'"),
        ("extra", add, r"holds '.*layers\.9\.self_attn.*', which fits no tensor"),
        ("wide", widen, "does not fit the base"),
    ]
    for name, change, sentence in cases:
        torn = edit(adapter, tmp_path / name, file, change)
        with pytest.raises(CheckpointError, match=sentence) as caught:
            merge(torn, outputs / "out", base)
        assert "\n" not in str(caught.value)
    saved = tmp_path / "saved"
    tools.adapted(tools.load(base), modules_to_save=["merger"]).save_pretrained(saved)
    module = next(name for name in load_file(saved / file) if "merger.mlp.0.weight" in name)
    torn = edit(saved, tmp_path / "without", file, lambda t: t.pop(module))
    with pytest.raises(CheckpointError, match=rf"lacks '{module}'"):
        merge(torn, outputs / "out", base)
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / file).rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        merge(pickled, outputs / "out", base)
    (pickled / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read"):
        merge(pickled, outputs / "out", base)
    assert empty(outputs)


def test_bad_arguments(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    for arguments, sentence in [
        ({"save_method": "gguf"}, "save_method='gguf' is unknown"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples'"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"base": "live"}, "needs the live model"),
        ({"adapters": {str(tmp_path): 1.0}}, "holds no adapter_config.json"),
        ({"save_method": "lora", "dtype": "float16", "base": None}, "leave dtype= out"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            save_pretrained_merged(adapter, tmp_path / "out", **{"base": base, **arguments}, progress=False)
    with pytest.raises(ConfigError, match="is a dict"):
        save_pretrained_merged({}, tmp_path / "out")
    with pytest.raises(ConfigError, match="no save_pretrained"):
        save_pretrained_merged(adapter, tmp_path / "out", "processor", base=base, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        merge(adapter, tmp_path / "file", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("target", "place", "sentence"),
    [
        ("down_proj.weight", 2, "recomputed in fp64"),
        ("norm.weight", 0, "differs from the base"),
        ("embed_tokens.weight", -1, "differs from the base"),
    ],
)
def test_what_is_written_wrong_is_not_published(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, place: int, sentence: str
) -> None:
    """One bit flips on the way to the disk: in a merged tensor, and in untouched ones."""
    real = SafetensorWriter.write
    damaged: list[str] = []

    def write(self: SafetensorWriter, name: str, pieces: Iterable[memoryview]) -> None:
        data = bytearray(b"".join(pieces))
        if name.endswith(target) and not damaged:
            damaged.append(name)
            data[place] ^= 0x10
        real(self, name, [memoryview(data)])

    monkeypatch.setattr(SafetensorWriter, "write", write)
    with pytest.raises(ExportError, match=f"{target}.*{sentence}"):
        merge(adapter, tmp_path / "out", tools.checkpoint())
    assert damaged
    assert empty(tmp_path)


@pytest.mark.parametrize("length", [1, 7, 8, 13, 64, 1001])
def test_one_byte_anywhere_tells_two_pieces_apart(length: int) -> None:
    piece = bytearray(range(256)) * 4
    assert _same_bytes(memoryview(piece)[:length], memoryview(bytearray(piece))[:length])
    for place in range(length):
        other = bytearray(piece)
        other[place] ^= 0x80
        assert not _same_bytes(memoryview(piece)[:length], memoryview(other)[:length]), place


def test_a_header_written_wrong_is_not_published(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = safetensor_writer._header
    monkeypatch.setattr(safetensor_writer, "_header", lambda infos: real(infos).replace(b"norm1", b"morn1", 1))
    with pytest.raises(ExportError, match=r"does not hold .*1.* as planned"):
        merge(adapter, tmp_path / "out", tools.checkpoint())
    assert empty(tmp_path)


def test_nan_in_the_base_does_not_pass(tools: Any, adapter: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    torn = edit(
        tools.checkpoint(), tmp_path / "torn", "model.safetensors", lambda t: t[name].view(-1)[1:2].fill_(torch.nan)
    )
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with pytest.raises(ExportError, match=rf"'{name}' holds NaN or infinity, already in the base"):
        merge(adapter, outputs / "out", torn)
    assert empty(outputs)


def test_a_reload_that_answers_otherwise_is_not_published(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets the adapter passes every check of tensors against its own plan; the logits tell."""
    model = tools.adapted(tools.load(tools.checkpoint()))
    monkeypatch.setattr("fvlm_export.from_live.changes_of", lambda *args: {"lm_head.weight": []})
    with pytest.raises(ExportError, match="logits are off"):
        save_pretrained_merged(model, tmp_path / "out", tools.processor(tools.checkpoint()), progress=False)
    assert empty(tmp_path)


def merge_with_limit(adapter: Path, out: Path, base: Path, say: Any) -> None:
    """Merge in a process whose files may not grow beyond 300 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        merge(adapter, out, base)
    except ExportError as error:
        say.send(str(error))
    say.close()


def test_disk_that_fills_up(tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tools.checkpoint()
    context = multiprocessing.get_context("fork")
    hear, say = context.Pipe(duplex=False)
    process = context.Process(target=merge_with_limit, args=(adapter, tmp_path / "out", base, say))
    process.start()
    say.close()
    assert "cannot be written (File too large)" in hear.recv()
    process.join()
    assert empty(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ExportError, match=r"GB free and the result needs") as caught:
        merge(adapter, tmp_path / "out", base)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC, "by which the command's exit code is chosen"
    assert empty(tmp_path)


def test_folder_that_cannot_be_written(tools: Any, adapter: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises((ExportError, ConfigError)):
        merge(adapter, blocked / "out", tools.checkpoint())


def test_merged_value_that_overflows_is_an_error(tools: Any, tmp_path: Path) -> None:
    model = tools.adapted(tools.load(tools.checkpoint()))
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data *= 1e9
    with pytest.raises(ExportError, match=r"q_proj.* NaN or infinity in torch.float16"):
        save_pretrained_merged(model, tmp_path / "out", dtype="float16", progress=False)
    assert empty(tmp_path)
