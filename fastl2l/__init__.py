"""fastl2l: learned optimizers, fast enough to use.

Example::

    from fastl2l import FusedLSTMOptimizer, load_rule

    optimizer = FusedLSTMOptimizer(model.parameters(), load_rule("mine.safetensors"))
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# fastl2l.kernels lies within the package once that is installed, beside it in a checkout (as csrc/ does).
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

from fastl2l import baselines, tasks
from fastl2l.evaluate import Curves, evaluate
from fastl2l.groups import parameter_groups
from fastl2l.meta import MetaTrainer
from fastl2l.optim import FusedLSTMOptimizer
from fastl2l.rule_files import RuleFileError, load_rule, save_rule
from fastl2l.rules import GACRule, LSTMRule, NTMRule, RNNpropRule, Rule
from fastl2l.trajectory import Trajectory

try:
    __version__ = version("fastl2l")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "unknown"

__all__ = [
    "Curves",
    "FusedLSTMOptimizer",
    "GACRule",
    "LSTMRule",
    "MetaTrainer",
    "NTMRule",
    "RNNpropRule",
    "Rule",
    "RuleFileError",
    "Trajectory",
    "baselines",
    "evaluate",
    "load_rule",
    "parameter_groups",
    "save_rule",
    "tasks",
]
