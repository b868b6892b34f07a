"""Promises about the house: imports go down only, in no circle; nothing heavy comes along; no file outgrows its reader."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = ("mango", "mango_env", "train_policy")
PROGRAMS = ("trajectories", "deploy", "experiments", "benchmarks", "main")
BASE = {"torch", "numpy", "safetensors"}
ENV = BASE | {"gymnasium", "h5py", "mango"}
HEAVY = {"d3rlpy", "stable_baselines3", "sb3_contrib", "minari", "plotly", "sklearn", "PIL", "yaml", "gym", "gym_notices", "ray"}
HEAVY |= {"sacrebleu"}
HUB = {"huggingface_hub"}

# floor -> what its modules may import when they are loaded, and what further a function may import when it is called
LOADED = {"mango": BASE, "mango_env": ENV, "train_policy": ENV | {"mango_env", "typer", "rich", "click"}}
CALLED = {
    "mango": BASE | HUB | {"triton"},
    "mango_env": ENV | {"sklearn", "PIL", "minari", "d3rlpy", "stable_baselines3"},
    "train_policy": LOADED["train_policy"] | HEAVY,
}
# modules that subclass a heavy library's classes load it; whoever needs them imports them inside a function
ADAPTERS: dict[str, set[str]] = {
    "mango.kernels": {"triton"},
    "mango.kernel_formats": {"triton"},
    "mango_env.layer_vec_env": {"stable_baselines3"},
    "train_policy.d3rlpy_backend": {"d3rlpy", "gym_notices"},
    "train_policy.ppo": {"stable_baselines3", "sb3_contrib"},
    "train_policy.sb3_modules": {"stable_baselines3"},
}


@cache
def files(suffix: str = "") -> list[Path]:
    """Every file of the checkout that git knows or would take, without the ignored ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):             # an unpacked archive has no git
        found = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return sorted({p for p in found if p.is_file() and p.name.endswith(suffix)})


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {module_name(p): ast.parse(p.read_text(), str(p)) for p in files(".py")}


def statements(tree: ast.AST, loaded: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is loaded, or those that run when a function is called."""

    def walk(node: ast.AST, inside: bool) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                if inside != loaded:
                    yield child
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(tree, False)


def targets(tree: ast.AST, loaded: bool) -> Iterator[str]:
    """Dotted names that the import statements name; `from a import b` gives `a.b` where that is a module, else `a`."""
    for node in statements(tree, loaded):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        assert node.level == 0, f"relative import at line {node.lineno}: write the absolute name"
        assert node.module is not None
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in modules() else node.module


def foreign(name: str) -> set[str]:
    """The roots that a module's imports of either kind reach, without its own floor."""
    return {t.split(".")[0] for loaded in (True, False) for t in targets(modules()[name], loaded)} - {name.split(".")[0]}


@pytest.mark.parametrize("floor", INSTALLED)
def test_imports_only_go_down(floor: str) -> None:
    wrong = []
    for name, tree in modules().items():
        if name.split(".")[0] != floor:
            continue
        extra = ADAPTERS.get(name, set())
        for loaded, allowed in ((True, LOADED[floor] | extra), (False, CALLED[floor] | extra)):
            roots = {t.split(".")[0] for t in targets(tree, loaded)} - {floor} - set(sys.stdlib_module_names)
            when = "loading" if loaded else "a call"
            wrong += [f"{name} imports {root} on {when}" for root in sorted(roots - allowed)]
    assert not wrong, "; ".join(wrong)


def test_only_kernels_import_triton() -> None:
    kernels = {"mango.kernels", "mango.kernel_formats"}
    assert [n for n in modules() if n.startswith("mango") and n not in kernels and "triton" in foreign(n)] == []


def test_adapters_of_heavy_libraries_are_loaded_only_on_call() -> None:
    loading = {n: sorted(set(targets(t, True)) & set(ADAPTERS)) for n, t in modules().items() if n.split(".")[0] in INSTALLED}
    assert {n: found for n, found in loading.items() if found and n not in ADAPTERS} == {}


def test_installed_code_never_imports_a_folder_that_is_not_installed() -> None:
    outside = set(PROGRAMS) | {"tests", "policies"}
    assert {n: sorted(foreign(n) & outside) for n in modules() if n.split(".")[0] in INSTALLED and foreign(n) & outside} == {}


def test_nothing_imports_the_folders_of_files() -> None:
    """`policies/` and `trajectories/` hold files; one program makes policies from a campaign."""
    importers = {n: foreign(n) & {"policies", "trajectories"} for n in modules() if not n.startswith("tests")}
    assert {n: found for n, found in importers.items() if found} == {"experiments.make_universal": {"trajectories"}}


def test_there_is_no_circle_of_imports() -> None:
    """Tarjan's strongly connected components over every import, those inside functions included."""
    ours = modules()
    named = {n: {*targets(tree, True), *targets(tree, False)} for n, tree in ours.items()}
    edges = {n: sorted((found & set(ours)) - {n}) for n, found in named.items()}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                circles.append(sorted(component))

    for node in edges:
        if node not in order:
            visit(node)
    assert circles == []


def test_every_module_is_at_most_500_lines() -> None:
    assert {str(p.relative_to(ROOT)): n for p in files(".py") if (n := len(p.read_text().splitlines())) > 500} == {}


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    homes = "|".join(("root", "work", "Users", "home/[a-z]+"))
    pattern = re.compile(rf"(?<![\w.~$)<-])/(?:{homes})/")
    text = (".py", ".md", ".toml", ".yml", ".yaml", ".json", ".cff", ".txt", "Makefile", "run", "Dockerfile", ".ipynb")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files()
        if path.name.endswith(text)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def pulled_in_by(statement: str) -> set[str]:
    """The root modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, json; before = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_import_mango_needs_torch_numpy_and_safetensors_alone() -> None:
    not_needed = HEAVY | HUB | {"gymnasium", "h5py", "typer", "rich", "triton", "mango_env", "train_policy"}
    assert pulled_in_by("import mango") & not_needed == set()


def test_mango_runs_where_only_torch_numpy_and_safetensors_are_installed() -> None:
    allowed = pulled_in_by("import torch, torch.optim, numpy, safetensors.torch")
    fresh = pulled_in_by("import mango") - allowed - set(sys.stdlib_module_names)
    assert {name for name in fresh if not name.startswith("_")} <= {"mango", "torch", "torchgen", "numpy", "safetensors"}


def test_c14_running_a_frozen_policy_imports_no_training_code() -> None:
    loaded = pulled_in_by("from mango import MANGO, load_policy; load_policy('demo')")
    assert loaded & (HEAVY | {"gymnasium", "h5py", "mango_env", "train_policy"}) == set()


def test_import_mango_env_pulls_neither_d3rlpy_nor_sb3_nor_gym() -> None:
    everything = "import mango_env; [getattr(mango_env, name) for name in mango_env.__all__ if name != 'LayerVecEnv']"
    for statement in ("import mango_env", everything):
        assert pulled_in_by(statement) & (HEAVY | {"typer", "rich", "train_policy"}) == set()


def test_the_command_starts_without_torch() -> None:
    assert pulled_in_by("import train_policy.cli") & (HEAVY | {"torch", "numpy", "h5py"}) == set()
