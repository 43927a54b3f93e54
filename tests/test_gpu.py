"""The kernels on a GPU, by every backend that has some: as accurate as PyTorch, the same bits again and again.

On any stream and device, in CUDA graphs, for any number of coordinates. And meta-training with captured windows.
Skipped where there is no GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    DTYPES,
    GIVEN,
    RNNPROP,
    RULES,
    Case,
    all_finite,
    assert_accurate,
    assert_bfloat16_is_float32_rounded,
    assert_bfloat16_steps_are_accurate,
    assert_halves_are_rounded_to_even,
    assert_one_state_does_for_all,
    assert_units_multiply_updates_alone,
    backward_by,
    by_reference,
    constants,
    detached,
    inputs,
    lstm,
    random_gradients,
    random_rows,
    random_rule,
    rule_of,
    steps_by,
    tiles,
)
from small_training import seeds, small_rule, trainer
from test_capture import LR, PureCliff

from fastl2l import FusedLSTMOptimizer, build, tasks
from fastl2l.ops import dispatch
from fastl2l.ops.layout import TILE, new_state, to_rows
from fastl2l.rule_config import RuleConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SIZES = ((1, 1, 64), (1, 20, 32), (15, 1, 16), (16, 2, 16), (17, 5, 16), (63, 20, 8), (1000, 5, 4))
"""Coordinates, steps, and how often to draw."""
CASES = [
    *(Case(rule, *size) for rule, size in itertools.product((lstm("raw"), lstm(), RNNPROP), SIZES)),
    *(Case(rule, *size) for rule, size in itertools.product(RULES + GIVEN, ((1, 20, 16), (17, 5, 16), (1000, 5, 4)))),
    *(Case(rule, *size) for rule in (lstm(), RNNPROP) for size in ((9, 70, 8), (8200, 5, 2), (65537, 2, 1))),
    *(
        Case(rule, 17, 5, 16, **extreme)
        for rule, largest in ((lstm("raw"), 1e30), (lstm(), 1e30), (RNNPROP, 1e16))  # whose square is finite
        for extreme in ({"gain": 10.0}, {"gain": 0.01}, *({"magnitude": size} for size in (largest, 1e-36, 0.0)))
    ),
]
PAPERS = [lstm(), RNNPROP]
KINDS = [*PAPERS, lstm(hidden=7), "adam:0.9,0.99,1e-06 elu:5 lstm:7 tanh"]
"""What has kernels of its own sizes, and what has not."""
HALVED = [rule for rule in RULES if RuleConfig.parse(rule).takes_bfloat16_state]


@pytest.fixture(scope="module", params=sorted(set(dispatch.NAMES) - {"reference"}))
def backend(request):
    try:
        return dispatch.select(request.param, "cuda")
    except RuntimeError as error:
        pytest.skip(str(error))


def on_gpu(backend):
    """The same backend for tensors on the CPU, which helpers.py makes."""

    def move(tensors):
        return [tensor.cuda() for tensor in tensors]

    def on_device(rest):
        return [x.cuda() if isinstance(x, torch.Tensor) else x for x in rest]

    def step_(params, grads, states, weights, *rest):
        moved, moved_states = move(params), move(states)
        backend.step_(moved, move(grads), moved_states, move(weights), *on_device(rest))
        for tensor, changed in zip((*params, *states), (*moved, *moved_states), strict=True):
            tensor.copy_(changed)

    def window_backward(state, grads, adjoints, weights, *rest):
        found = backend.window_backward(*move([state, grads, adjoints]), move(weights), *on_device(rest))
        return tuple(tensor.cpu() for tensor in found)

    return dispatch.Backend(backend.name, step_, window_backward, backend.find_nonfinite_)


def bits_equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def arguments(n, steps=4, text=PAPERS[0], **rule_arguments):
    """A rule's weights and constants, and state, gradients, adjoints and d state on the GPU; NaN in unused lanes."""
    rule = rule_of(text, **rule_arguments)
    grads, adjoints = (random_gradients(steps, n, seed=seed).to(rule.dtype).cuda() for seed in (0, 1))
    state, dstate = (tiles(random_rows(rule, n, seed), rule.dtype).cuda() for seed in (0, 1))
    return ([weight.cuda() for weight in detached(rule)], *constants(rule)), state, grads, adjoints, dstate


def step(backend, rule, grads, state):
    """All updates and the last state's rows."""
    updates, state = torch.zeros_like(grads), state.clone()
    for update, grad in zip(updates, grads, strict=True):
        backend.step_([update], [grad], [state], *rule, 1.0)
    return updates, to_rows(state, grads.shape[1])


def window(backend, rule, state, grads, adjoints, dstate):
    dweights, dfirst, dgrads, _ = backend.window_backward(state, grads, adjoints, *rule, dstate, True, True)
    return dweights, to_rows(dfirst, grads.shape[1]), dgrads


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(field) for field in case))
def test_steps_and_windows_are_as_accurate_as_pytorch(backend, case):
    gpu = on_gpu(backend)
    found = steps_by(gpu, case, torch.float32) | backward_by(gpu, case, torch.float32)
    truth = by_reference(case, torch.float64)
    for vanished in [output for output in found if not truth[output].any()]:  # see test_operators.py
        assert found.pop(vanished).abs().max() <= 1e-35 * inputs(case).grads.abs().max().clamp_min(1)
    assert_accurate(found, case)


@pytest.mark.parametrize("rule", RULES + GIVEN)
def test_float64_is_as_accurate_as_pytorch(backend, rule):
    if backend.name != "native":
        pytest.skip("float64 is the native backend's")
    case, gpu = Case(rule, 17, 5, 16), on_gpu(backend)
    assert_accurate(steps_by(gpu, case, torch.float64) | backward_by(gpu, case, torch.float64), case)


@pytest.mark.parametrize("size", [(1, 5, 32), (17, 5, 16), (1000, 3, 4)])
@pytest.mark.parametrize("rule", HALVED)
def test_steps_with_state_in_bfloat16_are_as_accurate_as_pytorch(backend, rule, size):
    assert_bfloat16_steps_are_accurate(on_gpu(backend), Case(rule, *size))


@pytest.mark.parametrize("n", [1, 37, 12_288])
@pytest.mark.parametrize("rule", HALVED)
def test_state_in_bfloat16_is_what_float32_is_rounded_to(backend, rule, n):
    assert_bfloat16_is_float32_rounded(on_gpu(backend), rule_of(rule), n)


def test_state_in_bfloat16_is_rounded_to_even(backend):
    assert_halves_are_rounded_to_even(on_gpu(backend))


@pytest.mark.parametrize("n", [1, 37, 12_288, 100_003])
@pytest.mark.parametrize("text", PAPERS)
def test_any_run_gives_the_same_bits(backend, text, n):
    rule, state, grads, adjoints, dstate = arguments(n, text=text)
    runs = [
        (*step(backend, rule, grads, state), *window(backend, rule, state, grads, adjoints, dstate)) for _ in range(3)
    ]
    assert bits_equal(runs[0], runs[1])
    assert bits_equal(runs[0], runs[2])
    assert all(tensor.isfinite().all() for tensor in runs[0])


@pytest.mark.parametrize("text", KINDS)
def test_fresh_memory_reaches_nothing(backend, text, poisoned_memory):
    rule, state, grads, adjoints, dstate = arguments(37, text=text)
    found = *step(backend, rule, grads, state), *window(backend, rule, state, grads, adjoints, dstate)
    assert all(tensor.isfinite().all() for tensor in found)


def test_work_is_done_on_the_current_stream(backend):
    rule, state, grads, adjoints, dstate = arguments(5000)
    expected = *step(backend, rule, grads, state), *window(backend, rule, state, grads, adjoints, dstate)
    side = torch.cuda.Stream()
    late, late_adjoints = torch.full_like(grads, math.nan), torch.full_like(adjoints, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # whoever does not wait for this stream, sees NaN
        late.copy_(grads)
        late_adjoints.copy_(adjoints)
        found = *step(backend, rule, late, state), *window(backend, rule, state, late, late_adjoints, dstate)
    side.synchronize()
    assert bits_equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_is_done_on_the_tensors_device(backend):
    rule, state, grads, adjoints, dstate = arguments(100)
    expected = *step(backend, rule, grads, state), *window(backend, rule, state, grads, adjoints, dstate)
    moved = [tensor.to("cuda:1") for tensor in (state, grads, adjoints, dstate)]
    other = ([weight.to("cuda:1") for weight in rule[0]], *rule[1:])
    with torch.cuda.device(0):
        found = *step(backend, other, moved[1], moved[0]), *window(backend, other, *moved)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in found)
    assert bits_equal([tensor.cpu() for tensor in found], [tensor.cpu() for tensor in expected])


@pytest.mark.parametrize("text", KINDS)
def test_steps_and_windows_can_be_captured_in_a_cuda_graph(backend, text):
    rule, state, grads, adjoints, dstate = arguments(3000, text=text)
    param, live = torch.zeros(3000, device="cuda"), state.clone()
    expected = torch.zeros_like(param), state.clone()
    for _ in range(3):
        backend.step_([expected[0]], [grads[0]], [expected[1]], *rule, 1.0)
    expected_window = window(backend, rule, state, grads, adjoints, dstate)  # and compiled, where that is done at first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.step_([param], [grads[0]], [live], *rule, 1.0)
        captured = window(backend, rule, state, grads, adjoints, dstate)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bits_equal((param, to_rows(live, 3000)), (expected[0], to_rows(expected[1], 3000)))
    assert bits_equal(captured, expected_window)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("text", PAPERS)
def test_the_optimizer_s_step_can_be_captured_in_a_cuda_graph(backend, text, compiled):
    rule, results = rule_of(text).cuda(), []
    for captured in (False, True):
        params = [torch.nn.Parameter(torch.ones(size, device="cuda")) for size in (3000, 17)]
        optimizer = FusedLSTMOptimizer(params, rule, backend=backend.name, nonfinite="skip", capturable=True)
        for param in params:
            param.grad = random_gradients(param.numel(), seed=1).cuda()
        optimizer.step()  # states come to be
        step = torch.compile(optimizer.step, fullgraph=True) if compiled and captured else optimizer.step
        graph = torch.cuda.CUDAGraph()
        if captured and not compiled:
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for value in (1.0, math.nan, 2.0):
            params[0].grad[0] = value
            step()
        assert optimizer.skipped_steps == 1
        results.append([*(p.detach() for p in params), *(s["lstm_state"] for s in optimizer.state.values())])
    assert bits_equal(*results)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_many_parameters_of_all_dtypes_are_the_same_as_one_by_one(backend, stored):
    rule, *_ = arguments(1, output_scale=0.01)
    module = random_rule(output_scale=0.01)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    sizes = [(7 * i) % 400 for i in range(150)]
    params = [torch.randn(size).to(dtypes[i % 4]).cuda() for i, size in enumerate(sizes)]
    grads = [random_gradients(size, seed=i).clamp(-1e4, 1e4).to(dtypes[i % 4]).cuda() for i, size in enumerate(sizes)]
    states = [new_state(module, size, "cuda", stored) for size in sizes]
    alone, their_states = [x.clone() for x in params], [x.clone() for x in states]
    for param, grad, state in zip(alone, grads, their_states, strict=True):
        backend.step_([param], [grad], [state], *rule, 1.0)
    backend.step_(params, grads, states, *rule, 1.0)
    assert bits_equal(params, alone)
    rows = zip(states, their_states, sizes, strict=True)
    assert all(bits_equal([to_rows(a, n)], [to_rows(b, n)]) for a, b, n in rows)


def test_one_state_does_for_all_parameters(backend):
    assert_one_state_does_for_all(backend, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", KINDS)
def test_units_multiply_the_updates_of_their_parameters(backend, text, dtype):
    assert_units_multiply_updates_alone(on_gpu(backend), text, dtype)


@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
def test_a_step_that_is_asked_to_changes_nothing_unless_all_gradients_are_finite(backend, value):
    rule, state, grads, *_ = arguments(37)
    params, before = [torch.zeros(37, device="cuda") for _ in range(2)], state.clone()
    strange, flag = grads[1].clone(), torch.ones(1, dtype=torch.bool, device="cuda")
    strange[18] = value
    backend.step_(params, [grads[0], strange], [state, state.clone()], *rule, 1.0, flag)
    done = math.isfinite(value)
    assert flag.item() == done
    assert bool(params[0].any()) == bool(params[1].any()) == done
    assert bits_equal([state], [before]) == (not done)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("text", PAPERS)
def test_a_strange_gradient_stays_in_its_coordinate(backend, text, value):
    rule, state, grads, adjoints, dstate = arguments(37, text=text)
    strange, others = grads.clone(), torch.arange(37, device="cuda") != 18
    strange[2, 18] = value
    for run in (
        lambda x: step(backend, rule, x, state),
        lambda x: window(backend, rule, state, x, adjoints, dstate)[1:],
    ):
        before, after = run(grads), run(strange)
        assert bits_equal([x[:, others] for x in before], [x[:, others] for x in after])
    # The quotient of infinite means is no number.
    assert step(backend, rule, strange, state)[0][3, 18].isnan() == (math.isnan(value) or text == RNNPROP)


def test_states_of_more_than_2_to_the_31_numbers(backend):
    n = 27_000_000 + 5
    state_bytes = n * 80 * 4
    if torch.cuda.mem_get_info()[0] < 1.5 * state_bytes:
        pytest.skip(f"needs {1.5 * state_bytes / 2**30:.0f} GiB of free GPU memory")
    rule, *_ = arguments(1)
    last = TILE * 3 + n % TILE
    grads = random_gradients(last).cuda()
    param, grad = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda")
    grad[-last:] = grads
    state = torch.zeros(-(-n // TILE), 80, TILE, device="cuda")
    small, small_state = torch.zeros(last, device="cuda"), torch.zeros(4, 80, TILE, device="cuda")
    backend.step_([param], [grad], [state], *rule, 1.0)
    backend.step_([small], [grads], [small_state], *rule, 1.0)
    assert bits_equal([param[-last:]], [small])
    assert bits_equal([to_rows(state[-4:], last)], [to_rows(small_state, last)])
    assert (param[: n - last] == param[0]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16], ids=str)
def test_all_finite_misses_nothing(backend, dtype):
    for n in (0, 1, 255, 256, 100_003):
        tensor = torch.full((n,), torch.finfo(dtype).max, dtype=dtype, device="cuda")
        assert all_finite(backend, [tensor, tensor])
        for place, value in itertools.product({0, n // 2, n - 1} if n else (), (math.nan, math.inf, -math.inf)):
            wrong = tensor.clone()
            wrong[place] = value
            assert not all_finite(backend, [tensor, wrong])


@pytest.mark.parametrize("text", KINDS)
def test_a_rate_on_the_device_multiplies_update_and_decay(backend, text):
    rule, state, grads, *_ = arguments(3000, text=text)
    rate, param, live = torch.tensor(0.5, device="cuda"), torch.ones(3000, device="cuda"), state.clone()
    expected = torch.ones_like(param)
    backend.step_([expected], [grads[0]], [state.clone()], rule[0], rule[1], 0.5 * rule[2], 1.0, None, None, 0.05)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.step_([param], [grads[0]], [live], *rule, 1.0, None, None, 0.1, rate)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(param, expected)


def test_tensors_on_different_devices_are_named():
    if build.load_native() is not None or not torch._C._dispatch_has_kernel_for_dispatch_key("fastl2l::step_", "CUDA"):
        pytest.skip("the native backend has no CUDA kernels")
    rule, state, grads, *_ = arguments(20)
    native, param = dispatch.select("native", "cuda"), torch.zeros(20, device="cuda")
    with pytest.raises(RuntimeError, match=r"states\[0\]: expected a tensor on cuda:0, got one on another device"):
        native.step_([param], [grads[0]], [state.cpu()], *rule, 1.0)
    rate = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="rate: expected a tensor on cuda:0, got one on another device"):
        native.step_([param], [grads[0]], [state], *rule, 1.0, None, None, 0.0, rate)
    with pytest.raises(RuntimeError, match=r"weights\[7\]: expected a tensor on cuda:0, got one on another device"):
        native.step_([param], [grads[0]], [state], [*rule[0][:-1], rule[0][-1].cpu()], *rule[1:], 1.0)
    assert not param.any()


# Meta-training


def runs(backend, task, **changes):
    """A captured run and an eager one, in float64."""
    made = []
    for capture in (True, False):
        rule = small_rule(dtype=torch.float64).cuda()
        made.append(trainer(task, rule, meta_lr=LR, backend=backend.name, capture=capture, **changes))
    return made


def assert_same_training(captured, eager):
    for mine, theirs in zip(captured.history, eager.history, strict=True):
        assert tuple(mine) == pytest.approx(tuple(theirs), rel=1e-9, nan_ok=True)
    for mine, theirs in zip(captured.rule.weights(), eager.rule.weights(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


ON_GPU = {"dtype": torch.float64, "device": "cuda"}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("task", ["quadratic", "digits"])
def test_captured_windows_train_as_eager_ones(backend, task, size, schedule):
    options = {"quadratic": {"dim": 3, "batch": 4}, "digits": {"hidden": (3,), "batch_size": 8}}[task]
    pair = runs(backend, tasks.by_name(task, **options, **ON_GPU), batch=size, schedule=schedule)
    for run in pair:
        run.fit(2, progress=False)
    if schedule == "cosine":  # its rates are rounded to float32 in a graph
        assert pair[0].history[1].train_loss == pytest.approx(pair[1].history[1].train_loss, rel=1e-5)
    else:
        assert_same_training(*pair)


@pytest.mark.parametrize("edge", [1, 6])
def test_captured_windows_that_are_not_finite_change_nothing(backend, edge):
    pair = runs(backend, PureCliff(3, 4, **ON_GPU, edge=edge, seeds=seeds("train", 1, 3)))
    for run in pair:
        run.fit(3, progress=False)
    assert_same_training(*pair)
    assert [epoch.skipped for epoch in pair[0].history] == [1, 1, 0]


def test_captured_runs_can_be_taken_up_again(backend, tmp_path):
    task = tasks.Quadratic(3, 4, **ON_GPU)
    whole, _ = runs(backend, task)
    whole.fit(3, progress=False)
    for epochs, capture in ((1, True), (2, False), (3, True)):
        rule = small_rule(dtype=torch.float64).cuda()
        options = {"meta_lr": LR, "backend": backend.name, "capture": capture}
        parts = trainer(task, rule, checkpoint=tmp_path / "checkpoint", **options)
        parts.fit(epochs, progress=False)
    assert_same_training(whole, parts)


def test_the_host_waits_for_nothing_along_a_captured_trajectory(backend):
    trained, _ = runs(backend, tasks.Digits(hidden=(3,), batch_size=8, **ON_GPU), batch=3)
    window, problem = trained._captured(), trained._problems("train", 0, 3)
    window.train([(problem, 2)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        window._train_on(problem, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
