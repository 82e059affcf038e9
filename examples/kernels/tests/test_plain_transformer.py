"""The example trains both ways to the same losses, holds less, and needs nothing but torch and fvlm_kernels."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    yield __import__("plain_transformer")
    sys.modules.pop("plain_transformer", None)


def test_same_losses_with_less(example, capsys):
    assert example.main(["--steps", "12", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(12))
    assert float(rows[-1][1]) < float(rows[0][1]) - 1.5  # it learns to count
    assert "largest tensor: plain 1.5 MiB, fused 1.0 MiB" in printed


def test_a_wrong_kernel_is_seen(example, monkeypatch, capsys):
    def off(hidden, head, targets):
        return example.linear_cross_entropy(hidden * 1.01, head, targets)

    monkeypatch.setattr(example, "FUSED", replace(example.FUSED, loss=off))
    assert example.main(["--steps", "2", "--device", "cpu"]) == 1
    monkeypatch.setattr(example, "FUSED", example.PLAIN)
    assert example.main(["--steps", "2", "--device", "cpu"]) == 1  # the same losses, but nothing saved
    assert "plain 1.5 MiB, fused 1.5 MiB" in capsys.readouterr().out


@pytest.mark.gpu
def test_same_losses_with_less_on_a_gpu(example):
    assert torch.cuda.is_available()
    assert example.main(["--steps", "4", "--device", "cuda"]) == 0


def test_it_needs_torch_and_the_kernels_alone():
    tree = ast.parse((HERE / "plain_transformer.py").read_text(encoding="utf-8"))
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch", "fvlm_kernels"}


def test_bad_arguments_are_usage_errors(example, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(["--steps", "1"])
    assert caught.value.code == 2
    assert "--steps is 1" in capsys.readouterr().err
