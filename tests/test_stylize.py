"""`fastl2l stylize`: pictures come out as asked for, interrupted or not, and what is wrong shows before any work."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_rule
from PIL import Image
from typer.testing import CliRunner

from fastl2l import RNNpropRule, baselines, cli, images, save_rule, stylize
from fastl2l.progress import Progress
from fastl2l.stylize import Painting, Studio, available_memory, needed_memory
from fastl2l.tasks.base import value_and_grad
from fastl2l.tasks.neural_art import Weights
from fastl2l.tasks.vgg import NETWORKS

WEIGHTS = Weights(content_layer="relu2_2", style_layers=("relu1_1", "relu2_1"))


@pytest.fixture
def painting(tiny_vgg, pictures, tmp_path):
    content, style = pictures / "content" / "0.png", pictures / "style" / "waves.png"
    return Painting(content, [style], tmp_path / "out.png", size=24, steps=6, optimizer="adam", weights=WEIGHTS)


def paint(painting, **changes):
    return Studio(dataclasses.replace(painting, **changes)).paint(progress=False)


def pixels(path):
    return images.tensor(images.read("x", path))


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "rnnprop", "file"])
def test_every_optimizer_paints(painting, tmp_path, optimizer):
    if optimizer == "file":
        optimizer = str(save_rule(RNNpropRule(), tmp_path / "mine.safetensors") or tmp_path / "mine.safetensors")
    painted = paint(painting, optimizer=optimizer)
    assert painted.files == [painting.out]
    assert Image.open(painting.out).size == (24, 20)
    start = Studio(painting).problem(24)
    first = start.loss(start.theta0, 0).item() / (24 * 20)
    loss, terms = painted.losses[optimizer]
    assert loss == pytest.approx(sum(terms), rel=1e-5)
    assert loss < first
    assert painted.steps == {optimizer: 6}


def test_the_picture_is_the_best_that_the_optimizer_came_to(painting):
    """Adam's own way, written out."""
    problem = Studio(painting).problem(24)
    theta = problem.theta0.clone().requires_grad_()
    optimizer, seen = torch.optim.Adam([theta], lr=0.2), []
    for step in range(7):
        loss, theta.grad = value_and_grad(problem, theta, step)
        seen.append((loss.item(), theta.detach().clone()))
        optimizer.step()
    lowest, best = min(seen, key=lambda pair: pair[0])
    painted = paint(painting)
    assert painted.losses["adam"][0] == pytest.approx(lowest / 480, rel=1e-6)
    assert np.array_equal(np.asarray(Image.open(painting.out)), np.asarray(images.picture(problem.pixels(best))))


def test_the_same_seed_gives_the_same_picture(painting):
    first = paint(painting).losses
    assert paint(painting).losses == first
    assert paint(painting, seed=1).losses != first


def test_lr_is_that_of_the_optimizer(painting):
    assert paint(painting, lr=0.2).losses == paint(painting).losses
    assert paint(painting, lr=0.02).losses != paint(painting).losses
    ours = paint(painting, optimizer="rnnprop").losses["rnnprop"]
    assert paint(painting, optimizer="rnnprop", lr=1.0).losses["rnnprop"] == ours
    assert paint(painting, optimizer="rnnprop", lr=0.3).losses["rnnprop"] != ours


def test_it_may_start_from_the_photograph(painting):
    studio = Studio(dataclasses.replace(painting, start="content"))
    problem = studio.problem(24)
    torch.testing.assert_close(problem.pixels(problem.theta0), problem.content)


def test_colours_may_be_kept(painting):
    paint(painting, keep_colours=True, steps=20)
    found = pixels(painting.out)
    content = images.tensor(images.fitted(images.read("x", painting.content), 24))
    blue = lambda image: image[2] - (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])  # noqa: E731
    inside = (found > 0.02).all(0) & (found < 0.98).all(0)  # where nothing was cut off
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(blue(found)[inside], blue(content)[inside], rtol=0, atol=0.02)


def test_from_coarse_to_fine(painting):
    painted = paint(painting, size=64, levels=3, steps=4)
    assert Image.open(painting.out).size == (64, 53)
    assert painted.steps == {"adam": 12}
    assert dataclasses.replace(painting, size=64, levels=3).sizes == [16, 32, 64]
    straight = paint(painting, size=64, steps=4)
    assert painted.losses["adam"][0] < straight.losses["adam"][0]


def test_several_styles_are_mixed(painting):
    other = painting.content.with_name("5.png")
    both = paint(painting, styles=[painting.styles[0], other], style_shares=(1, 0)).losses
    assert both["adam"][0] == pytest.approx(paint(painting).losses["adam"][0], rel=1e-5)
    mixed = paint(painting, styles=[painting.styles[0], other], style_shares=()).losses
    assert mixed["adam"][0] != pytest.approx(both["adam"][0], rel=1e-3)


@pytest.mark.parametrize(
    ("frames", "names"),
    [
        ("images", ["out.png", "out-0002.png", "out-0004.png", "out-0006.png"]),
        ("strip", ["out.png", "out-strip.png"]),
        ("gif", ["out.png", "out.gif"]),
    ],
)
def test_pictures_on_the_way(painting, frames, names):
    painted = paint(painting, save_every=2, frames=frames)
    assert [path.name for path in painted.files] == names
    assert all(path.exists() for path in painted.files)
    if frames == "gif":
        assert Image.open(painted.files[1]).n_frames == 3
    if frames == "strip":
        assert Image.open(painted.files[1]).width == 3 * 24 + 2 * 2


def test_two_optimizers_side_by_side(painting):
    painted = paint(painting, beside="rnnprop")
    assert [path.name for path in painted.files] == ["out.png", "out-rnnprop.png", "out-beside.png"]
    assert Image.open(painted.files[2]).width == 4 * 24 + 3 * 2
    assert painted.losses["adam"] == paint(painting).losses["adam"]


@pytest.mark.parametrize("at", [3, 9])
def test_what_is_interrupted_leaves_the_best_picture_so_far(painting, monkeypatch, at):
    """In the first size, and in the second."""
    advance, count = Progress.advance, []

    def interrupting(shown, *arguments, **options):
        count.append(1)
        if len(count) == at:
            raise KeyboardInterrupt
        advance(shown, *arguments, **options)

    whole = paint(painting, size=32, levels=2)
    painting.out.unlink()
    monkeypatch.setattr(Progress, "advance", interrupting)
    painted = paint(painting, size=32, levels=2, save_every=2)
    assert painted.interrupted
    assert painted.files[0] == painting.out
    assert Image.open(painting.out).size == ((16, 13) if at == 3 else (32, 27))
    assert painted.losses["adam"][0] > whole.losses["adam"][0]


def test_an_interrupted_command_says_where_it_was_stopped(painting, monkeypatch):
    visit, count = stylize._Easel._visit, []

    def interrupting(easel, loss, theta):
        visit(easel, loss, theta)
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(stylize._Easel, "_visit", interrupting)
    told = run(painting, "--steps", 50)
    assert "adam: stopped after step 3, loss" in told.stdout
    assert painting.out.exists()


def run(painting, *options):
    layers = ["--content-layer", "relu2_2", "--style-layers", "relu1_1,relu2_1"]
    arguments = [painting.content, *painting.styles, "-o", painting.out, "--size", 24, "--optimizer", "adam", *layers]
    words = ["stylize", *map(str, arguments), *map(str, options)]
    return CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_the_command_says_what_it_does_and_did(painting):
    told = run(painting, "--steps", 3, "--beside", "lbfgs", "--save-every", 1, "--frames", "gif").stdout
    assert "24 x 20 pixels, 1,440 coordinates, 3 steps with adam and lbfgs; about 0." in told
    assert re.search(r"lbfgs: 3 steps, loss [\d.]+ \(content [\d.]+, style [\d.]+, smoothness [\d.e-]+\)", told)
    assert f"picture: {painting.out}" in told
    assert painting.out.with_name("out-beside.png").exists()


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "size: expected an integer >= 16, got 8"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"levels": 3}, "levels: expected so few that the coarsest size is at least 16, got 3 of size 24"),
        ({"save_every": 1, "frames": "film"}, "frames: expected one of images, strip, gif, got 'film'"),
        ({"save_every": 1, "frames": "strip", "steps": 65}, "save_every: expected so many steps that at most 64"),
        ({"start": "grey"}, "start: expected one of noise, content, got 'grey'"),
        ({"styles": []}, "style: expected at least one picture, got none"),
        ({"style_shares": (1, 2)}, "style_shares: expected a weight for each of 1 styles"),
        ({"lr": 0.0}, "lr: expected a finite number > 0, got 0"),
        ({"beside": "adam"}, "beside: expected another optimizer than adam, got it twice"),
        ({"optimizer": "magic"}, "optimizer: expected adam, lbfgs, a rule that comes with fastl2l .* got 'magic'"),
        ({"beside": "magic"}, "beside: expected adam, lbfgs, a rule"),
        ({"device": "abacus"}, "device: expected cpu"),
        ({"out": Path("x.bmp")}, "out: expected a name that ends in"),
        ({"content": Path("gone.png")}, "content: expected a picture, got gone.png, which does not exist"),
        ({"styles": [Path("gone.png")]}, "style: expected a picture, got gone.png, which does not exist"),
    ],
)
def test_bad_arguments_are_named_before_there_is_work(painting, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Studio(dataclasses.replace(painting, **changes))
    assert not painting.out.exists()


def test_the_photograph_is_not_written_over(painting):
    with pytest.raises(ValueError, match="out: expected another file than the pictures that are read"):
        dataclasses.replace(painting, out=painting.content)


def test_rules_for_parts_are_refused(painting, tmp_path):
    save_rule({"conv": random_rule("raw", seed=1), "fc": random_rule("raw", seed=2)}, tmp_path / "pair.safetensors")
    with pytest.raises(ValueError, match=r"optimizer: expected one rule, got .*, which has one for each of conv, fc"):
        Studio(dataclasses.replace(painting, optimizer=str(tmp_path / "pair.safetensors")))


def test_long_pictures_need_a_size_at_which_something_is_left(painting, tmp_path):
    Image.new("RGB", (3000, 8)).save(tmp_path / "long.png")
    deep = Weights(style_layers=("relu5_1",))
    with pytest.raises(ValueError, match="size: expected a shorter side of at least 16 pixels, got 24 x 8 of"):
        Studio(dataclasses.replace(painting, content=tmp_path / "long.png", weights=deep))


def test_a_loss_that_is_never_finite_is_an_error(painting, monkeypatch):
    monkeypatch.setattr(baselines, "value_and_grad", lambda problem, theta, _: (theta.sum() * torch.nan, theta))
    with pytest.raises(ValueError, match="optimizer: expected one whose loss is finite, got adam"):
        paint(painting)
    assert not painting.out.exists()


def test_sizes_that_do_not_fit_memory_are_refused_before_starting(painting, monkeypatch):
    monkeypatch.setattr(stylize, "available_memory", lambda device: 10**9)
    with pytest.raises(
        MemoryError, match=r"size: expected one that fits the 1 GB of memory that are free, got 4000, for"
    ):
        Studio(dataclasses.replace(painting, size=4000))
    Studio(painting)


def test_memory_is_what_the_system_has():
    assert 10**8 < available_memory(torch.device("cpu")) < 10**14


MEASURE = """
import sys, torch
from fastl2l.stylize import *
from fastl2l.tasks import vgg
from fastl2l.tasks.neural_art import ArtProblem, Styling, Weights, noise, style_targets
from fastl2l import baselines
optimizer, size = sys.argv[1], int(sys.argv[2])
weights, layers = Weights(), []
for number in range(weights.convolutions):
    pooled = number > 0 and vgg.block_of(number, "vgg16") > vgg.block_of(number - 1, "vgg16")
    inputs = vgg.channels(number - 1, "vgg16") if number else 3
    layers.append(vgg.Layer(pooled, torch.randn(vgg.channels(number, "vgg16"), inputs, 3, 3) / 40, torch.zeros(1)
        .expand(vgg.channels(number, "vgg16"))))
features = vgg.Features(layers, vgg.NORMALIZATION["vgg16"])
picture = torch.rand(3, size, size)
function = Styling(weights, features, style_targets(weights, features, [picture], [1.0]), size, size)
problem = ArtProblem(function, picture, noise(0, size, size, torch.float32, "cpu"))
from fastl2l.stylize import _build
build = _build("optimizer", optimizer, None, "cpu")
baselines.evaluations(problem, build.build, 3, lambda loss, theta: None)
# Not ru_maxrss: that begins with what the process had that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print(peak, needed_memory(weights, size, size, build.rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell the peak")
@pytest.mark.parametrize("optimizer", ["adam", "rnnprop"])
def test_the_memory_that_is_stated_is_the_memory_that_is_taken(optimizer):
    """With features of the real network's sizes: never more than stated, nor less than half."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, optimizer, "256"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    peak, stated = map(int, done.stdout.split())
    assert 0.5 * stated < peak < stated


def test_deeper_layers_and_larger_states_take_more():
    sizes = [needed_memory(Weights(), 256, 256, rows) for rows in (2, 80)]
    assert sizes[1] - sizes[0] == 4 * 3 * 256 * 256 * 78
    deep = Weights(content_layer="relu5_3", network=NETWORKS[1])
    assert needed_memory(deep, 256, 256, 2) > sizes[0]
