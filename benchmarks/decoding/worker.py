"""Decode with one stack and print what was measured as one line of JSON; `run` starts it.

    python -m benchmarks.decoding.worker STACK FOLDER [--workload ocr] [--tokens 128] [--rows 1] [--profile]

A process of its own for each stack. The adapters' matrices are drawn from a seed, so that they count and are the same
for all. ``--profile`` prints where the device's time for a token goes, to standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

STARTED = time.time()
SHORT = 4
"""Tokens of the short answer; the difference of a long and a short one is what decoding costs, without the prompt."""


def decode(options: argparse.Namespace) -> dict[str, object]:
    """Load, decode, measure."""
    from benchmarks.training.stacks import STACKS

    if options.stack == "unsloth":
        import unsloth  # noqa: F401  # it must come before transformers
    import torch

    model, processor, _ = STACKS[options.stack](options.folder, False)
    _draw_adapters(model)
    prepare(options.stack, model)
    batch = prompt(processor, options.workload, options.rows, model.device)
    loaded = time.time() - STARTED
    clock = AnswerClock(model, batch)
    first_call = clock(8)
    clock(options.tokens)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    long = [clock(options.tokens) for _ in range(options.repeats)]
    short = [clock(SHORT) for _ in range(options.repeats)]
    alone = [clock(1) for _ in range(options.repeats)]
    token_s = (statistics.median(long) - statistics.median(short)) / (options.tokens - SHORT)
    if options.profile:
        _profile(clock)
    return {
        "stack": options.stack,
        "workload": options.workload,
        "rows": options.rows,
        "tokens": options.tokens,
        "prompt": batch["input_ids"].shape[1],
        "tokens_s": options.rows / token_s,
        "token_s": token_s,
        "first_token_s": statistics.median(alone),
        "first_call_s": first_call,
        "to_ready_s": loaded,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "read_bytes": _bytes_read(model),
        "answer": clock.rows[:, batch["input_ids"].shape[1] :].tolist(),
    }


class AnswerClock:
    """Times calls of ``generate`` that give a certain number of tokens, as users call it in training's precision."""

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        self._model, self._batch = model, batch
        self.rows: Any = None

    def __call__(self, tokens: int) -> float:
        """Return the seconds of one call."""
        import torch

        cuda = torch.cuda.is_available()
        wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        casting = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        wait()
        begun = time.perf_counter()
        with torch.no_grad(), casting:
            rows = self._model.generate(
                **self._batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True
            )
        wait()
        taken = time.perf_counter() - begun
        if self.rows is None or rows.shape[1] > self.rows.shape[1]:
            self.rows = rows
        return taken


def _draw_adapters(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def prepare(stack: str, model: Any) -> None:
    """Bring a stack's model from training to decoding."""
    if model.device.type == "cpu":
        from fvlm_core.quantized import keep_stored_layout

        keep_stored_layout(model)  # else bitsandbytes computes in bf16 on some CPUs, and answers differ
    if stack in ("fvlm", "unsloth"):
        __import__("fvlm_vision" if stack == "fvlm" else "unsloth").FastVisionModel.for_inference(model)
        return
    model.eval()
    model.gradient_checkpointing_disable()
    model.config.use_cache = model.config.get_text_config().use_cache = True


def prompt(processor: Any, workload: str, rows: int, device: Any) -> dict[str, Any]:
    """Return questions about one image each, padded on the left."""
    import torch
    from benchmarks.training.workloads import WORKLOADS, samples

    asked = [sample["messages"][:1] for sample in samples(WORKLOADS[workload], rows)]
    processor.tokenizer.padding_side = "left"
    texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in asked]
    images = [[turn[0]["content"][0]["image"]] for turn in asked]
    bos = processor.tokenizer.bos_token
    plain = {} if bos is None or not texts[0].startswith(bos) else {"add_special_tokens": False}
    made = processor(text=texts, images=images, return_tensors="pt", padding=True, **plain).to(device)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def _bytes_read(model: Any) -> int:
    """Return how many bytes of weights a step reads at least: of the language model's layers, adapters and head."""
    from fvlm_core.arch import facts_for, task_model

    inner = task_model(model)
    language = inner.get_submodule(facts_for(model).language[0])
    parameters = [*language.layers.parameters(), *inner.get_output_embeddings().parameters()]
    states = [getattr(p, "quant_state", None) for p in parameters]
    scales = [state.absmax for state in states if state is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *scales))


def _profile(clock: AnswerClock) -> None:
    from torch.profiler import ProfilerActivity, profile

    tokens = 32
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        clock(tokens)
    table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60)
    print(f"one answer of {tokens} tokens, its prompt included\n{table}", file=sys.stderr)


def main() -> None:
    """Parse the arguments, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack")
    parser.add_argument("folder")
    parser.add_argument("--workload", default="ocr")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    print("RESULT " + json.dumps(decode(parser.parse_args())))


if __name__ == "__main__":
    main()
