"""Promises of the `mango` command: quick to start, one line per error, exit codes that can be trusted, nothing lost on Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from train_policy.cli import app
from train_policy.cli_support import emit, parse_list, plain, write_json

ROOT = Path(__file__).resolve().parent.parent
MANGO = [sys.executable, "-m", "train_policy.cli"]
COLLECT = "collect --workload digits_mlp --policy random --policy water-filling --seeds 2 --steps 30 --budgets 0.25".split()


def mango(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([*MANGO, *words], cwd=cwd or ROOT, capture_output=True, text=True, check=False, env=environment())


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def inside(*words: str) -> Any:
    """The command in this process: faster, where start-up is not what is tested."""
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, collected by the command."""
    root = tmp_path_factory.mktemp("cli") / "data"
    done = inside(*COLLECT, "--root", str(root), "--json", str(root.parent / "collected.json"))
    assert done.exit_code == 0, done.output
    assert json.loads((root.parent / "collected.json").read_text())["recorded"] == 4
    return root


def test_help_is_there_within_a_second_and_a_half() -> None:
    seconds = []
    for _ in range(3):                                   # the machine may be busy: the best of three
        began = time.perf_counter()
        shown = mango("--help")
        seconds.append(time.perf_counter() - began)
        assert shown.returncode == 0 and "evaluate" in shown.stdout
    assert min(seconds) < 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "--policy", "nobody", "--workload", "digits_mlp"), "unknown policy 'nobody'"),
        (("evaluate", "--policy", "random", "--workload", "nothing"), "unknown workload 'nothing'; known: "),
        (("evaluate", "--policy", "fixed:m3v3", "--workload", "digits_mlp"), "unknown rung 'm3v3'"),
        (("evaluate", "--policy", "random", "--workload", "digits_mlp", "--budgets", "0.0001"), "the least feasible is"),
        (("evaluate", "--policy", "random", "--workload", "digits_mlp", "--rule", "sgdd"), "unknown rule 'sgdd'; known: adamw"),
        (("evaluate", "--policy", "random", "--workload", "digits_mlp", "--budgets", ","), "--budgets: the list is empty"),
        (("data", "info", "no-such-folder"), "no-such-folder"),
        (("inspect", "nobody"), "unknown policy 'nobody'"),
        (("report", "no-such-file.json"), "no-such-file.json"),
        (("run", "both"), "unknown mode 'both'; known: single, comparative, ablation"),
        (("run", "single", "--optimizer", "adamm"), "unknown optimizer 'adamm'; known: adam"),
        (("train", "offline", "--data", "x", "--out", "y", "--algo", "dqn"), "unknown algorithm 'dqn'; known: iql"),
        (("freeze", "--from", "nothing.safetensors", "--out", "x"), "nothing.safetensors"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(words: tuple[str, ...], message: str) -> None:
    failed = inside(*words)
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith("mango: error: ") and failed.stderr.count("\n") == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.output


def test_a_real_process_fails_in_one_line_and_shows_the_traceback_with_debug(tmp_path: Path) -> None:
    failed = mango("inspect", "nobody", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and failed.stdout == ""
    shown = mango("inspect", "nobody", "--debug", cwd=tmp_path)
    assert shown.returncode != 0 and "Traceback" in shown.stderr and "unknown policy 'nobody'" in shown.stderr


def test_a_damaged_policy_is_refused_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10" * 64)
    failed = inside("inspect", str(broken))
    assert failed.exit_code == 2 and "corrupt" in failed.stderr and failed.stderr.count("\n") == 1


def test_a_pickle_is_refused_without_trust(tmp_path: Path) -> None:
    planted = tmp_path / "evil.zip"
    planted.write_bytes(b"PK\x03\x04rest")
    failed = inside("freeze", "--from", str(planted), "--out", str(tmp_path / "out.safetensors"))
    assert failed.exit_code == 2 and "trust" in failed.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_evaluate_writes_the_promised_rows_and_a_report_can_be_made_of_them(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = "evaluate --policy fixed:m4v0 --policy adamw --workload digits_mlp --budgets 0.125,0.25 --seeds 2 --seed 7 --steps 20"
    done = inside(*words.split(), "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    promised = {"policy", "workload", "seed", "budget_bytes", "state_bytes_peak", "val_loss", "val_loss_adamw", "step_time_ratio",
                "decisions"}  # fmt: skip
    assert all(promised <= set(row) for row in rows)
    assert len(rows) == 4 + 2 and {row["seed"] for row in rows} == {7, 8}
    assert all(row["state_bytes_peak"] <= row["budget_bytes"] for row in rows)
    made = inside("report", str(out), "--json", "-")
    assert made.exit_code == 0 and Path(json.loads(made.stdout)["page"]).is_file()


def test_a_workload_of_the_user_is_evaluated_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Mine:\n"
        "    steps = 12\n"
        "    def __init__(self, seed):\n"
        "        self.g = torch.Generator().manual_seed(seed)\n"
        "        self.model = torch.nn.Linear(64, 32)\n"
        "    def loss(self):\n"
        "        x = torch.randn(8, 64, generator=self.g)\n"
        "        return (self.model(x) - x[:, :32]).square().mean()\n"
        "    def evaluate(self):\n"
        "        return {'val_loss': (self.model.weight - torch.eye(32, 64)).square().mean().item()}\n"
    )
    monkeypatch.chdir(tmp_path)
    done = inside("evaluate", "--policy", "water-filling", "--workload", "mine:Mine", "--seeds", "1", "--json", "-")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["workload"] == "mine:Mine" and row["horizon"] == 12 and row["within_budget"]


def test_exit_code_1_says_that_a_run_failed_while_the_others_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed = inside("run", "comparative", "--policy", "nobody", "--steps", "5", "--json", "rows.json")
    assert failed.exit_code == 1
    assert "mango_learned, seed 0: failed: unknown policy 'nobody'" in failed.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert len(content["rows"]) == 4 and len(content["failures"]) == 1
    assert (tmp_path / "runs" / "study" / "study.csv").is_file()


def test_the_data_commands_look_check_cache_split_merge_and_pack(store: Path, tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        done = inside("data", *words, "--json", "-")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    found = run("info", str(store))
    assert found["runs"] == 4 and found["episodes"] == 12
    assert run("validate", str(store))["ok"] is True
    assert run("cache", str(store))["transitions"] == found["transitions"]
    parts = run("split", str(store), "--out", str(tmp_path / "parts"), "--parts", "a=0.5,b=0.5", "--seed", "1")
    assert run("merge", *parts.values(), "--out", str(tmp_path / "merged")) == {"path": str(tmp_path / "merged")}
    assert run("info", str(tmp_path / "merged"))["digest"] == found["digest"]
    assert run("compact", str(store), "--out", str(tmp_path / "one.h5"))["bytes"] > 0
    assert run("info", str(tmp_path / "one.h5"))["digest"] == found["digest"]
    assert run("flatten", str(store), "--out", str(tmp_path / "flat.h5"), "--bits", "7")["bits"] == 7
    assert run("cache", str(tmp_path / "flat.h5"))["transitions"] == found["transitions"]
    assert run("salvage", str(store))["episodes"] == 0


def test_a_damaged_store_is_found_and_fails_the_command(store: Path, tmp_path: Path) -> None:
    import shutil

    import h5py

    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    shard = next((copy / "data" / "shards").glob("*.h5"))
    with h5py.File(shard, "r+") as file:
        episode = next(name for name in file if name.startswith("episode"))
        file[episode]["rewards"][0] += 1.0
    failed = inside("data", "validate", str(copy))
    assert failed.exit_code == 1 and "problems" in failed.stdout


def test_collecting_again_records_only_what_is_missing(store: Path) -> None:
    again = inside(*COLLECT, "--root", str(store), "--json", "-")
    assert again.exit_code == 0, again.output
    assert (json.loads(again.stdout)["recorded"], json.loads(again.stdout)["skipped"]) == (0, 4)


def test_the_stages_train_through_the_command_and_end_in_a_frozen_policy(store: Path, tmp_path: Path) -> None:
    cloned, better, frozen = (tmp_path / f"{name}.safetensors" for name in ("bc", "iql", "mine"))
    data = ("--data", str(store))
    for words in (
        ("train", "bc", *data, "--out", str(cloned), "--epochs", "2", "--top", "1.0"),
        ("train", "offline", *data, "--init", str(cloned), "--out", str(better), "--updates", "5", "--set", "batch_size=32"),
        ("freeze", "--from", str(better), "--out", str(frozen), *data, "--description", "a test"),
    ):
        done = inside(*words)
        assert done.exit_code == 0, done.output
    card = load_policy(frozen).card
    assert card["description"] == "a test" and card["licence"] == "MIT" and card["checkpoint"]["stage"] == "offline:iql"
    assert card["training_data_digest"] == json.loads(inside("data", "info", str(store), "--json", "-").stdout)["digest"]
    assert "commit" in card["made"]
    done = inside("evaluate", "--policy", str(frozen), "--workload", "digits_mlp", "--seeds", "1", "--steps", "20", "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["policy"] == "mine"


def test_inspect_shows_a_policy_and_what_it_does(tmp_path: Path) -> None:
    path = freeze(PolicyNetwork(seed=3), tmp_path / "fresh.safetensors", card={"licence": "MIT"})
    words = ["inspect", str(path), *"--workload digits_mlp --steps 40 --depth 2 --json".split(), str(tmp_path / "told.json")]
    done = inside(*words)
    assert done.exit_code == 0, done.output
    for text in ("fresh", "licence", "Decisions on digits_mlp", "What it listens to", "Decisions by third", "Decisions by phase",
                 "The policy as a decision tree", "applied under the budget"):  # fmt: skip
        assert text in done.stdout
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["tree"]["depth"] == 2 and told["tree"]["rules"][0] in done.stdout


def test_an_unknown_hyper_parameter_is_named(store: Path, tmp_path: Path) -> None:
    failed = inside("train", "bc", "--data", str(store), "--out", str(tmp_path / "x.safetensors"), "--set", "epoch=3")
    assert failed.exit_code == 2 and "epoch" in failed.stderr and "known: " in failed.stderr


def test_ctrl_c_during_training_keeps_the_last_checkpoint_and_exits_with_130(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "bc.safetensors"
    words = ["train", "bc", "--data", str(store), "--out", str(out), "--top", "1", "--epochs", "100000"]
    words += ["--set", "patience=100000"]
    process = subprocess.Popen([*MANGO, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and str(out) in errors and "Traceback" not in errors
    assert load_policy(out).card["stage"] == "bc"


def test_main_py_is_the_door_to_the_studies(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "main.py"), *"--mode single --optimizer adam --epochs 1 --batch-size 128".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "runs" / "study" / "study.json").read_text())
    assert content["rows"][0]["steps"] == 1438 // 128 and content["args"]["batch_size"] == 128


def test_json_is_written_aside_and_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": float("nan"), "y": (1, Path("p"))})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": None, "y": [1, "p"]}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]
    assert plain({1: [float("inf")]}) == {"1": [None]}


def test_json_on_stdout_takes_the_place_of_tables(capsys: pytest.CaptureFixture[str]) -> None:
    emit("-", [1, 2], lambda: pytest.fail("no tables beside JSON on stdout"))
    assert json.loads(capsys.readouterr().out) == [1, 2]


def test_lists_of_options_are_parsed_or_refused() -> None:
    assert parse_list(" 1, 2 ,", int, "numbers") == [1, 2]
    with pytest.raises(ValueError, match="numbers: 'a' is not a comma-separated list"):
        parse_list("a", int, "numbers")


@pytest.mark.slow
def test_the_demo_goes_all_the_way_and_ends_with_the_rows_of_the_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    done = inside("demo", "--quick", "--workers", "1", "--out", str(tmp_path / "demo"), "--json", str(out))
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert list(result)[-1] == "rows" and result["failures"] == []
    policies = {row["policy"] for row in result["rows"]}
    assert {"adamw", "demo", "water-filling", "random", "fixed:full", "fixed:m4v0"} <= policies
    assert all(row["state_bytes_peak"] <= row["budget_bytes"] for row in result["rows"] if row["fits"])
    assert [gate["policy"] for gate in result["gates"]] == ["bc", "iql", "d3rlpy-discrete-cql", "ppo"]
    stages = " ".join(stage["stage"] for stage in result["stages"])
    for word in ("collect", "validate", "cloning", "IQL", "d3rlpy", "gate", "PPO", "freeze", "evaluate"):
        assert word in stages
    policy = load_policy(result["policy"])
    assert policy.card["evaluation"] and policy.card["training_data_digest"] and policy.card["verdicts"]
    assert policy.card["verdicts"] == [line for line in result["verdicts"] if line.startswith("demo ")]
    assert any(line.startswith("universal ") for line in result["verdicts"])
    assert json.loads(Path(result["policy"]).with_suffix(".json").read_text())["card"]["licence"] == "MIT"
    assert (tmp_path / "demo" / "report.html").is_file() and (tmp_path / "demo" / "report.csv").is_file()
