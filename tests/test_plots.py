"""Figures show what they should, in each format, and leave matplotlib as it was."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from fastl2l.evaluate import Curves
from fastl2l.meta import Epoch
from fastl2l.plots import (
    COLOURS,
    plot_curves,
    plot_final_losses,
    plot_history,
    plot_panels,
    plot_rates,
    plot_search,
)


@pytest.fixture
def curves():
    falling = torch.logspace(0, -2, 21, dtype=torch.float64)
    noise = torch.linspace(0.9, 1.1, 5, dtype=torch.float64)[:, None]
    losses = {"adam": falling.sqrt() * noise, "lstm": falling * noise, "odd": falling.sqrt() * noise * 1.2}
    kinds = {"adam": "baseline", "lstm": "learned", "odd": "other"}
    metadata = {"task": {"name": "digits"}, "optimizers": {name: {"kind": kind} for name, kind in kinds.items()}}
    return Curves(losses, metadata)


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure drawn, by looking over savefig's shoulder."""
    drawn = []
    savefig = Figure.savefig

    def spy(figure, *args, **options):
        drawn.extend(figure.axes)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return drawn


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_each_format_is_written_and_repeats(curves, tmp_path, suffix, head):
    path = tmp_path / f"figure.{suffix}"
    assert plot_curves(curves, path) == path
    first = path.read_bytes()
    assert first.startswith(head)
    assert len(first) > 5000
    assert plot_curves(curves, path).read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_learned_is_solid_and_strong_and_baselines_are_dashed(curves, tmp_path, axes):
    plot_curves(curves, tmp_path / "a.svg")
    lines = {line.get_label().split()[0]: line for line in axes[0].get_lines()}
    assert not lines["lstm"].is_dashed()
    assert lines["adam"].is_dashed()
    assert lines["lstm"].get_linewidth() > lines["adam"].get_linewidth()
    assert lines["lstm"].get_color() == COLOURS["lstm"]
    assert lines["adam"].get_color() == COLOURS["adam"]
    assert lines["odd"].get_color() not in COLOURS.values()
    for name, line in lines.items():
        assert line.get_ydata().tolist() == curves.mean(name).tolist()
    legend = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert [text.split()[0] for text in legend] == ["lstm", "adam", "odd"]  # as they ended
    assert legend[0] == "lstm  0.01000 ± 0.00098"
    assert axes[0].get_yscale() == "log"
    assert axes[0].get_title(loc="left") == "digits, mean of 5 problems"


def test_the_band_is_the_interval(curves, tmp_path, axes):
    plot_curves(curves, tmp_path / "a.svg", title="mine")
    assert axes[0].get_title(loc="left") == "mine"
    expected = {round(end[-1].item(), 9) for name in curves.losses for end in curves.interval(name)}
    drawn = {round(y, 9) for band in axes[0].collections for x, y in band.get_paths()[0].vertices if x == 20}
    assert expected <= drawn


def test_divergence_is_said_and_cut_off(curves, tmp_path, axes):
    curves.losses["adam"][0, 10:] = math.inf
    curves.losses["odd"] *= torch.logspace(0, 9, 21, dtype=torch.float64)
    plot_curves(curves, tmp_path / "a.svg")
    assert any("adam  diverged in 1 of 5" in text.get_text() for text in axes[0].get_legend().get_texts())
    assert axes[0].get_ylim()[1] < 10  # what explodes does not flatten the rest


@pytest.mark.parametrize(
    "losses",
    [
        torch.full((2, 4), math.inf, dtype=torch.float64),
        torch.full((2, 4), -1.0, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
    ],
)
def test_odd_losses_still_make_a_figure(losses, tmp_path, axes):
    plot_curves(Curves({"a": losses}), tmp_path / "a.png")
    assert axes[0].get_yscale() == "linear"


def test_linear_on_request(curves, tmp_path, axes):
    plot_curves(curves, tmp_path / "a.svg", log=False)
    assert axes[0].get_yscale() == "linear"


def test_matplotlib_is_left_as_it_was(curves, tmp_path):
    before = dict(matplotlib.rcParams)
    plot_curves(curves, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_bad_input_is_named(curves, tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .png, .svg, .pdf, got '.*a.jpg'"):
        plot_curves(curves, tmp_path / "a.jpg")
    with pytest.raises(TypeError, match=r"curves: expected what fastl2l.evaluate returns, got dict"):
        plot_curves({}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_history_is_drawn_whole_and_empty_ones_are_refused(tmp_path, axes):
    history = [Epoch(n, 1 / n, 0.5 / n, 1e-3, 0) for n in range(1, 6)]
    path = plot_history(history, tmp_path / "training.png")
    assert [len(line.get_xdata()) for line in axes[0].get_lines()] == [5, 5, 1]
    width, height = Image.open(path).size
    assert width == 1280
    assert height > 800  # and a legend beneath
    assert axes[0].get_lines()[1].get_label() == "validation, last step"
    plot_history(history, tmp_path / "log.png", log_floor=1e-5)
    assert axes[-1].get_lines()[1].get_label() == "validation, geometric mean of the last steps + 1e-05"
    with pytest.raises(ValueError, match="history: expected at least one epoch"):
        plot_history([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# Several panels


def test_panels_stand_side_by_side_under_their_titles(curves, tmp_path, axes):
    path = plot_panels({"left": curves, "right": curves}, tmp_path / "a.png", title="both")
    assert [one.get_title(loc="left") for one in axes] == ["left", "right"]
    assert axes[0].figure.get_suptitle() == "both"
    assert len(axes[1].get_lines()) == 3
    left, right = (one.get_position() for one in axes)
    assert left.x1 < right.x0
    assert (left.y0, left.y1) == pytest.approx((right.y0, right.y1))
    width, height = Image.open(path).size
    assert width == 1840 > height


def test_final_losses_stand_over_their_number(curves, tmp_path, axes):
    worse = Curves({name: losses * 2 for name, losses in curves.losses.items()}, curves.metadata)
    groups = {"one layer": {5: curves, 20: worse}, "two layers": {20: curves}}
    plot_final_losses(groups, tmp_path / "a.svg", title="study", xlabel="units", marked=20)
    bars = {bar.get_label(): bar for bar in axes[0].containers}
    line = bars["lstm"].lines[0]
    expected = curves.final("lstm")[0]
    assert line.get_xdata().tolist() == [5, 20]
    assert line.get_ydata().tolist() == pytest.approx([expected, 2 * expected])
    assert not line.is_dashed()
    assert bars["adam"].lines[0].is_dashed()
    assert axes[0].get_xlabel() == "units"
    marks = [one for one in axes[0].get_lines() if list(one.get_xdata()) == [20, 20]]
    assert len(marks) == 1
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert [one for one in axes[1].get_lines() if list(one.get_xdata()) == [20, 20]] == []


def test_final_losses_that_are_infinite_are_left_out(curves, tmp_path, axes):
    lost = Curves({name: losses * math.inf for name, losses in curves.losses.items()}, curves.metadata)
    plot_final_losses({"a": {5: curves, 20: lost}}, tmp_path / "a.png", title="b", xlabel="c", marked=5)
    bars = {bar.get_label(): bar for bar in axes[0].containers}
    assert [math.isnan(loss) for loss in bars["lstm"].lines[0].get_ydata()] == [False, True]
    plot_final_losses({"a": {5: lost}}, tmp_path / "b.png", title="b", xlabel="c", marked=5)


def test_a_long_curve_is_drawn_by_means(tmp_path, axes):
    losses = torch.rand(3, 10_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    plot_curves(Curves({"adam": losses, "sgd": losses + 1}), tmp_path / "a.png")
    line = next(line for line in axes[0].get_lines() if line.get_label().startswith("adam"))
    assert len(line.get_xdata()) == 200
    stretch = losses.mean(0).tensor_split(200)[100]
    assert line.get_ydata()[100] == pytest.approx(stretch.mean().item())
    assert line.get_xdata()[100] == pytest.approx(torch.arange(10_001.0).tensor_split(200)[100].mean().item())
    assert axes[0].get_xlim() == (0, 10_000)


def test_a_curve_of_a_thousand_steps_is_drawn_whole(tmp_path, axes):
    plot_curves(Curves({"adam": torch.ones(2, 1001, dtype=torch.float64)}), tmp_path / "a.png")
    assert axes[0].get_lines()[0].get_xdata().tolist() == list(range(1001))


def test_final_losses_may_stand_over_a_logarithmic_number(curves, tmp_path, axes):
    plot_final_losses({"a": {100: curves, 1600: curves}}, tmp_path / "a.svg", title="b", xlabel="c", log_x=True)
    assert axes[0].get_xscale() == "log"
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["100", "1,600"]
    assert axes[0].get_xticks(minor=True).tolist() == []


RATES = (0.001, 0.01, 0.1, 1.0)


def many_rates(kind="random"):
    losses = losses_of(kind, ["lstm", *(f"{name} {lr:g}" for name in ("adam", "sgd") for lr in RATES)]).losses
    about = {"lstm": {"kind": "learned"}}
    about |= {
        f"{name} {lr:g}": {"kind": "baseline", "optimizer": name, "lr": lr} for name in ("adam", "sgd") for lr in RATES
    }
    return Curves(losses, {"optimizers": about})


def test_baselines_stand_over_their_rates_and_rules_lie_across(tmp_path, axes):
    curves = many_rates()
    curves.losses["adam 1"][0, -1] = math.inf
    plot_rates({"a": curves}, tmp_path / "a.svg", title="b")
    lines = {line.get_label().split()[0]: line for line in axes[0].get_lines()}
    assert lines["adam"].get_xdata().tolist() == list(RATES)
    assert lines["adam"].get_ydata()[:3].tolist() == [curves.final(f"adam {lr:g}")[0] for lr in RATES[:3]]
    assert math.isnan(lines["adam"].get_ydata()[3])
    assert set(lines["lstm"].get_ydata()) == {curves.final("lstm")[0]}
    assert not lines["lstm"].is_dashed()
    assert lines["sgd"].is_dashed()
    assert axes[0].get_xscale() == "log"


def test_a_final_loss_of_many_steps_is_called_so(curves, tmp_path, axes):
    curves.metadata["last"] = 4
    plot_curves(curves, tmp_path / "a.svg")
    assert axes[0].get_legend().get_title().get_text() == "mean of the last 4 losses, 95% interval"
    plot_final_losses({"a": {5: curves}}, tmp_path / "b.svg", title="b", xlabel="c")
    assert axes[1].get_ylabel() == "mean of the last 4 losses"


def test_a_search_is_drawn_with_what_diverged(tmp_path, axes):
    plot_search([(1e-3, 0.2), (1e-2, 0.1), (1e-1, math.inf)], tmp_path / "a.svg", title="search")
    tried, diverged = axes[0].get_lines()
    assert tried.get_xdata().tolist() == [1e-3, 1e-2]
    assert diverged.get_xdata().tolist() == [1e-1]
    assert diverged.get_label() == "diverged"
    plot_search([(1e-1, math.inf)], tmp_path / "b.svg", title="search")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_panels({}, path, title="a"), "panels: expected at least one, got none"),
        (lambda path: plot_search([], path, title="a"), "trials: expected at least one, got none"),
    ],
)
def test_nothing_is_not_drawn(tmp_path, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# What is written, and what is drawn

KINDS = {  # losses that leave no room, no range or no end, from uniform numbers [runs, steps + 1]
    "random": lambda uniform, number: 10 ** (2 * uniform - 1),
    "everywhere": lambda uniform, number: 10.0 ** (6 * ((torch.arange(uniform.shape[1]) + number) % 2) - 3) + uniform,
    "rising": lambda uniform, number: torch.logspace(-2, 2, uniform.shape[1], dtype=torch.float64) * (uniform + number),
    "falling": lambda uniform, number: torch.logspace(2, -2, uniform.shape[1], dtype=torch.float64) + 0.1 * uniform,
    "flat": lambda uniform, number: torch.full_like(uniform, 1.0 + number),
    "equal": lambda uniform, number: torch.ones_like(uniform),
    "negative": lambda uniform, number: 2 * uniform - 1,
    "zero": lambda uniform, number: torch.zeros_like(uniform),
    "infinite": lambda uniform, number: torch.where(torch.arange(uniform.shape[1]) < 7 * number, 10**uniform, math.inf),
    "lost": lambda uniform, number: torch.full_like(uniform, math.inf),
    "huge": lambda uniform, number: 10 ** (200 * uniform - 100),
}
NAMES = {
    "few": ["lstm", "adam", "sgd"],
    "many": [f"optimizer {n}" for n in range(30)],
    "long": ["lstm " * 30, "W" * 99],
    "odd": ["_a", "$b_{$", "$c$", r"\\$d"],
}


def losses_of(kind, names=NAMES["few"], steps=40):
    uniform = torch.rand(len(names), 3, steps + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = {name: KINDS[kind](uniform[number], number) for number, name in enumerate(names)}
    return Curves(losses, {"optimizers": {name: {"kind": "learned"} for name in names[:1]}})


def draw_history(kind, path):
    (training, *_), (validation, *_) = losses_of(kind, ["a", "b"]).losses.values()
    pairs = enumerate(zip(training.tolist(), validation.tolist(), strict=True))
    plot_history([Epoch(number, *pair, 1e-3, 0) for number, pair in pairs], path)


def draw_search(kind, path):
    (losses,) = losses_of(kind, ["a"]).losses.values()
    losses[0, ::3] = math.inf
    rates = torch.logspace(-5, 0, losses.shape[1]).tolist()
    plot_search(list(zip(rates, losses[0].tolist(), strict=True)), path, title="search")


def draw_final_losses(kind, path, names=NAMES["few"]):
    groups = {title: {units: losses_of(kind, names, units) for units in (5, 20, 80)} for title in ("one", "two")}
    plot_final_losses(groups, path, title="final", xlabel="units", marked=20)


def draw_panels(kind, path, names=NAMES["few"]):
    plot_panels({"a": losses_of(kind, names), "b": losses_of("random", names[:1])}, path, title="panels")


def drawn(artist):
    """The paths of a line or of a collection in pixels."""
    paths = [artist.get_path()] if isinstance(artist, Line2D) else artist.get_paths()
    return [artist.get_transform().transform_path(path).cleaned(remove_nans=True) for path in paths]


def covers(box, artist):
    """Whether any of an artist lies under a box; what is outside of the axes is clipped."""
    box = Bbox.intersection(box, artist.axes.bbox)
    if box is None:
        return False
    line = isinstance(artist, Line2D)
    box = box.padded(max(artist.get_linewidth(), artist.get_markersize()) / 2 * artist.figure.dpi / 72 if line else 0)
    filled = isinstance(artist, PolyCollection)
    return any(path.intersects_bbox(box, filled=filled) or box.count_contains(path.vertices) for path in drawn(artist))


def overlap(one, other):
    """By how many pixels two boxes overlap, in the direction where it is less."""
    return min(min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0))


def check_readable(figure):
    """Nothing written covers what is drawn or other writing, or is cut off, and the axes have room."""
    figure.draw_without_rendering()
    legends = figure.findobj(Legend)
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text())
    written = {one: one.get_window_extent() for one in (*legends, *texts)}
    for axes in figure.axes:
        artists = [*axes.lines, *axes.collections]
        assert artists
        assert [(text, one) for text, box in written.items() for one in artists if covers(box, one)] == []
        assert min(axes.get_window_extent().size) > 2.4 * figure.dpi
    titles = {figure._suptitle, *(title for axes in figure.axes for title in (axes._left_title, axes.title))}
    blocks = [box for one, box in written.items() if one in titles or one in legends]
    scales = [axis.get_tightbbox() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for number, block in enumerate(blocks):
        assert all(overlap(block, other) < 1 for other in blocks[:number] + scales)
    page = figure.bbox.padded(1)
    assert all(page.fully_contains(*corner) for box in blocks + scales for corner in (box.min, box.max))


@pytest.fixture
def readable(monkeypatch):
    """Check every figure in place of saving it; how many were checked."""
    checked = []

    def check(figure, *args, **options):
        check_readable(figure)
        checked.append(figure)

    monkeypatch.setattr(Figure, "savefig", check)
    return checked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "draw",
    [
        lambda kind, path: plot_curves(losses_of(kind), path),
        lambda kind, path: plot_curves(losses_of(kind), path, log=False),
        draw_panels,
        draw_final_losses,
        draw_history,
        draw_search,
        lambda kind, path: plot_rates({"a": many_rates(kind)}, path, title="rates"),
    ],
    ids=["curves", "linear", "panels", "final losses", "history", "search", "rates"],
)
def test_no_label_covers_what_is_drawn(kind, draw, tmp_path, readable):
    draw(kind, tmp_path / "a.png")
    assert len(readable) == 1


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", ["random", "infinite"])
@pytest.mark.parametrize(
    "draw",
    [lambda kind, path, names: plot_curves(losses_of(kind, names), path), draw_panels, draw_final_losses],
    ids=["curves", "panels", "final losses"],
)
def test_many_and_long_names_have_room(names, kind, draw, tmp_path, readable):
    draw(kind, tmp_path / "a.png", NAMES[names])
    assert len(readable[0].findobj(Legend)[0].get_texts()) == len(NAMES[names])


def test_long_titles_have_room(curves, tmp_path, readable):
    plot_panels({"left " * 40: curves, "right " * 40: curves}, tmp_path / "a.png", title="both " * 60 + "\nof them")
    assert len(readable) == 1


@pytest.mark.parametrize("slope", [-1, 0, 1])
def test_benchmarks_have_room(slope, tmp_path, monkeypatch, readable):
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.setattr(sys, "path", [*sys.path, str(bench), str(bench / "gpu")])
    import figure
    import picture

    rows = [
        {"what": what, "group": f"{what}, N = {numel}", "who": who, "state": state, "coordinates": numel}
        | {"ns_per_coordinate_step": (time := number * numel ** (slope / 2)), "median_s": time * numel / 1e9}
        | {"sgemm_multiply_adds_per_ns": 90.0, "copy_bytes_per_ns": 30.0}
        for number, who in enumerate(picture.STYLES | figure.COLOURS, 1)
        for what in figure.BYTES
        for numel in (10, 10**4, 10**7)
        for state in picture.SHARES
    ]
    about = {"processor": "a processor", "threads": 2, "instruction_set": "avx2"}
    (tmp_path / "results.json").write_text(json.dumps({"about": about, "rows": rows}))
    figure.main(tmp_path / "results.json", tmp_path / "roofline.png")
    stages = {"machine": {"found": {"copy": {"bytes_per_ns": 4000.0}}}, "speed": {"found": {"rows": rows}}}
    picture.draw({"about": {"device": "a GPU", "commit": "none", "quick": True}, "stages": stages})
    assert len(readable) == 2


def test_the_check_sees_what_is_covered():
    """A legend, a text, and a text that is cut off, each over what is there."""
    for cover in (
        lambda axes: axes.legend(loc="upper right"),
        lambda axes: axes.text(0.5, 0.5, "a"),
        lambda axes: axes.set_xlabel("x" * 200),
    ):
        axes = Figure(layout="constrained").add_subplot()
        axes.plot([0, 1], [0, 1], "o-", label="a")
        axes.fill_between([0, 1], [0, 0], [1, 1])
        check_readable(axes.figure)
        cover(axes)
        with pytest.raises(AssertionError):
            check_readable(axes.figure)
