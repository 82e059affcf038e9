"""What a family's builder hands over."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, ProcessorMixin


@dataclass(frozen=True)
class Blueprint:
    """A tiny config of a family and the family's real processor."""

    config: PretrainedConfig
    processor: ProcessorMixin
