"""Promises of a study's configuration in YAML (row J1): it runs as it is, options are above it, mistakes are one line."""

import json
from pathlib import Path

import pytest
import yaml

from tests.study_command import mango_run
from train_policy.cli_run import Surroundings, configured
from train_policy.run_study import MODES, Args
from train_policy.study_methods import methods


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_j1_the_shipped_configuration_holds_every_default() -> None:
    for mode in MODES:
        assert configured(mode, "study", {}) == configured(mode, None, {}) == (Args(mode), Surroundings())
    printed = yaml.safe_load(mango_run("ablation", "--print-config").stdout)
    assert printed == yaml.safe_load(mango_run("ablation", "--config", "study", "--print-config").stdout)


@pytest.mark.parametrize("optimizer", list(methods()))
def test_j1_the_shipped_configuration_runs_each_optimizer_one_step(optimizer: str) -> None:
    mango_run("single", "--config", "study", "--optimizer", optimizer, "--steps", "1")
    content = json.loads(Path("runs/study/study.json").read_text())
    assert [(row["policy"], row["steps"]) for row in content["rows"]] == [(optimizer, 1)] and not content["failures"]


def test_j1_what_is_printed_is_read_back_and_options_are_above_it() -> None:
    words = ("--optimizer", "mango_adaptive", "--budget", "40000", "--epochs", "1", "--output-dir", "out", "--seed", "3")
    Path("mine.yml").write_text(mango_run("single", *words, "--print-config").stdout)
    assert not Path("out").exists()
    args, around = configured("single", "mine.yml", {})
    assert args == Args("single", "mango_adaptive", budget=40_000, epochs=1.0, seed=3)
    assert around == Surroundings(output_dir="out")
    assert type(args.budget) is int                      # bytes; 40000.0 would be a fraction
    mango_run("single", "--config", "mine.yml", "--steps", "2", "--seed", "4")
    content = json.loads(Path("out/study.json").read_text())
    assert content["args"]["epochs"] is None and content["rows"][0]["steps"] == 2
    assert content["rows"][0]["seed"] == 4 and content["rows"][0]["budget_bytes"] == 40_000


def test_a_partial_file_leaves_the_rest_at_its_defaults() -> None:
    Path("mine.yml").write_text("single:\n  budget: '0.5'\n  learning_rate: 1e-4\n")
    assert configured("single", "mine.yml", {}) == (Args("single", budget=0.5, learning_rate=1e-4), Surroundings())


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("single:\n  optimiser: adam\n", (), "unknown settings ['optimiser'] of single; known: optimizer, workload"),
        ("single:\n  steps: many\n", (), "steps='many' is not of type int"),
        ("single:\n  steps: 5\n  epochs: 1\n", (), "give steps or epochs, not both"),
        ("single:\n  optimizer: nobody\n", (), "unknown optimizer 'nobody'; known: adam, adamw"),
        ("single:\n  optimizer: mango_learned\n  policy: nobody\n", (), "unknown policy 'nobody'"),
        ("single:\n  workload: nothing\n", (), "nothing"),
        ("single:\n  rule: newton\n", (), "unknown rule 'newton'"),
        ("single:\n  device: tpu\n", (), "unknown device 'tpu'"),
        ("single:\n  log_level: loud\n", (), "unknown log level 'loud'"),
        ("single:\n  data_dir: missing\n", (), "--data-dir missing is no folder"),
        ("single:\n  steps: 5\n", ("--steps", "0"), "steps=0 must be positive"),
        ("ablation:\n  steps: 5\n", (), "has no recipe 'single'; it has: ablation"),
        ("single: [\n", (), "is not valid YAML"),
    ],
)
def test_a_configuration_that_cannot_run_is_one_line_and_exit_code_2(text: str, words: tuple[str, ...], message: str) -> None:
    Path("mine.yml").write_text(text)
    failed = mango_run("single", "--config", "mine.yml", "--validate-config", *words, code=2)
    assert message in failed.stderr and failed.stderr.startswith("mango: error: ") and failed.stderr.count("\n") == 1
    assert not Path("runs").exists()


def test_a_valid_configuration_is_said_to_be_and_nothing_is_run() -> None:
    done = mango_run("comparative", "--config", "study", "--validate-config")
    assert done.stderr == "the configuration of comparative is valid\n" and not done.stdout and not Path("runs").exists()
    assert "no recipe file 'absent.yml'" in mango_run("single", "--config", "absent.yml", code=2).stderr
