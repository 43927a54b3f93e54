"""Parameter groups of a network, each with the rule that is for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastl2l.rules import Rule, rules_by_part
from fastl2l.tasks.parts import Parts, check, conv_and_fc, names_by_part


def parameter_groups(
    module: nn.Module, rules: Mapping[str, Rule], *, parts: Parts = conv_and_fc
) -> list[dict[str, Any]]:
    """What `FusedLSTMOptimizer` takes to step each part of a network by a rule of its own.

        rules = fastl2l.load_rule("pair.safetensors")  # {"conv": ..., "fc": ...}
        optimizer = FusedLSTMOptimizer(fastl2l.parameter_groups(model, rules))

    Andrychowicz et al. 2016, section 3.3: two rules, as the parameters of convolutions differ much from those of fully
    connected layers.

    Args:
        module: the network. What does not require grad belongs to no group.
        rules: by part.
        parts: which parameter belongs to which part, as `fastl2l.tasks.from_module` takes it; by default the types of
            the modules say so: "conv" for convolutions and the norms of their channels, else "fc".

    Returns:
        Groups {"params", "rule"}, in the order of `rules`.

    Raises:
        TypeError, ValueError: an argument is not as above; the network has a part without a rule, or none of a part
            that there is a rule for; a parameter belongs to no part, or to two.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if isinstance(rules, Rule):
        raise TypeError(f"rules: expected a dict of rules by part, got {type(rules).__name__}, which is for all parts")
    rules = rules_by_part(rules)
    check(parts)
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    names = names_by_part(module, list(named), parts)
    for part in names.keys() - rules.keys():
        raise ValueError(f"rules: expected one for every part of the network, got none for {part!r}: {names[part][0]}")
    for part in rules.keys() - names.keys():
        raise ValueError(
            f"rules: expected some for parts of the network ({', '.join(names) or 'it has none'}), got one for {part!r}"
        )
    return [{"params": [named[name] for name in names[part]], "rule": rule} for part, rule in rules.items()]
