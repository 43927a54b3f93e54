"""The operators of the update rules: schemas, backends, and the choice between them."""

from fastl2l.ops.functional import update

__all__ = ["update"]
