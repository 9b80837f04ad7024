"""Python runs this at the start of every engine process that has this folder on its path.

Triton's interpreter stands in for a CPU backend, so that vLLM takes Triton for available and
runs its V2 model runner, the default on GPUs, on a CPU. Needs TRITON_INTERPRET=1. Two gaps of
the interpreter that vLLM's sampling kernels meet are closed; the kernels are vLLM's own.
"""

from types import SimpleNamespace

import numpy as np
import triton.backends
from triton.runtime import interpreter


class _InterpretedDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def _with_tensor_ranges(patch_core):
    """`tl.range` yields scalar tensors, as in a compiled kernel; the interpreter yields ints.

    The kernel of top-k and top-p calls methods of its loop variable.
    """

    def patched(lang, scope):
        patch_core(lang, scope)
        numbers = lang.range
        lang.range = lambda *bounds, **options: map(
            interpreter._implicit_cvt, numbers(*bounds, **options)
        )

    return patched


def _boolean(mask):
    """A mask is boolean; the interpreter's becomes an integer when a scalar is broadcast.

    The kernel of structured output stores under such a mask, the n-gram speculator's also loads.
    """
    return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)


def _store_with_boolean_mask(store):
    def patched(self, pointers, value, mask, *policies):  # whose number is the Triton version's
        return store(self, pointers, value, _boolean(mask), *policies)

    return patched


def _load_with_boolean_mask(load):
    def patched(self, pointers, mask, *more):
        return load(self, pointers, _boolean(mask), *more)

    return patched


triton.backends.backends["cpu"] = SimpleNamespace(driver=_InterpretedDriver, compiler=None)
interpreter._patch_lang_core = _with_tensor_ranges(interpreter._patch_lang_core)
_builder = interpreter.InterpreterBuilder
_builder.create_masked_store = _store_with_boolean_mask(_builder.create_masked_store)
_builder.create_masked_load = _load_with_boolean_mask(_builder.create_masked_load)
