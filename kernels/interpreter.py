"""One thing that Triton's interpreter (TRITON_INTERPRET=1) cannot do with NumPy 2.4: count a loop."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let scalars be indices: the interpreter calls int() on arrays of one element, which NumPy no longer takes."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
