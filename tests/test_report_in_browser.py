"""The HTML report is opened and clicked through in Debian's Chromium, as a reader would see it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from train_policy.report import report_file
from train_policy.report_data import HEAT_MAPS

if TYPE_CHECKING:
    from playwright.sync_api import Page

LOSSES = (9.5, 10.25, 100.0, 0.875)                      # as text they would sort as 0.875, 10.25, 100, 9.5
SIZES = (9_000, 10_000, 100_000, 800)
PATIENCE = 240_000.0                                     # milliseconds: five seconds of drawing on cores that others use too


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up study: two policies, two seeds, decisions, bytes over time, curves."""
    folder, rows = tmp_path_factory.mktemp("report"), []
    for i, (loss, size) in enumerate(zip(LOSSES, SIZES, strict=True)):
        rows.append({
            "policy": ("water-filling", "mine")[i % 2], "workload": "digits_mlp", "seed": i // 2, "val_loss": loss,
            "budget_bytes": 120_000, "state_bytes_peak": size, "steps": 30, "loss_curve": [2.0, 1.5, 1.0],
            "layers": ["fc1.weight", "fc2.weight"], "decisions": [["full", "m8v8"], ["m4v0", "m8v8"], ["m4v0", "m4v0"]],
            "state_bytes": [size, size // 2, size // 3],
        })  # fmt: skip
    (folder / "study.json").write_text(json.dumps({"kind": "study", "about": {"command": "a test"}, "rows": rows}))
    return report_file(folder / "study.json", folder / "report.html")[0]


@pytest.fixture(scope="module")
def opened(report: Path) -> Iterator[tuple["Page", list[str]]]:
    """The page in a browser, and what went wrong on it: errors of its scripts, and everything that it asked the network for."""
    api = pytest.importorskip("playwright.sync_api", reason='playwright is not installed: pip install "mango-optim[dev]"')
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    problems: list[str] = []
    with api.sync_playwright() as playwright:
        # the file is our own and root has no sandbox in a container
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.extend([] if request.url.startswith(("file:", "data:")) else [request.url]))
        page.goto(report.as_uri())
        page.wait_for_function("[...document.querySelectorAll('[id^=figure]')].every(f => f.querySelector('.main-svg'))")
        yield page, problems
        browser.close()


def column(page: Any, name: str) -> list[str]:
    """Exact values of a column of the last table, top to bottom."""
    found: list[str] = page.evaluate(
        """name => {
            const table = [...document.querySelectorAll("table")].at(-1);
            const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === name);
            return [...table.tBodies[0].rows].map(row => row.cells[at].dataset.v ?? row.cells[at].textContent);
        }""",
        name,
    )
    return found


def test_every_figure_has_drawn_its_marks_and_nothing_went_wrong(opened: tuple[Any, list[str]], tmp_path: Path) -> None:
    page, problems = opened
    marks: dict[str, int] = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("[id^=figure]")].map(figure => [
            figure.closest("section").querySelector("h2").textContent,
            figure.querySelectorAll(".point, .js-line, .heatmaplayer image").length]))"""
    )
    expected = {"Loss against bytes: digits_mlp": 3, "State bytes against the budget": 4, "State bytes over time": 2,
                "Training loss on digits_mlp": 2}  # fmt: skip
    assert len(marks) == len(expected) + HEAT_MAPS and all(marks[heading] >= least for heading, least in expected.items()), marks
    assert [count for heading, count in marks.items() if heading.startswith("Decisions: ")] == [1] * HEAT_MAPS
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 20_000 and problems == []


def test_a_click_on_a_heading_sorts_by_number_and_another_the_other_way(opened: tuple[Any, list[str]]) -> None:
    page, problems = opened
    for name, values in (("val_loss", LOSSES), ("state_bytes_peak", SIZES)):
        heading = page.locator("table").last.locator("th", has_text=name)
        for down in (False, True):
            heading.click()
            assert [float(value) for value in column(page, name)] == sorted(values, reverse=down)
    heading = page.locator("table").last.locator("th", has_text="policy")
    heading.click()
    assert column(page, "policy") == ["mine", "mine", "water-filling", "water-filling"]
    assert sorted(float(value) for value in column(page, "val_loss")[:2]) == sorted(LOSSES[1::2])          # whole rows moved
    assert problems == []


def test_what_a_mark_stands_for_is_told_where_the_pointer_is(opened: tuple[Any, list[str]]) -> None:
    page, problems = opened
    page.locator("#figure0 .point").first.hover(force=True)
    page.wait_for_selector("#figure0 .hoverlayer .hovertext")
    assert problems == []
