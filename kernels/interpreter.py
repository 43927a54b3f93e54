"""Two things that Triton's interpreter (TRITON_INTERPRET=1) cannot do: count a loop with NumPy 2.4, and round."""

from __future__ import annotations

from typing import Any

import torch


def mend() -> None:
    """Let scalars be indices, and round numbers to bfloat16 as GPUs do.

    The interpreter calls int() on arrays of one element, which NumPy no longer takes; and it cuts numbers off, which
    makes infinity of some NaN.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
    convert = interpreter._convert_float

    def convert_to_nearest(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(numbers, source, target, mode)
        rounded = torch.from_numpy(numbers.view("float32").copy()).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert_to_nearest
