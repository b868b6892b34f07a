"""Promises about naming a workload: a user's own as module:function or file.py:function, one line for what cannot be built."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mango_env.workloads import (
    WORKLOADS,
    ResumableWorkload,
    Workload,
    check_workload,
    digits,
    make_workload,
    mnist,
    register_workload,
    workload_name,
)

ROOT = Path(__file__).resolve().parent.parent
OWN = '''
from torch import nn
import {helper}

class Mine:
    def __init__(self, seed, steps=5):
        self.model, self.steps, self.seed, self.tag = nn.Linear(32, 32), steps, seed, {helper}.TAG
    def loss(self):
        return self.model.weight.square().mean()
    def evaluate(self):
        return dict(val_loss=0.0)
    build = classmethod(lambda cls, seed: cls(seed))

class Half(Mine):
    evaluate = None
    steps = model = None
    def __init__(self, seed): pass

number = 3
def keyword_only(*, seed): return Mine(seed)
def late(seed):
    import {helper}_late
    return Mine(seed)
'''


def build_by_hand(seed: int, steps: int = 10) -> Workload:
    return digits.digits_mlp(seed, steps=steps)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder with a user's module, as the current one; the module's name."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN.format(helper=f"{name}_helper"))
    (tmp_path / f"{name}_helper.py").write_text("TAG = 'beside'")
    (tmp_path / f"{name}_helper_late.py").write_text("")
    (tmp_path / f"{name}_broken.py").write_text("import there_is_no_such_module")
    monkeypatch.chdir(tmp_path)
    yield name
    for module in [m for m in sys.modules if name in m]:
        del sys.modules[module]


@pytest.mark.parametrize("form", ["{}:Mine", "{}:Mine.build", "{}:late", "{}.py:Mine", "./{}.py:Mine"])
def test_a_users_workload_is_found_in_the_current_folder(own: str, form: str) -> None:
    path = list(sys.path)
    workload = make_workload(form.format(own), 4)
    assert (workload.steps, workload.seed, workload.tag) == (5, 4, "beside")   # type: ignore[attr-defined]
    assert sys.path == path


def test_a_file_elsewhere_finds_the_modules_beside_it(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = list(sys.path)
    assert make_workload(f"../{own}.py:late", 1).tag == "beside"               # type: ignore[attr-defined]
    assert sys.path == path


def test_options_reach_a_users_workload(own: str) -> None:
    int_like: Any = np.int64(4)
    assert make_workload(f"{own}:Mine", int_like, steps=9).steps == 9


def test_a_users_workload_works_as_the_documented_example_does() -> None:
    workload = make_workload(f"{ROOT / 'deploy' / 'custom_workload.py'}:spirals", 0)
    assert isinstance(workload, ResumableWorkload)
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        workload.loss().backward()                                             # type: ignore[no-untyped-call]
        optimizer.step()
    first = workload.evaluate()
    assert first == workload.evaluate()
    assert first["val_accuracy"] > 0.8
    state = workload.state_dict()
    expected = workload.loss()
    workload.load_state_dict(state)
    assert torch.equal(workload.loss(), expected)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("digits", ValueError, "unknown workload 'digits'; known: .*digits_cnn, digits_mlp,.*module:function"),
        ("", ValueError, "unknown workload ''; known"),
        (":f", ValueError, "':f' is not of the form module:function"),
        ("module:", ValueError, "'module:' is not of the form module:function"),
        ("not a module:f", ValueError, "'not a module' is not a module name"),
        (".relative:f", ValueError, "'.relative' is not a module name"),
        ("there_is_none:f", ValueError, "no module named 'there_is_none', neither in .* nor on sys.path"),
        ("{}.deeper:f", ValueError, "no module named '.*deeper'"),
        ("{}:nothing", ValueError, "has no 'nothing'; it has .*Mine"),
        ("{}:Mine.nothing", ValueError, "has no 'Mine.nothing'"),
        ("{}:number", TypeError, "is a int; it must be a callable"),
        ("absent.py:f", ValueError, "workload file .*absent.py does not exist"),
        ("{}:keyword_only", TypeError, r"takes \(\*, seed\): too many positional arguments"),
        ("{}:Half", TypeError, "model is a NoneType, not a torch.nn.Module; steps is None, not .*; evaluate is not a method"),
        ("{}_broken:f", ModuleNotFoundError, "there_is_no_such_module"),        # the user's own mistake stays visible
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(own: str, spec: str, error: type[Exception], message: str) -> None:
    path = list(sys.path)
    with pytest.raises(error, match=message) as caught:
        make_workload(spec.format(own), 0)
    assert "\n" not in str(caught.value)
    assert sys.path == path


@pytest.mark.parametrize("spec", [None, 3, ["digits_mlp"]])
def test_a_spec_of_another_type_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="a workload is a name, 'module:function' or a callable"):
        make_workload(spec, 0)


@pytest.mark.parametrize(("seed", "error"), [("0", TypeError), (0.5, TypeError), (None, TypeError), (2**64, ValueError)])
def test_a_seed_is_an_integer_of_64_bits(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed"):
        make_workload("digits_mlp", seed)


def test_what_lacks_an_attribute_is_told_which() -> None:
    class Nothing:
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match=r"'mine' gave a Nothing .*no model; no steps; no loss; no evaluate; .*come as a pair"):
        check_workload(Nothing(), "mine")


def test_a_name_is_registered_once_and_has_no_colon() -> None:
    with pytest.raises(ValueError, match="'digits_mlp' is already registered by"):
        register_workload("digits_mlp")(digits.digits_cnn)
    with pytest.raises(ValueError, match="without ':'"):
        register_workload("a:b")


def test_workloads_are_called_by_name_in_files() -> None:
    assert workload_name("digits_mlp") == workload_name(digits.digits_mlp) == "digits_mlp"
    assert workload_name("m:f") == "m:f"
    assert workload_name(mnist.mnist_mlp) == "mnist_mlp"
    assert workload_name(build_by_hand) == f"{__name__}:build_by_hand"
    assert workload_name(partial(build_by_hand, steps=3)) == f"{__name__}:build_by_hand"
    assert WORKLOADS["digits_mlp"] is digits.digits_mlp
    assert isinstance(make_workload(digits.digits_mlp, 0).loss(), Tensor)
