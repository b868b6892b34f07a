"""A results file as one self-contained HTML page and a CSV of its rows.

Reads what `mango evaluate`, `mango demo` and `mango run` write. The page inlines its script and asks nothing of the network:

    mango report demo.json --out runs/demo/report.html
"""

import os
from pathlib import Path

from train_policy.report_data import Result, read_result, write_csv
from train_policy.report_figures import figures
from train_policy.report_page import page


def report_file(results: Path, out: Path) -> tuple[Path, Path]:
    """The page and the CSV of a results file: both paths."""
    return write_report(read_result(results), out)


def write_report(result: Result, path: Path) -> tuple[Path, Path]:
    """Write the page and, beside it, the CSV of its rows: both paths."""
    text = page(result, figures(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path, write_csv(path.with_suffix(".csv"), result.rows)
