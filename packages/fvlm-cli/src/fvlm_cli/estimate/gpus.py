"""Cards: their usable memory, and their speed by the vendor's data sheets.

Memory is what the driver leaves to programs (a little under the nominal size). Speed is dense matrix products in
bfloat16 (float16 where the card has no bfloat16 units) with fp32 accumulation, without sparsity; bandwidth is the
memory's.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvlm_cli.config.nearest import hint
from fvlm_core.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as people say.
        memory: usable, in GiB.
        tflops: dense half-precision matrix products, in 10¹² operations a second.
        bandwidth: of its memory, in GB/s.
        source: where the vendor says so; sparse figures are halved.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 178.0, 2250, 8000, "HGX B200, NVIDIA Blackwell Architecture Technical Brief"),
        Gpu("h200", 139.7, 989, 4800, "H200 Tensor Core GPU data sheet, SXM"),
        Gpu("h100", 79.1, 989, 3350, "H100 Tensor Core GPU data sheet, SXM"),
        Gpu("a100", 79.1, 312, 2039, "A100 Tensor Core GPU data sheet, 80 GB SXM"),
        Gpu("a100-40gb", 39.4, 312, 1555, "A100 Tensor Core GPU data sheet, 40 GB SXM"),
        Gpu("l40s", 44.4, 362, 864, "L40S data sheet"),
        Gpu("a6000", 47.4, 155, 768, "RTX A6000, NVIDIA Ampere GA102 Architecture white paper"),
        Gpu("5090", 31.3, 210, 1792, "GeForce RTX 5090, NVIDIA RTX Blackwell Architecture white paper"),
        Gpu("4090", 23.5, 165, 1008, "GeForce RTX 4090, NVIDIA Ada Architecture white paper"),
        Gpu("3090", 23.5, 71, 936, "GeForce RTX 3090, NVIDIA Ampere GA102 Architecture white paper"),
        Gpu("a10g", 22.0, 70, 600, "Amazon EC2 G5, A10G data sheet"),
        Gpu("l4", 22.0, 121, 300, "L4 Tensor Core GPU data sheet"),
        Gpu("v100", 15.7, 125, 900, "V100 Tensor Core GPU data sheet, 16 GB SXM2"),
        Gpu("t4", 14.6, 65, 320, "T4 Tensor Core GPU data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return a card by its name, or the one that is here by "here".

    Raises:
        ConfigError: there is no such card in the table, or none here.
    """
    if name == "here":
        return gpu_here()
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name} is not in the table of cards; {hint(name.lower(), [*GPUS, 'here'])}")
    return gpu


def gpu_here() -> Gpu:
    """Return the first card of this machine, its speed from the table.

    Raises:
        ConfigError: there is none, or its speed is not known.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"--gpu here: there is no GPU here; name one of {', '.join(GPUS)}.")
    name = torch.cuda.get_device_name(0)
    words = name.lower().replace("-", " ").split()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    near = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in words]
    if not near:
        raise ConfigError(f"--gpu here: the speed of {name} is not known; name one of {', '.join(GPUS)} instead.")
    best = min(near, key=lambda gpu: abs(gpu.memory - memory))
    return Gpu(name, round(memory, 1), best.tflops, best.bandwidth, best.source)
