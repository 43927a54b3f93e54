"""Results as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastl2l.files import write_text


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Named tuples of one kind, a row each."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([rows[0]._fields, *rows])
    write_text(path, text.getvalue())
