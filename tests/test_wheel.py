"""Promises about what `pip install` gives: three packages and the frozen policies, working far from the checkout."""

import email
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mango", "mango_env", "train_policy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is made of, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in (*PACKAGES, "policies"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of another environment that has the wheel and, beside it, this environment's third parties.

    A path in a .pth file is searched for modules, but its own .pth files are not read: an editable install of the checkout
    in this environment stays out.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "third_parties.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-qq", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bin" / "python"


@pytest.mark.wheel
def test_the_wheel_carries_three_packages_and_the_frozen_policies_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    frozen = {p.name for pattern in ("*.safetensors", "*.json") for p in (ROOT / "policies").glob(pattern)}
    assert {name.removeprefix("mango/frozen/") for name in names if name.startswith("mango/frozen/")} == frozen
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"train_policy/configs/{p.name}" for p in (ROOT / "train_policy" / "configs").glob("*.yml")} <= names
    assert {"mango/native.c", "mango/native_formats.h", "mango/native_adam.h", "mango/ladder.json"} <= names
    assert {name for name in names if not name.endswith((".py", ".typed", ".yml", ".safetensors", ".json", ".c", ".h"))} == set()


@pytest.mark.wheel
def test_h6_the_wheel_installs_elsewhere_and_trains_a_model_with_a_shipped_policy(elsewhere: Path, tmp_path: Path) -> None:
    program = f"""
import mango, torch
from pathlib import Path
from mango import MANGO
assert not Path(mango.__file__).is_relative_to({str(ROOT)!r}), mango.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
optimizer = MANGO(model.named_parameters(), lr=1e-2, policy="demo", memory_budget=0.25, policy_update_freq=5)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(torch.ones(16, 64)).square().mean()
    loss.backward()
    optimizer.step()
    assert optimizer.state_bytes() <= optimizer.memory_budget
print("trained", loss.item() < 0.1)
"""
    run = subprocess.run([elsewhere, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "trained True\n"
    assert run.stderr == ""


@pytest.mark.wheel
def test_the_wheel_brings_the_mango_command(elsewhere: Path, tmp_path: Path) -> None:
    run = subprocess.run([elsewhere.parent / "mango", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for command in ("demo", "collect", "data", "train", "evaluate", "freeze", "inspect", "run", "report"):
        assert command in run.stdout


@pytest.mark.wheel
def test_h8_licence_and_requirements_agree_with_the_files(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    message = email.message_from_bytes(archive.read(metadata))
    assert message["Name"] == "mango-optim"
    assert message["License-Expression"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert "MIT" in (ROOT / "README.md").read_text()
    assert f"version: {message['Version']}" in (ROOT / "CITATION.cff").read_text()
    base = {line.split(";")[0] for line in message.get_all("Requires-Dist", []) if "extra ==" not in line}
    names = {"".join(c for c in line if c.isalnum() or c == "-").rstrip("0123456789") for line in base}
    assert names == {"torch", "numpy", "safetensors", "gymnasium", "h5py", "typer", "rich", "triton"}


def test_every_declared_package_is_pinned_by_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["train"], *extras["ray"], *extras["metrics"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    names = {line.split(";")[0].split(">")[0].split("=")[0].strip().lower() for line in declared}
    assert names - pinned == set()
