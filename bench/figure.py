"""Time a coordinate and step by N, beside the floors of this machine's arithmetic and memory.

python bench/figure.py bench/results/FILE.json docs/images/roofline.png
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from competitors import BYTES, multiply_adds
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastl2l.files import write_bytes

COLOURS = {"fastl2l": "#D55E00", "compile": "#0072B2", "eager": "#7F7F7F", "jax": "#009E73"}
LABELS = {"compile": "torch.compile", "eager": "PyTorch", "jax": "JAX"}


def draw(axes: Axes, what: str, rows: list[dict[str, Any]]) -> None:
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
    axes.set(xscale="log", yscale="log", xlabel="coordinates", ylabel="ns a coordinate and step", title=what)
    axes.grid(axis="y", color="#E6E6E6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main(source: str, target: str) -> None:
    """Draw the figure."""
    results = json.loads(Path(source).read_text())
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), BYTES, strict=True):
        draw(axes, what, results["rows"])
    about = results["about"]
    figure.suptitle(f"{about['processor']}, {about['threads']} threads, {about['instruction_set']}", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160)
    write_bytes(target, picture.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
