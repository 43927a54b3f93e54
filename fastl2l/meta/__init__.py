"""Meta-training: gradient descent on the weights of a rule."""

from fastl2l.meta.curriculum import Stage, train_by_curriculum
from fastl2l.meta.imitation import Imitation
from fastl2l.meta.search import Trial, search_meta_lr
from fastl2l.meta.trainer import Epoch, MetaTrainer

__all__ = ["Epoch", "Imitation", "MetaTrainer", "Stage", "Trial", "search_meta_lr", "train_by_curriculum"]
