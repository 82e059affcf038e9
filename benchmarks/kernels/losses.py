"""Cases of ``linear_cross_entropy`` and ``cross_entropy``.

Both of Liger's make their gradient in the forward pass, and so does our ``linear_cross_entropy``: what is timed is the
forward pass alone without a gradient, as in evaluation, and both passes together, as in training.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider, liger, normal, present, size

from fvlm_kernels import cross_entropy, linear_cross_entropy

HEADS = {  # model: width of the hidden states, vocabulary
    "Qwen2-VL-2B": (1536, 151936),
    "Qwen2.5-VL-7B": (3584, 152064),
    "Llama-3.2-11B-Vision": (4096, 128256),
    "Gemma 3 4B": (2560, 262208),
}
ROWS = (2048, 8192)
LOGIT_BYTES = 2**30 + 2**28  # of the logits that cross_entropy is given: several providers keep fp32 copies of them


def _labels(device: torch.device, rows: int, vocabulary: int, ignored: bool) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(7)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    if ignored:  # a prompt and its images, then an answer
        labels[: rows * 2 // 3] = -100
    return labels


def _head_and_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> Any:
    """What ForCausalLMLoss and the head before it compute: every row's logits, which it copies to fp32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.nn.functional.cross_entropy(logits, labels)


def _liger_head(fn: Provider | None) -> Provider | None:
    return fn and (lambda hidden, weight, labels, rows: fn(hidden, weight, labels))


def _head_case(model: str, rows: int, ignored: bool, trained: bool, tiny: bool) -> Case:
    k, v = (16, 64) if tiny else HEADS[model]
    m = 6 if tiny else rows
    kept = m - m * 2 // 3 if ignored else m

    def make(device: torch.device) -> Inputs:
        labels = _labels(device, m, v, ignored)
        found = (labels != -100).nonzero().squeeze(1)  # the collator's part
        hidden, weight = normal(device, m, k), normal(device, v, k, seed=1) * k**-0.5
        return {"hidden": hidden, "weight": weight, "labels": labels, "rows": found}

    product = 2 * kept * k * v
    name = f"{model}, {rows} rows, {'a third' if ignored else 'all'} labelled{', head trained' if trained else ''}"
    return Case(
        "linear_cross_entropy", name, make,
        present(
            torch=_head_and_loss, compile=torch.compile(_head_and_loss),
            liger=_liger_head(liger("liger_fused_linear_cross_entropy")), fvlm=linear_cross_entropy,
        ),
        partial(linear_cross_entropy, impl="torch"), ["hidden", "weight"] if trained else ["hidden"], together=True,
        forward_flops=product, backward_flops=product * (1 + trained),
        shape={"rows": m, "kept": kept, "width": k, "vocabulary": v},
    )  # fmt: skip


def linear_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``linear_cross_entropy``: a frozen head everywhere, and one that is trained."""
    models = [next(iter(HEADS))] if tiny else list(HEADS)
    cases = [_head_case(model, rows, ignored, False, tiny) for model in models for rows in ROWS for ignored in (1, 0)]
    return [*cases, _head_case(models[0], ROWS[-1], True, True, tiny)]


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What ForCausalLMLoss computes."""
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def _liger_loss(fn: Provider | None) -> Provider | None:
    return fn and (lambda logits, labels: fn(logits, labels))


def loss_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``cross_entropy``."""
    cases = []
    for model, (_, vocabulary) in HEADS.items():
        for ignored in (True, False):
            m, v = (6, 64) if tiny else (LOGIT_BYTES // (2 * vocabulary) // 1024 * 1024, vocabulary)
            kept = m - m * 2 // 3 if ignored else m

            def make(device: torch.device, m: int = m, v: int = v, ignored: bool = ignored) -> Inputs:
                return {"logits": normal(device, m, v), "labels": _labels(device, m, v, ignored)}

            cases.append(
                Case(
                    "cross_entropy", f"{model}, {m} rows, {'a third' if ignored else 'all'} labelled", make,
                    present(
                        torch=_loss, compile=torch.compile(_loss), liger=_liger_loss(liger("liger_cross_entropy")),
                        fvlm=cross_entropy,
                    ),
                    partial(cross_entropy, impl="torch"), ["logits"], together=True,
                    forward_bytes=size(kept, v), backward_bytes=size(kept, v) + size(m, v),
                    shape={"rows": m, "kept": kept, "vocabulary": v},
                )
            )  # fmt: skip
    return cases
