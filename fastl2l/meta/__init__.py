"""Meta-training: gradient descent on the weights of a rule."""

from fastl2l.meta.imitation import Imitation
from fastl2l.meta.search import Trial, search_meta_lr
from fastl2l.meta.trainer import Epoch, MetaTrainer

__all__ = ["Epoch", "Imitation", "MetaTrainer", "Trial", "search_meta_lr"]
