"""Recipes fill the dataclasses of their stages, and mistakes in them are named."""

from pathlib import Path

import pytest

from mango.trunks import TRUNKS
from mango_env import ENV_ID
from train_policy.bc import BcArgs
from train_policy.offline import ALGOS, OfflineArgs
from train_policy.ppo import PpoArgs
from train_policy.recipes import from_recipe, load_recipe


def test_every_shipped_recipe_fills_its_arguments() -> None:
    assert from_recipe(PpoArgs, load_recipe("ppo", "LayerVecEnv")) == PpoArgs()
    assert from_recipe(BcArgs, load_recipe("bc", "mlp")) == BcArgs()
    assert {from_recipe(BcArgs, load_recipe("bc", name), seed=3).seed for name in TRUNKS} == {3}
    assert {from_recipe(OfflineArgs, load_recipe("offline", algo)).algo for algo in ALGOS} == set(ALGOS)


def test_the_zoo_recipe_is_keyed_by_the_environments_id() -> None:
    recipe = load_recipe("ppo", ENV_ID)
    assert recipe["policy"] == "MultiInputPolicy" and recipe["normalize"] is False


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("a:\n  learning_rate: 1e-4\n  n_epochs: 2\n  target_kl: null\n")
    args = from_recipe(PpoArgs, load_recipe(tmp_path / "mine.yml", "a"), n_epochs=None, seed=1)
    assert (args.learning_rate, args.n_epochs, args.target_kl, args.seed) == (1e-4, 2, None, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  lerning_rate: 1\n", "unknown hyper-parameters"),
        ("a:\n  n_epochs: 1.5\n", "n_epochs=1.5 is not of type int"),
        ("a:\n  gamma: high\n", "gamma='high'"),
        ("b: 1\n", "has no recipe 'a'; it has: b"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_recipe(PpoArgs, load_recipe(tmp_path / "mine.yml", "a"))


def test_a_recipe_file_that_is_not_there_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="bc, offline, ppo"):
        load_recipe("nothing", "a")
