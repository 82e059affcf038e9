"""Tiny checkpoints, adapters and probe inputs for the tests of fvlm_export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.testing import FAMILIES, tiny_checkpoint

MERGED = ["q_proj", "v_proj", "down_proj", "up_proj"]


torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other are slower than one


class Tools:
    """What the tests share; handed to them as a fixture because test files are imported apart."""

    families = FAMILIES
    targets = MERGED

    def __init__(self, folders: Callable[[str, torch.dtype], Path]) -> None:
        self._folders = folders
        self._processors: dict[Path, Any] = {}
        self._inputs: dict[Path, dict[str, torch.Tensor]] = {}

    def checkpoint(self, family: str = "qwen2_vl", dtype: torch.dtype = torch.float32) -> Path:
        """A tiny checkpoint's folder, made once a session; do not write to it."""
        return self._folders(family, dtype)

    def load(self, folder: Path, **kwargs: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **kwargs).eval()

    def processor(self, folder: Path) -> Any:
        if folder not in self._processors:
            self._processors[folder] = AutoProcessor.from_pretrained(folder)
        return self._processors[folder]

    def adapted(self, model: Any, *, seed: int = 0, size: float = 0.1, **config: Any) -> Any:
        """Put LoRA on a model and move every trainable value, as training would."""
        config.setdefault("target_modules", MERGED)
        torch.manual_seed(seed)  # PEFT draws A from the global generator
        peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()
        return self.trained(peft, seed=seed, size=size)

    def trained(self, model: Any, *, seed: int = 0, size: float = 0.1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param += (
                        torch.randn(param.shape, generator=generator).to(param) * size * max(float(param.std()), 0.1)
                    )
        return model

    def inputs(self, folder: Path) -> dict[str, torch.Tensor]:
        if folder not in self._inputs:
            self._inputs[folder] = self._make_inputs(folder)
        return self._inputs[folder]

    def _make_inputs(self, folder: Path) -> dict[str, torch.Tensor]:
        processor = self.processor(folder)
        image = Image.linear_gradient("L").resize((112, 84)).convert("RGB")
        content = [{"type": "image", "image": image}, {"type": "text", "text": "total amount due 4711"}]
        return dict(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
        )

    def logits(self, model: Any, folder: Path) -> torch.Tensor:
        dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs(folder).items()}
        with torch.no_grad():
            return model.eval()(**inputs).logits.float()

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """The largest difference, relative to the largest value."""
        return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str, dtype: torch.dtype) -> Path:
        if (family, dtype) not in made:
            place = tmp_path_factory.mktemp("base") / family
            made[family, dtype] = tiny_checkpoint(family, place, dtype=dtype)
        return made[family, dtype]

    return Tools(folder)


@pytest.fixture(scope="session")
def adapter(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained adapter for the tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("adapter")
    tools.adapted(tools.load(tools.checkpoint())).save_pretrained(folder)
    return folder
