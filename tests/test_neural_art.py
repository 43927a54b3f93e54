"""The neural-art task: what f is, pictures side by side, photographs by split; and the features of the real network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastl2l import LSTMRule, MetaTrainer, images, tasks
from fastl2l.tasks import vgg
from fastl2l.tasks.base import check_start, value_and_grad
from fastl2l.tasks.neural_art import NeuralArt, Weights, gram, to_pixels, to_theta

REAL = Path(torch.hub.get_dir(), "checkpoints", "vgg16_features-amdegroot-88682ab5.pth")
needs_weights = pytest.mark.skipif(not REAL.exists(), reason=f"no weights of VGG16 in {REAL} (TORCH_HOME)")
LAYERS = {"content_layer": "relu2_2", "style_layers": ("relu1_1", "relu2_1")}


@pytest.fixture
def art(tiny_vgg, pictures):
    return NeuralArt(style="waves", size=16, dtype=torch.float64, **LAYERS)


def test_the_loss_is_that_of_its_definition(art):
    """Written out anew, with torch's own modules."""
    problem = art.sample(3)
    network = vgg.load("vgg16", 4, torch.float64, torch.device("cpu"))

    def seen(pixels):
        x, found = (pixels[None] - 0.5) / 0.25, []
        for layer in network.layers:
            x = nn.AvgPool2d(2)(x) if layer.pooled else x
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1))
            found.append(x[0])
        return found

    def matrix(features):
        return torch.einsum("ahw,bhw->ab", features, features) / features[0].numel()

    style = images.tensor(images.square(images.read("style", art.style[0]), 16)).double()
    wanted, target = seen(style), seen(problem.content)[3]
    theta = problem.theta0
    image = 0.45 + 0.25 * theta.view(3, 16, 16)
    now = seen(image)
    content = ((now[3] - target) ** 2).sum() / (target**2).sum()
    errors = [((matrix(now[i]) - matrix(wanted[i])) ** 2).sum() / (matrix(wanted[i]) ** 2).sum() for i in (0, 2)]
    steps = theta.view(3, 16, 16)
    smooth = ((steps[:, 1:] - steps[:, :-1]) ** 2).mean() + ((steps[..., 1:] - steps[..., :-1]) ** 2).mean()
    expected = 256 * (1.0 * content + 5.0 * (errors[0] + errors[1]) / 2 + 0.3 * smooth)
    torch.testing.assert_close(problem.loss(theta, 0), expected, rtol=1e-12, atol=0)
    assert sum(problem.terms(theta)) * 256 == pytest.approx(expected.item(), rel=1e-12)


def test_its_derivatives_are_right_twice(art):
    problem = art.sample(0)
    some = problem.theta0[:6].clone().requires_grad_()

    def loss(part):
        return problem.loss(torch.cat([part, problem.theta0[6:]]), 0)

    assert torch.autograd.gradcheck(loss, some, eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(loss, some, eps=1e-6, atol=1e-4)


def test_pictures_go_side_by_side(art):
    problems = [art.sample(seed) for seed in range(3)]
    together = tasks.batch(problems)
    assert type(together).__name__ == "_AtOnce"
    loss, gradient = value_and_grad(together, together.theta0, 0)
    each = [value_and_grad(problem, problem.theta0, 0) for problem in problems]
    torch.testing.assert_close(loss, sum(one for one, _ in each), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.cat([one for _, one in each]), rtol=1e-9, atol=1e-12)


def test_a_problem_is_a_function_of_its_seed(art):
    check_start(art.sample(5))
    first, again, other = art.sample(5), art.sample(5), art.sample(6)
    assert torch.equal(first.content, again.content)
    assert torch.equal(first.theta0, again.theta0)
    assert not torch.equal(first.content, other.content)
    assert not torch.equal(first.theta0, other.theta0)
    assert first.theta0.std().item() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(first.loss(first.theta0, 0), first.loss(first.theta0, 7))


def test_the_start_may_be_the_photograph(art):
    problem = dataclasses.replace(art, start="content", crops=False).sample(1)
    torch.testing.assert_close(problem.pixels(problem.theta0), problem.content)
    content, style, _ = problem.terms(problem.theta0)
    assert content == pytest.approx(0, abs=1e-20)
    assert style > 0


def test_gradients_do_not_depend_on_the_size(tiny_vgg, pictures):
    """Of a coordinate: f is a sum over pixels, where a mean would divide them by 4. Pictures differ by their sizes."""
    task = NeuralArt(style="waves", size=32, crops=False, **LAYERS)
    small, large = task.sample(0), dataclasses.replace(task, size=64).sample(0)
    sizes = [value_and_grad(one, one.theta0, 0)[1].square().mean().sqrt().item() for one in (small, large)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


def test_photographs_are_split_by_what_they_hold(art, pictures):
    splits = {name: dataclasses.replace(art, split=name).photographs for name in ("train", "validation", "test")}
    everything = dataclasses.replace(art, split="all").photographs
    assert len(everything) == 40
    assert set().union(*splits.values()) == set(everything)
    assert sum(map(len, splits.values())) == 40
    assert all(splits.values())
    assert len(splits["train"]) > 20
    moved = pictures / "content" / "another-name.png"
    (name := next(iter(splits["test"]))).rename(moved)
    assert moved in dataclasses.replace(art, split="test").photographs
    assert name not in dataclasses.replace(art, split="test").photographs


def test_training_is_validated_on_other_photographs(art):
    assert art.split == "train"
    assert art.validation().split == "validation"
    assert tasks.Scaled(art, 1.0).validation().task == art.validation()
    assert tasks.WithConvex(art, 2).validation().task == art.validation()
    assert tasks.Mixture([art, tasks.Quadratic(dtype=torch.float64)]).validation().tasks[0] == art.validation()
    rule = LSTMRule(output_scale=1.0, dtype=torch.float64)
    options = {"horizon": 4, "unroll": 2, "trajectories": 2, "batch": 2, "validation_problems": 2}
    trainer = MetaTrainer(rule, art, **options)
    assert trainer._problems("validation", 0, 1).content.shape == (3, 16, 16)
    assert trainer._validation == art.validation()
    before = rule.weight_out.clone()
    (epoch,) = trainer.fit(1, progress=False)
    assert epoch.skipped == 0
    assert not torch.equal(before, rule.weight_out)


def test_its_description_is_of_pictures_not_of_places(art, pictures, monkeypatch):
    before = art.spec()
    json.dumps(before)
    elsewhere = pictures.parent / "elsewhere"
    elsewhere.mkdir()
    pictures.rename(elsewhere / "images")
    monkeypatch.setenv("FASTL2L_DATA", str(elsewhere))
    assert NeuralArt(style="waves", size=16, dtype=torch.float64, **LAYERS).spec() == before
    Image.new("RGB", (30, 30)).save(elsewhere / "images" / "style" / "waves.png")
    assert NeuralArt(style="waves", size=16, dtype=torch.float64, **LAYERS).spec() != before


def test_styles_are_mixed_by_their_shares(tiny_vgg, pictures):
    photograph = str(pictures / "content" / "3.png")
    both = NeuralArt(style=("waves", photograph), size=16, style_shares=(3, 1), **LAYERS).function._grams
    one, other = (NeuralArt(style=name, size=16, **LAYERS).function._grams for name in ("waves", photograph))
    for mixed, a, b in zip(both, one, other, strict=True):
        torch.testing.assert_close(mixed, 0.75 * a + 0.25 * b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size: expected an integer >= 16, got 8"),
        ({"style": "nobody"}, "style: expected a picture, or the name of one in .*, got 'nobody'"),
        ({"content": "nowhere"}, "content: expected photographs, got nowhere, which does not exist"),
        ({"style_weight": -1}, "style_weight: expected a finite number >= 0, got -1"),
        ({"style_weight": 0, "content_weight": 0}, "content_weight: expected one above 0 where style_weight is 0"),
        ({"style_shares": (1, 2)}, "style_shares: expected a weight for each of 1 styles, not all 0"),
        ({"split": "tset"}, "split: expected one of train, validation, test, all, got 'tset'"),
        ({"start": "black"}, "start: expected one of noise, content, got 'black'"),
        ({"network": "resnet"}, "network: expected one of vgg16, vgg19, got 'resnet'"),
        ({"content_layer": "relu1_3"}, "content_layer: expected layers of vgg16, relu1_1 to relu5_3, got 'relu1_3'"),
        ({"style_layers": ("conv",)}, "style_layers: expected layers of vgg16"),
        ({"style_layers": ()}, "style_layers: expected names of layers"),
        ({"content": []}, r"content: expected a path or several, got \[\]"),
    ],
)
def test_bad_arguments_are_named(tiny_vgg, pictures, options, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        NeuralArt(**({"style": "waves"} | options))


def test_a_split_without_photographs_is_an_error(tiny_vgg, pictures, tmp_path):
    task = NeuralArt(style="waves", split="test")
    alone = next(iter(task.photographs))
    (tmp_path / "few").mkdir()
    alone.rename(tmp_path / "few" / alone.name)
    with pytest.raises(ValueError, match="content: expected photographs of which some are of split 'train', got none"):
        NeuralArt(tmp_path / "few", "waves")
    assert NeuralArt(tmp_path / "few" / alone.name, "waves").split == "all"


def test_coordinates_and_pixels_are_each_others_inverse():
    pixels = torch.rand(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(to_pixels(to_theta(pixels), 5, 7), pixels)


# Layers and weights


def test_layers_are_numbered_as_they_are_built():
    assert [vgg.layer_number("x", name, "vgg16") for name in ("relu1_1", "relu2_1", "relu3_3", "relu4_1")] == [
        0,
        2,
        6,
        7,
    ]
    assert vgg.layer_number("x", "relu4_1", "vgg19") == 8
    assert [vgg.block_of(number, "vgg16") for number in (0, 1, 2, 6, 7, 12)] == [0, 0, 1, 2, 3, 4]
    assert [vgg.channels(number, "vgg16") for number in (0, 2, 4, 7, 12)] == [64, 128, 256, 512, 512]
    assert vgg._places("vgg16") == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert Weights().convolutions == 8


def test_grams_do_not_depend_on_how_many_places_there_are():
    features = torch.rand(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(gram(features), gram(features.repeat(1, 2, 3)))


def test_missing_and_damaged_weights_are_errors_that_say_what_to_do(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    arguments = "vgg16", 1, torch.float32, torch.device("meta")
    with pytest.raises(
        FileNotFoundError, match=r"network: the weights of vgg16 are not in .*no network\. Put the file"
    ):
        vgg.load(*arguments)
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / REAL.name
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"expected torchvision's weights of vgg16, got .*; remove the file"):
        vgg.load(*arguments)
    torch.save({"features.0.weight": torch.zeros(3), "features.0.bias": torch.zeros(64)}, file)
    with pytest.raises(ValueError, match=r"got no convolution 0 of shape \[64, 3, 3, 3\]"):
        vgg.load(*arguments)
    torch.save({"features.0.weight": torch.full((64, 3, 3, 3), torch.nan), "features.0.bias": torch.zeros(64)}, file)
    with pytest.raises(ValueError, match="numbers that are not finite in convolution 0"):
        vgg.load(*arguments)


@needs_weights
def test_the_real_network_is_torchvisions():
    """Its first block, with torchvision's own modules and the weights as torch loads them."""
    from fastl2l.tasks._torchvision import torchvision

    features = vgg.load("vgg16", 3, torch.float32, torch.device("cpu"))
    state = torch.load(REAL, weights_only=True, mmap=True)
    module = torchvision().models.vgg.make_layers([64, 64, "M", 128], batch_norm=False)
    module.load_state_dict({name: state[f"features.{name}"] for name in module.state_dict()})
    module[4] = nn.AvgPool2d(2)
    pixels = torch.rand(3, 24, 32)
    expected = module((pixels[None] - torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)) * 255)[0]
    torch.testing.assert_close(features(pixels)[2], expected, rtol=1e-4, atol=1e-2)


@needs_weights
def test_a_picture_is_painted_with_the_real_network(pictures):
    """Adam, at its rate for pictures, brings f far below its start."""
    task = NeuralArt(style="waves", size=16)
    problem = task.sample(0)
    theta = problem.theta0.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.2)
    start = problem.loss(theta, 0).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = problem.loss(theta, 0)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * start
