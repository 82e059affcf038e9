"""Where a step asks the device for a value, and so waits for it."""

from __future__ import annotations

import traceback
import warnings
from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount"}
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"tolist", "numpy", "cpu"}
_PACKAGES = ("/transformers/", "/peft/", "/bitsandbytes/", "/fvlm_core/", "/fvlm_kernels/")
_WAITED = "called a synchronizing CUDA operation"
_CHECKS = {"check_labels", "_check_rows"}
"""Of values, in fvlm_kernels: where they lie on the CPU alone."""


class Waits:
    """Notes the functions in which the device is waited for: on a GPU as CUDA tells it, on the CPU by the operators.

    Args:
        device: of the model.

    Attributes:
        found: the innermost functions outside torch; "a backward pass" where none is known.
        told: the ends of their tracebacks. An operator's wait in a backward pass is told where that pass was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.found, self.told = device, set(), []
        self._stack = ExitStack()

    def __enter__(self) -> Waits:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            # A process's first call warns as well, of what this mode does not detect.
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
            warnings.showwarning = lambda message, *_: self._note() if _WAITED in str(message) else None
        else:
            self._stack.enter_context(_Copies(self._note))
            self._stack.enter_context(_Operators(self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def _note(self) -> None:
        stack = traceback.extract_stack()
        frames = [f for f in stack if any(part in f.filename for part in _PACKAGES)]
        names = [frame.name for frame in frames if not frame.name.startswith("<")]
        name = names[-1] if names else "a backward pass"
        if name not in _CHECKS:
            self.found.add(name)
            self.told.append("".join(traceback.format_list(stack[-12:-1])))


class _Operators(TorchDispatchMode):
    def __init__(self, note) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        reads = name in _READS or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None)
        if name in _BY_MASK:
            masks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
            reads = masks and (name == "index" or args[2].numel() > 1)  # one value is filled in without asking
        if reads:
            self.note()
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _COPIES:
            self.note()
        return func(*args, **(kwargs or {}))
