"""Triton's interpreter, repaired: the kernels' tests run with it on a machine without a GPU.

How a test file uses it (the conftest.py beside this file has imported it before any test module, so order is no matter):

    from policy.kernels import quantize_triton                # at the top of the test file: interpreted from here on
    from policy.kernels.quantize import quantize_rows
    from tests.policy.kernels.interpreter import DEVICE        # "cpu", or "cuda" on a machine with a Hopper GPU

    q, s = quantize_rows(torch.randn(128, 256, device=DEVICE), backend="triton")   # runs here, in the test's process

No environment variable has to be set. On a Hopper GPU nothing is repaired and the same tests run the compiled kernels
(`TRITON_INTERPRET=1` keeps them interpreted there). Child processes of a test are not interpreted; one that is to be
imports this module before any `*_triton` module. Kernels of a test file's own are written with `@triton.jit` as usual.

What triton 3.6 to 3.9 do wrongly when they interpret, and what is done here:
- casts to and from fp8 and bf16 lose carries, truncate, wrap above the largest value: torch's casts take their place,
  which round to nearest even; fp8 saturates and keeps NaN, as cvt.rn.satfinite does on the GPU;
- bf16 is a bare uint16: `tl.dot` and casts to and from whole numbers convert first; any other arithmetic on bf16 is a
  TypeError, because kernels are to convert to float32 before they compute;
- 3.6 rounds twice in `tl.fma`, and cannot `range` over a loaded number with numpy 2.4;
- autotuning and driver questions need a GPU: a driver of no device answers, and the first configuration wins;
- every call of a library function patches triton.language anew: once per launch is enough, and two fifths faster.
What it cannot show: races, barriers, alignment, and the accumulation inside Hopper's matrix unit.
"""

from __future__ import annotations

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_TORCH_TYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
# Operations of the builder that take bf16 as it is: they move or reinterpret bits.
_BF16_ARITHMETIC = ("create_fa", "create_fm", "create_fd", "create_fs", "create_fr", "create_fn", "create_fcmp")
_BF16_ARITHMETIC += ("create_max", "create_min", "create_exp", "create_log", "create_sqrt", "create_rsqrt")
_BF16_ARITHMETIC += ("create_precise", "create_approx", "create_clampf", "create_sin", "create_cos", "create_floor")
_BF16_ARITHMETIC += ("create_ceil", "create_erf")
_BITWISE = {"create_fabs"}


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not _has_hopper()
DEVICE = "cpu" if INTERPRETED else "cuda"


def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """The bits (unsigned) of `values`, which hold triton type `source`, as type `target`: torch's cast, saturating to fp8."""
    if source not in _TORCH_TYPES or target not in _TORCH_TYPES:
        raise TypeError(f"the interpreter's repair knows no cast from {source} to {target}")
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}").copy()
    numbers = torch.from_numpy(bits).view(_TORCH_TYPES[source])
    if target in _LARGEST:
        # Through float32 is exact for all but float64, and clamp keeps NaN.
        wide = numbers if source == tl.float64 else numbers.float()
        numbers = wide.clamp(-_LARGEST[target], _LARGEST[target])
    cast = numbers.to(_TORCH_TYPES[target])
    return cast.view(_UNSIGNED[target.primitive_bitwidth]).numpy().reshape(values.shape)


def _as_float32(handle: Any, interpreter: Any) -> Any:
    if handle.dtype.scalar not in (tl.bfloat16, tl.float8e4nv, tl.float8e5):
        return handle
    return interpreter.TensorHandle(convert_float(handle.data, handle.dtype.scalar, tl.float32).view("f4"), tl.float32)


def _repair_casts(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        bits = convert_float(source.data, source.dtype.scalar, target.scalar)
        return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(target)), target.scalar)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar in _TORCH_TYPES and target.scalar in _TORCH_TYPES:
            return fp_to_fp(self, source, target, None)
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return plain_cast(self, source, target)
        if source.dtype.scalar == tl.bfloat16:
            return plain_cast(self, _as_float32(source, interpreter), target)
        # Whole numbers up to 2^53 are exact in float64, so bf16 is rounded once.
        return fp_to_fp(self, plain_cast(self, source, tl.float64), target, None)

    def dot(self: Any, a: Any, b: Any, c: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = _as_float32(a, interpreter), _as_float32(b, interpreter)
        return plain_dot(self, a, b, c, input_precision, max_num_imprecise_acc)

    builder.create_fp_to_fp, builder.cast_impl, builder.create_dot = fp_to_fp, cast, dot


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 rounded once: the float64 sum is rounded to odd, so that the last rounding is the only one."""
    product = x.astype(np.float64) * y
    total = product + z
    # The part lost in the float64 sum (Knuth's two-sum); where there is one and the last bit is even, step towards it.
    back = total - product
    lost = (product - (total - back)) + (z - back)
    even = (total.view(np.int64) & 1) == 0
    step = np.isfinite(total) & (lost != 0) & even
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where(step, odd, total).astype(np.float32)


def _repair_arithmetic(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    plain_fma = builder.create_fma

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return plain_fma(self, x, y, z)
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    builder.create_fma = fma
    for name in dir(builder):
        if name.startswith(_BF16_ARITHMETIC) and name not in _BITWISE and not name.startswith("create_make"):
            setattr(builder, name, _without_bf16(getattr(builder, name), name))


def _without_bf16(operation: Any, name: str) -> Any:
    @functools.wraps(operation)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if getattr(getattr(value, "dtype", None), "scalar", None) == tl.bfloat16:
                raise TypeError(f"{name} on bf16 is wrong in the interpreter: convert to float32 first")
        return operation(self, *args, **kwargs)

    return guarded


def _patch_once_per_launch(interpreter: Any) -> None:
    """Patch triton.language at the outermost call alone, there the whole of it; and let a loaded number end a range."""
    plain = interpreter._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    active: list[Any] = []

    def patch(function: Any) -> Any:
        if active:
            return SimpleNamespace(restore=lambda: None)
        scope = plain(whole)
        scope.set_attr(tl.core.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(())))
        active.append(scope)

        def restore() -> None:
            active.pop().restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch


def _interpret_library(interpreter: Any) -> None:
    """Make triton's own functions (tl.max, tl.zeros, ..) interpreted ones: they were defined before the knob was set."""
    made: dict[Any, Any] = {}
    names = [name for name in sys.modules if name.startswith("triton.language")]
    for owner in [*(sys.modules[name] for name in names), tl.core.tensor]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, triton.JITFunction):
                function = made.setdefault(value.fn, interpreter.InterpretedFunction(value.fn))
                setattr(owner, name, _method(function) if owner is tl.core.tensor else function)


def _method(function: Any) -> Any:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


class _NoDevice:
    """The driver of no device: what triton asks of one while it interprets."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles=None, **options: [1.0] * len(quantiles or [0.5])


def _install() -> None:
    early = [name for name in sys.modules if name.startswith("policy.kernels.") and name.endswith("_triton")]
    if early:
        raise RuntimeError(
            f"{', '.join(early)} imported before tests.policy.kernels.interpreter: import that one first"
        )
    # The knob alone, for this process: with the environment variable child processes would interpret unrepaired.
    triton.knobs.propagate_env, before = False, triton.knobs.propagate_env
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = before
    import triton.runtime.interpreter as interpreter

    _interpret_library(interpreter)
    _repair_casts(interpreter)
    _repair_arithmetic(interpreter)
    _patch_once_per_launch(interpreter)
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(_NoDevice())


if INTERPRETED:
    _install()
