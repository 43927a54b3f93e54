"""torchvision, also beside a torch that was built without CUDA.

torchvision's compiled operators do not load there, and importing it then stops at the two whose schemas its Python part
expects. With those two schemas in place the import works, and so does all that fastl2l needs: data sets, models and
transforms.
"""

from __future__ import annotations

from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a schema lasts as long as the library that defined it


def torchvision() -> ModuleType:
    """The module `torchvision`, imported.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import torchvision as module
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _define_schemas()
        import torchvision as module
    except ImportError as error:
        raise ImportError("this needs torchvision, which is not installed: pip install torchvision") from error
    return module


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
