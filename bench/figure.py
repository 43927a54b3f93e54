"""Time a coordinate and step by N, beside the floors of this machine's arithmetic and memory.

python bench/figure.py bench/results/FILE.json docs/images/roofline.png
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from competitors import BYTES, multiply_adds
from matplotlib.axes import Axes

from fastl2l.plots import legend_beneath, save_panels

COLOURS = {"fastl2l": "#D55E00", "compile": "#0072B2", "eager": "#7F7F7F", "jax": "#009E73"}
LABELS = {"compile": "torch.compile", "eager": "PyTorch", "jax": "JAX"}


def draw(axes: Axes, *, what: str, rows: list[dict[str, Any]]) -> None:
    """One panel: a line for everyone, and the two floors."""
    rows = [row for row in rows if row["group"].startswith(what + ",")]
    for who, colour in COLOURS.items():
        mine = sorted((row["coordinates"], row["ns_per_coordinate_step"]) for row in rows if row["who"] == who)
        if mine:
            width = 2.4 if who == "fastl2l" else 1.5
            axes.plot(
                *zip(*mine, strict=True), "o-", color=colour, linewidth=width, markersize=4, label=LABELS.get(who, who)
            )
    sgemm = multiply_adds(what) / rows[0]["sgemm_multiply_adds_per_ns"]
    copy = BYTES[what] / rows[0]["copy_bytes_per_ns"]
    axes.axhline(
        sgemm, color="black", linewidth=1, linestyle="--", label=f"sgemm, as many multiply-adds: {sgemm:.0f} ns"
    )
    axes.axhline(copy, color="black", linewidth=1, linestyle=":", label=f"memory copy, as many bytes: {copy:.0f} ns")
    axes.set(xscale="log", yscale="log", xlabel="coordinates", ylabel="ns a coordinate and step")
    axes.grid(axis="y")
    legend_beneath(axes, axes.get_lines())


def main(source: str, target: str) -> None:
    """Draw the figure."""
    results = json.loads(Path(source).read_text())
    about = results["about"]
    title = f"{about['processor']}, {about['threads']} threads, {about['instruction_set']}"
    save_panels(target, [(what, partial(draw, what=what, rows=results["rows"])) for what in BYTES], title)


if __name__ == "__main__":
    main(*sys.argv[1:])
