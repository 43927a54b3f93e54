"""Meta-training: gradient descent on the weights of a rule."""

from fastl2l.meta.trainer import Epoch, MetaTrainer

__all__ = ["Epoch", "MetaTrainer"]
