"""What a training run needs from the outside: a model, batches with a loss, and a held-out loss.

A workload is a callable `f(seed: int) -> Workload`. The table `WORKLOADS` names the ones that come with the package;
`make_workload` also takes a user's own as `"module:function"`, `"path/to/file.py:function"` or the callable itself. Options
of the builder may follow the name, each behind a plus: `"source_lm+width=128+depth=4"`.
Everything random in a workload comes from one generator that it owns: two of one seed are bit-equal.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn


class Workload(Protocol):
    """A seeded training run without its optimizer.

    It may also offer `lr: float` (a good AdamW learning rate for it) and the pair of `ResumableWorkload`.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def steps(self) -> int:
        """Optimizer steps of a full run."""
        ...

    def loss(self) -> Tensor:
        """The training loss of the next batch: a scalar that can be differentiated."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Measures on a fixed held-out part, at least `val_loss`; changes neither the model nor the data position."""
        ...


@runtime_checkable
class ResumableWorkload(Protocol):
    """A workload whose data position can be saved: plain tensors and numbers, the model's weights not among them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


WorkloadBuilder = Callable[..., Workload]
Builder = TypeVar("Builder", bound=WorkloadBuilder)
WORKLOADS: dict[str, WorkloadBuilder] = {}
_OPTION = re.compile(r"(.+)\+([A-Za-z_]\w*)=([^+]*)")                          # the last one of a spec
# For the final evaluation alone: what a policy has never seen, so none is trained or chosen on runs of these.
HELD_OUT = ("bert_sst2", "fashion_cnn", "fashion_vit", "multi30k_translation", "sst2_classifier")


def register_workload(name: str) -> Callable[[Builder], Builder]:
    """Put a builder `f(seed, **options) -> Workload` into the table under `name`."""
    if not name or ":" in name or "+" in name:
        raise ValueError(f"workload name {name!r} must be non-empty, without ':' (module:function) and '+' (options)")

    def add(builder: Builder) -> Builder:
        if name in WORKLOADS:
            raise ValueError(f"workload {name!r} is already registered by {WORKLOADS[name]!r}")
        WORKLOADS[name] = builder
        return builder

    return add


def make_workload(spec: str | WorkloadBuilder, seed: int, **options: Any) -> Workload:
    """Build and check a workload.

    `spec` is a name in `WORKLOADS`, `"module:function"` (the current folder is searched first),
    `"path/to/file.py:function"`, each maybe with options ("source_lm+width=128"), or a callable. `options` go to the
    builder as keyword arguments and prevail over those of the name.

    Raises `ValueError` for what cannot be found and `TypeError` for what is found but is no workload.

    >>> make_workload("digits_mlp", seed=0, steps=50).steps
    50
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"a workload's seed is an integer, got {seed!r}") from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit torch.Generator; take one in [-2**63, 2**64)")
    label = workload_name(spec)
    spec, named = split_options(spec)
    options = named | options
    with _search_first(spec):
        builder = _find(spec)
        _check_arguments(label, builder, seed, options)
        workload = builder(seed, **options)
    return check_workload(workload, label)


def split_options(spec: str | WorkloadBuilder) -> tuple[str | WorkloadBuilder, dict[str, Any]]:
    """A spec without the options in its name, and these. Values are numbers, True, False, None, or else text.

    >>> split_options("source_lm+width=128+depth=4")
    ('source_lm', {'width': 128, 'depth': 4})
    """
    options: dict[str, Any] = {}
    while isinstance(spec, str) and (found := _OPTION.fullmatch(spec)):
        spec, name, value = found.groups()
        if name in options:
            raise ValueError(f"option {name!r} of a workload is given twice: {options[name]!r} and {value!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return spec, dict(reversed(options.items()))


def workload_name(spec: str | WorkloadBuilder) -> str:
    """How a workload is called in files and tables: its name, or `module:function` of a callable."""
    if isinstance(spec, str):
        return spec
    for name, builder in WORKLOADS.items():
        if builder is spec:
            return name
    if not callable(spec):
        raise TypeError(f"a workload is a name, 'module:function' or a callable f(seed), got {type(spec).__name__}")
    function = getattr(spec, "func", spec)                                     # functools.partial has no name of its own
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def check_workload(workload: Any, label: str = "workload") -> Workload:
    """Return `workload` if it has what a training run needs; `TypeError` lists everything that it lacks."""
    problems = [f"no {name}" for name in ("model", "steps", "loss", "evaluate") if not hasattr(workload, name)]
    if hasattr(workload, "model") and not isinstance(workload.model, nn.Module):
        problems.append(f"model is a {type(workload.model).__name__}, not a torch.nn.Module")
    if hasattr(workload, "steps"):
        steps = workload.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            problems.append(f"steps is {steps!r}, not a positive int")
    problems += [
        f"{name} is not a method" for name in ("loss", "evaluate") if not callable(getattr(workload, name, callable))
    ]
    if hasattr(workload, "state_dict") != hasattr(workload, "load_state_dict"):
        problems.append("state_dict and load_state_dict come as a pair, only one is there")
    if problems:
        raise TypeError(
            f"{label!r} gave a {type(workload).__name__} that is no workload: {'; '.join(problems)}. "
            "It needs model: nn.Module, steps: int, loss() -> Tensor, evaluate() -> dict with val_loss"
        )
    checked: Workload = workload
    return checked


def _find(spec: str | WorkloadBuilder) -> WorkloadBuilder:
    if not isinstance(spec, str):
        return spec
    if spec in WORKLOADS:
        return WORKLOADS[spec]
    module_name, colon, attribute = spec.rpartition(":")
    if not colon:
        known = ", ".join(sorted(WORKLOADS))
        raise ValueError(f"unknown workload {spec!r}; known: {known}; or give your own as module:function")
    if not module_name or not attribute:
        raise ValueError(f"workload {spec!r} is not of the form module:function")
    module = _load_file(module_name) if module_name.endswith(".py") else _import(module_name, spec)
    builder: Any = module
    for part in attribute.split("."):
        if not hasattr(builder, part):
            offered = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
            raise ValueError(f"workload {spec!r}: {module_name} has no {attribute!r}; it has {', '.join(offered) or 'none'}")
        builder = getattr(builder, part)
    if not callable(builder):
        raise TypeError(f"workload {spec!r} is a {type(builder).__name__}; it must be a callable f(seed) -> Workload")
    found: WorkloadBuilder = builder
    return found


def _import(name: str, spec: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"workload {spec!r}: {name!r} is not a module name; a file is given as path/to/file.py:function")
    importlib.invalidate_caches()                                              # the file may be younger than the finder's listing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the named module (or a parent of it) is the caller's mistake; an import missing inside it must stay visible.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ValueError(
            f"workload {spec!r}: no module named {error.name!r}, neither in {os.getcwd()} nor on sys.path; "
            "a file can be given as path/to/file.py:function"
        ) from None


def _load_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"workload file {path} does not exist")
    # A name of its own for each path: a plain stem could shadow an installed module.
    module_name = f"mango_workload_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"workload file {path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module                                          # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


@contextmanager
def _search_first(spec: str | WorkloadBuilder) -> Iterator[None]:
    """The current folder, and before it that of a file named by `spec`, head `sys.path` for the time of the block only."""
    folders = [os.getcwd()]
    if isinstance(spec, str) and spec.rpartition(":")[0].endswith(".py"):
        folders.insert(0, str(Path(spec.rpartition(":")[0]).expanduser().resolve().parent))
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            if folder in sys.path:                                             # the block may have rearranged the path itself
                sys.path.remove(folder)


def _check_arguments(label: str, builder: WorkloadBuilder, seed: int, options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):                                            # some C callables have none
        return
    try:
        signature.bind(seed, **options)
    except TypeError as error:
        raise TypeError(f"workload {label!r} takes {signature}: {error}") from None
