"""Recipes: the hyper-parameters of a stage as YAML, checked against the dataclass that the stage takes.

`configs/ppo.yml` follows rl-zoo3's schema (keyed by environment id), so the zoo trains `Mango/TrainingRun-v0` unmodified;
`configs/bc.yml` and `configs/offline.yml` are keyed by network kind and by algorithm, `configs/study.yml` by the mode of a study.
"""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
CONFIGS = Path(__file__).parent / "configs"


def load_recipe(source: str | Path, key: str) -> dict[str, Any]:
    """The mapping under `key` of a shipped recipe file ('bc', 'offline', 'ppo') or of a YAML file of the user's."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError('recipes are YAML: pip install "mango-optim[train]"') from error
    path = CONFIGS / f"{source}.yml" if (CONFIGS / f"{source}.yml").is_file() else Path(source)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yml")))
        raise ValueError(f"no recipe file {str(source)!r}; give the path of a YAML file or one of: {shipped}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        known = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
        raise ValueError(f"{path} has no recipe {key!r}; it has: {known}")
    return dict(content[key])


def from_recipe(cls: type[T], recipe: Mapping[str, Any], **overrides: Any) -> T:
    """Build the dataclass `cls` from a recipe; overrides win, None among them means "not given".

    Numbers that YAML 1.1 reads as text ("1e-4") are converted; unknown names and wrong types are a ValueError.
    """
    if not is_dataclass(cls):
        raise TypeError(f"a recipe fills a dataclass; got {cls!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    values = {**recipe, **{name: value for name, value in overrides.items() if value is not None}}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown hyper-parameters {unknown} for {cls.__name__}; known: {', '.join(known)}")
    return cls(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type: scalars only, anything else passes unchanged."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if type(value) in (int, float) and type(value) in options:  # of both the one that was written: 1 is not 1.0
        return value
    for kind in (bool, int, float, str):
        if kind not in options:
            continue
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool) and isinstance(value, int | float | str) and _is_whole(value):
            return int(float(value))
        if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str) and _is_number(value):
            return float(value)
        if kind is str and isinstance(value, str):
            return value
    if any(option in (bool, int, float, str) for option in options):
        allowed = " or ".join(getattr(option, "__name__", str(option)) for option in options)
        raise ValueError(f"{name}={value!r} is not of type {allowed}")
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: float | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_whole(value: float | str) -> bool:
    return _is_number(value) and float(value).is_integer()
