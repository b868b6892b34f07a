"""docs/acceptance.md has one line for every promise, and the tests that it cites exist."""

import ast
import re
from pathlib import Path

COUNTS = {"A": 29, "B": 15, "C": 22, "D": 15, "E": 14, "F": 25, "G": 13, "H": 9, "I": 26, "J": 9}
STATUS = re.compile(r"(holds|measured|partly|does not hold|needs a GPU|not done)\b")


def rows(root: Path) -> list[list[str]]:
    """Cells of every line that is a promise."""
    lines = (root / "docs" / "acceptance.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| [A-J]\d+ \|", line)]


def test_every_promise_has_exactly_one_line_with_a_status(root: Path) -> None:
    found = rows(root)
    assert [row[0] for row in found] == [f"{letter}{i + 1}" for letter, count in COUNTS.items() for i in range(count)]
    for row in found:
        assert len(row) == 4 and STATUS.match(row[3]), row
        assert row[2] != "none" or row[3].startswith(("not done", "needs a GPU")), row


def test_every_test_that_is_cited_exists(root: Path) -> None:
    cited: dict[str, set[str]] = {}
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", (root / "docs" / "acceptance.md").read_text(encoding="utf-8")):
        cited.setdefault(path, set()).add(name)
    missing = []
    for path, names in sorted(cited.items()):
        tree = ast.parse((root / path).read_text(encoding="utf-8") if (root / path).is_file() else "")
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [f"{path}::{name}" for name in sorted(names - there)]
    assert sum(map(len, cited.values())) > 150 and not missing, "\n".join(missing)


def test_every_file_that_is_linked_exists(root: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (root / "docs" / "acceptance.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (root / "docs" / link).resolve().is_file()] == []
