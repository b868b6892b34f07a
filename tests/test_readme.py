"""Promises of the documents: every example runs as it is printed, every command exists, the tree is the house as it stands."""

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from experiments.readme_table import BEGIN, END, filled
from mango_env.workloads import WORKLOADS
from train_policy.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = [(document, i, code) for document in DOCUMENTS for i, code in enumerate(blocks(document, "python"))]
COMMANDS = [
    line.split("#")[0].strip()
    for document in DOCUMENTS
    for block in blocks(document, "bash")
    for line in block.splitlines()
    if line.startswith("mango ")
]


@pytest.mark.parametrize(("document", "number", "code"), EXAMPLES, ids=[f"{document}-{i}" for document, i, _ in EXAMPLES])
def test_every_example_runs_as_it_is_printed(
    document: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(WORKLOADS)
    try:
        exec(compile(code, f"{document} example {number}", "exec"), {"__name__": f"{document}_{number}"})
    finally:
        for name in set(WORKLOADS) - set(before):
            del WORKLOADS[name]


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("mango", "mango_env", "train_policy")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_every_docstring_example_runs_as_it_is_printed(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_the_first_example_is_about_twenty_lines() -> None:
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert 12 <= len(lines) <= 22


def command_of(words: list[str]) -> tuple[list[str], set[str]]:
    """The sub-commands that a command line names, and its options."""
    path: list[str] = []
    group: Any = typer.main.get_command(app)
    for word in words[1:]:
        if word.startswith("-") or not hasattr(group, "commands"):
            break
        assert word in group.commands, f"mango {' '.join([*path, word])}: no such command"
        path.append(word)
        group = group.commands[word]
    known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    return path, known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documents_exists_with_its_options(command: str) -> None:
    words = shlex.split(command)
    path, known = command_of(words)
    assert path
    assert {word for word in words if word.startswith("--")} <= known


def test_every_command_explains_itself() -> None:
    runner = CliRunner()
    pending: list[tuple[list[str], object]] = [([], typer.main.get_command(app))]
    while pending:
        path, command = pending.pop()
        shown = runner.invoke(app, [*path, "--help"])
        assert shown.exit_code == 0 and len(shown.stdout.splitlines()) > 3, path
        pending += [([*path, name], child) for name, child in getattr(command, "commands", {}).items()]


def tree() -> list[tuple[str, str]]:
    """(path, comment) of every line of the README's tree; two spaces of indentation are one level."""
    (text,) = blocks("README.md", "text")
    found, folders = [], [""]
    for line in text.splitlines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        found.append((folders[-1] + name, comment.strip()))
        if name.endswith("/"):
            folders.append(folders[-1] + name)
    return found


def test_the_tree_names_every_module_and_folder_once_with_a_comment() -> None:
    listed = tree()
    names = [name for name, _ in listed]
    assert len(names) == len(set(names))
    assert [name for name, comment in listed if len(comment) < 8] == []
    missing = [name for name in names if not (ROOT / name).exists()]
    assert missing == []
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("mango", "mango_env", "train_policy", "trajectories", "deploy", "experiments", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(modules - set(names)) == []


def test_h4_the_algorithm_has_fewer_than_15_lines_three_contributions_and_its_limitations() -> None:
    text = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    (box,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in box.splitlines() if line.strip()]) < 15
    contributions = text.split("Three contributions:")[1].split("Limitations:")[0]
    assert len(re.findall(r"^\d\. ", contributions, flags=re.MULTILINE)) == 3
    assert text.split("Limitations:")[1].count("\n- ") >= 3
    assert "(docs/algorithm.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_h5_results_carry_command_commit_hardware_and_versions() -> None:
    from train_policy.provenance import about

    facts = about("mango demo")
    assert facts["command"] == "mango demo" and facts["hardware"]["cores"] >= 1 and "torch" in facts["versions"]
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", facts["commit"])
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        stamp = content.get("about", content)
        assert {"command", "commit", "hardware", "versions", "date"} <= set(stamp) and stamp["commit"], path


def test_h5_the_docker_image_is_made_of_what_is_there() -> None:
    """No image can be built in a test: its base is a Python that is supported, and its steps are targets of the Makefile."""
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith(("#", " "))]
    base = dict(steps)["FROM"]
    assert base.startswith("python:3.11") and ">=3.11" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    made = re.findall(r'make"?,? "?([a-z-]+)', "\n".join(" ".join(step) for step in steps if step[0] in ("RUN", "CMD")))
    assert made == ["setup", "test"] and set(made) <= set(targets)


def test_h8_readme_licence_and_citation_agree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in ("LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert f"({file})" in readme and (ROOT / file).is_file()
    assert "MIT" in readme and "MIT License" in (ROOT / "LICENSE").read_text()
    assert "license: MIT" in (ROOT / "CITATION.cff").read_text()


def test_the_table_of_results_is_filled_between_its_markers() -> None:
    assert filled(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="once each"):
        filled("no markers", "new")
    run = subprocess.run([sys.executable, "-m", "experiments.readme_table", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
