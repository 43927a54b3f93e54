"""Several rules on one problem: meta-trained together, side by side, taken up again, and with weights that stay."""

from __future__ import annotations

import pytest
import torch
from helpers import lstm, rule_of
from torch import Tensor, nn

from fastl2l import FusedLSTMOptimizer, LSTMRule, MetaTrainer, Trajectory, baselines, evaluate, parameter_groups
from fastl2l.meta.checkpoint import CheckpointError
from fastl2l.tasks import Problem, PureProblem, Task, batch
from fastl2l.tasks.base import check_start, generator, normal, problem_seed, value_and_grad

F64 = torch.float64
SIZES = {"left": 5, "middle": 17, "right": 2}


def bowl(theta: Tensor, centre: Tensor, noise: Tensor) -> Tensor:
    """Coordinates are tied to their neighbours, across the parts too."""
    return ((theta - centre).square() * (1 + 0.1 * noise)).mean() + 0.1 * (theta * theta.roll(1)).sin().mean()


class Bowl(PureProblem):
    task, function, functions = "bowl", staticmethod(bowl), 1

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.parts = dict(SIZES)
        self.seed, n = seed, sum(SIZES.values())
        self.theta0 = normal(generator(seed, "theta"), (n,), 1.0, dtype, "cpu")
        self.constants = (normal(generator(seed, "centre"), (n,), 1.0, dtype, "cpu"),)

    def inputs(self, step, device):
        noise = normal(generator(self.seed, "noise", step), self.theta0.shape, 1.0, self.theta0.dtype, device)
        return (noise,)


class Own(Problem):
    """The same with a loss of its own."""

    def __init__(self, pure: Bowl) -> None:
        self.task, self.functions, self.parts, self.theta0, self.pure = "own", 1, pure.parts, pure.theta0, pure

    def loss(self, theta, step):
        return self.pure.loss(theta, step)


class Bowls(Task):
    name = "bowl"

    def __init__(self, dtype=torch.float32, own=False):
        self.dtype, self.own = dtype, own

    def sample(self, seed):
        pure = Bowl(seed, self.dtype)
        return Own(pure) if self.own else pure

    def spec(self):
        return {"name": self.name, "own": self.own}


def rules(dtype=torch.float32):
    return {
        "right": rule_of(lstm("raw", 3, 1), dtype=dtype, seed=1, output_scale=0.1),
        "left": rule_of("adam:0.9,0.9,1e-06 elu:4 lstm:5 tanh", dtype=dtype, seed=2, output_scale=0.1),
        "middle": rule_of(lstm("log_sign", 5, 2), dtype=dtype, seed=3, output_scale=0.1),
    }


def trained(rules, epochs=3, **options):
    options = {"horizon": 8, "unroll": 4, "trajectories": 4, "validation_problems": 2, "meta_lr": 0.01} | options
    trainer = MetaTrainer(rules, options.pop("task", Bowls()), **options)
    trainer.fit(epochs, progress=False)
    return trainer


def weights(rules):
    return [weight.detach().clone() for rule in rules.values() for weight in rule.weights()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_problems_in_a_batch_take_the_way_that_each_takes_by_itself(own, second):
    task, pair = Bowls(F64, own), rules(F64)
    problems = [task.sample(seed) for seed in (1, 2, 3)]
    together = Trajectory(batch(problems), pair)
    assert dict(together.problem.parts) == {name: 3 * size for name, size in SIZES.items()}
    alone = [Trajectory(problem, pair) for problem in problems]
    window = together.window([1.0] * 5, second_derivatives=second)
    windows = [trajectory.window([1.0] * 5, second_derivatives=second) for trajectory in alone]
    torch.testing.assert_close(window.losses, torch.stack([one.losses for one in windows]).mean(0))
    torch.testing.assert_close(window.gradients, torch.stack([one.gradients for one in windows]).mean(0))
    parts = [torch.cat([one.theta.split(list(SIZES.values()))[i] for one in alone]) for i in range(3)]
    torch.testing.assert_close(together.theta, torch.cat(parts))


def test_rules_are_trained_together_and_each_learns():
    pair = rules()
    before = weights(pair)
    trainer = trained(pair, epochs=12)
    assert trainer.history[-1].validation_loss < 0.7 * trainer.history[0].validation_loss
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(pair), strict=True))
    assert trainer.rule is pair


@pytest.mark.parametrize(
    "options", [{}, {"batch": 2}, {"batch": 2, "task": Bowls(own=True)}, {"second_derivatives": True}]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, options):
    whole, parts = rules(), rules()
    trained(whole, 4, **options)
    trained(parts, 2, checkpoint=tmp_path / "run.pt", **options)
    again = rules()
    trainer = trained(again, 4, checkpoint=tmp_path / "run.pt", **options)
    assert len(trainer.history) == 4
    assert same(weights(whole), weights(again))


def test_a_run_goes_on_whatever_the_order_of_its_rules(tmp_path):
    def alike(names):
        return {name: rule_of(lstm("raw", 3, 1), seed=1, output_scale=0.1) for name in names}

    whole, names = alike(SIZES), list(SIZES)
    trained(whole, 4)
    trained(alike(names[::-1]), 2, checkpoint=tmp_path / "run.pt")
    again = alike([names[1], names[0], names[2]])
    trained(again, 4, checkpoint=tmp_path / "run.pt")
    assert all(same(whole[name].weights(), again[name].weights()) for name in names)


def test_a_checkpoint_of_other_parts_is_refused(tmp_path):
    trained(rules(), 1, checkpoint=tmp_path / "run.pt")
    other = rules()
    other["left"] = rule_of(lstm("raw", 3, 1), seed=2)
    with pytest.raises(CheckpointError, match="rule: expected"):
        trained(other, 2, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("second", [False, True])
def test_what_is_frozen_stays_and_the_rest_is_trained(tmp_path, second):
    pair = rules()
    for weight in pair["left"].parameters():
        weight.requires_grad_(False)
    pair["middle"].weight_out.requires_grad_(False)
    before = {id(weight): weight.detach().clone() for rule in pair.values() for weight in rule.weights()}
    trained(pair, 2, second_derivatives=second, checkpoint=tmp_path / "run.pt")
    for rule in pair.values():
        for weight in rule.weights():
            assert torch.equal(weight, before[id(weight)]) != weight.requires_grad
    thawed = rules()
    with pytest.raises(CheckpointError, match="rule: expected"):
        trained(thawed, 3, second_derivatives=second, checkpoint=tmp_path / "run.pt")


def test_a_rule_without_anything_to_train_is_refused():
    pair = rules()
    for rule in pair.values():
        rule.requires_grad_(False)
    with pytest.raises(ValueError, match="rule: expected weights to train, got none that require grad"):
        trained(pair)


@pytest.mark.parametrize("sizes", [{"left": 5, "middle": 17, "right": 3}, {"left": 5, "middle": 18}, {"left": 23}])
def test_parts_must_cover_theta(sizes):
    problem = Bowl(0, F64)
    problem.parts = sizes
    with pytest.raises(ValueError, match=r"task 'bowl': parts: expected sizes that add up to the 24 coordinates"):
        check_start(problem)


def test_a_batch_is_of_problems_with_the_same_parts():
    one, other = Bowl(0, F64), Bowl(1, F64)
    other.parts = {"up": 24}
    with pytest.raises(
        ValueError, match="problems: expected all of the same parts in the same order, got left, middle"
    ):
        batch([one, other])
    other.parts = {"left": 7, "middle": 15, "right": 2}  # of other sizes: one after the other
    assert dict(batch([one, other]).parts) == {"left": 12, "middle": 32, "right": 4}
    check_start(batch([one, other]))


# Evaluation


@pytest.mark.parametrize("own", [False, True])
def test_rules_of_parts_are_evaluated_on_the_way_that_a_trajectory_takes(own):
    task, by_part = Bowls(own=own), rules()
    curves = evaluate(task, {"parts": by_part, "adam": baselines.Adam(0.01)}, steps=6, runs=2, seed=4)
    for run in range(2):
        trajectory = Trajectory(task.sample(problem_seed(4, "test", run)), by_part)
        losses = [trajectory.loss, *(trajectory.advance() for _ in range(6))]
        assert torch.equal(curves.losses["parts"][run], torch.stack(losses).double())
    assert curves.kind("parts") == "learned"
    assert curves.metadata["optimizers"]["parts"]["parts"].keys() == SIZES.keys()


def test_one_rule_of_all_parts_and_a_baseline_step_each_of_them():
    task, rule = Bowls(F64), LSTMRule(dtype=F64)
    alike = {part: LSTMRule(dtype=F64) for part in SIZES}
    curves = evaluate(task, {"one": rule, "each": alike}, steps=5, runs=1)
    assert torch.equal(curves.losses["one"], curves.losses["each"])
    problem = task.sample(1)
    theta = problem.theta0.clone().requires_grad_()
    adam, expected = torch.optim.Adam([theta], lr=0.1), []
    for step in range(5):
        loss, theta.grad = value_and_grad(problem, theta, step)
        expected.append(loss)
        adam.step()
    assert torch.equal(baselines.descend(problem, baselines.Adam(0.1).build, 5)[:5], torch.stack(expected))


@pytest.mark.parametrize("without", ["left", "right"])
def test_evaluation_wants_a_rule_for_every_part(without):
    lacking = {part: rule for part, rule in rules().items() if part != without}
    with pytest.raises(ValueError, match=r"optimizers\['a'\]: expected a rule for each part \(left, middle, ri"):
        evaluate(Bowls(), {"a": lacking}, steps=2, runs=1)


# Parameter groups of networks


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3)
    )


def conv_and_fc_rules():
    return {"fc": LSTMRule(seed=1), "conv": LSTMRule(seed=2)}


def test_parameter_groups_are_by_the_type_of_the_module():
    model, pair = network(), conv_and_fc_rules()
    model[4].bias.requires_grad_(False)
    groups = parameter_groups(model, pair)
    assert [group["rule"] for group in groups] == [pair["fc"], pair["conv"]]
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [[of[id(parameter)] for parameter in group["params"]] for group in groups]
    assert names == [["4.weight", "5.weight", "5.bias"], ["0.weight", "0.bias", "1.weight", "1.bias"]]
    optimizer = FusedLSTMOptimizer(groups)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(4, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert moved[0]
    assert not moved[5]  # the frozen bias


def test_parameter_groups_may_be_by_name():
    model = network()
    first, rest = parameter_groups(model, {"a": LSTMRule(), "b": LSTMRule()}, parts={"a": ["0"], "b": ["1", "4", "5"]})
    assert [len(first["params"]), len(rest["params"])] == [2, 6]


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (nn.Linear(2, 3), conv_and_fc_rules(), ValueError, r"parts of the network \(fc\), got one for 'conv'"),
        (network(), {"fc": LSTMRule()}, ValueError, "got none for 'conv': 0.weight"),
        (network(), LSTMRule(), TypeError, "rules: expected a dict of rules by part"),
        ("model", conv_and_fc_rules(), TypeError, "module: expected a torch.nn.Module, got str"),
        (nn.ReLU(), conv_and_fc_rules(), ValueError, "it has none"),
    ],
)
def test_groups_that_cannot_be_are_named(model, given, error, message):
    with pytest.raises(error, match=message):
        parameter_groups(model, given)
