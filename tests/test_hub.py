"""Promises of policies on the Hub: what is pushed comes back and decides alike, safetensors alone come down."""

import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from mango import MANGO, hub, load_policy
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import PolicyNetwork
from mango.policy_file import freeze
from tests.hub_stand_in import TOKEN, StandIn
from train_policy import publishing
from train_policy.cli import app

huggingface_hub = pytest.importorskip("huggingface_hub", reason='no huggingface_hub: pip install "mango-optim[hub]"')

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")           # huggingface_hub's own git-lfs

ROOT = Path(__file__).resolve().parent.parent
ROW = {"policy": "mine", "workload": "digits_mlp", "budget": 0.25, "seeds": 3, "failed": 0, "val_loss": 0.0871, "gap": -0.7}
CARD: dict[str, Any] = {
    "description": "a test | with a <b>border</b>",
    "licence": "MIT",
    "evaluation": [{**ROW, "gap_low": -1.5, "gap_high": 0.8, "within_budget": True}],
    "verdicts": ["digits_mlp at 0.25: no difference is proven"],
    "checkpoint": {"stage": "offline:iql", "training_data_digest": "0739abcfb8cb", "made": {"commit": "dffb5504618a"}},
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A Hub that this process uses, with an empty cache and a token; the library read its environment when it was imported."""
    constants = hub.hub_library().constants
    with StandIn() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)    # the stand-in speaks git-lfs
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def environment(running: StandIn, home: Path, **more: str) -> dict[str, str]:
    """Of a process of its own, as a user has it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": running.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def mango(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train_policy.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def observations(seed: int = 0) -> Tensor:
    low, high = (torch.tensor([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    return low + (high - low) * torch.rand((5, FEATURE_DIM), generator=torch.Generator().manual_seed(seed))


def frozen(path: Path, seed: int = 1, **card: Any) -> Path:
    network = PolicyNetwork("mlp", seed=seed, hidden=[16])
    network.fit_normaliser(observations(seed))
    with torch.no_grad():
        network.rung_head.weight.mul_(100)
    return freeze(network, path, card={**CARD, **card})


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def same_decisions(one: Any, other: Any) -> bool:
    return all(torch.equal(one.scores(observations(i)), other.scores(observations(i))) for i in range(3))


def test_what_is_pushed_comes_back_and_decides_alike(stand_in: StandIn, tmp_path: Path) -> None:
    path = frozen(tmp_path / "mine.safetensors")
    page, commit = publishing.push(path, "ada/policies")
    assert page == f"{stand_in.url}/ada/policies" and commit == stand_in.repositories["ada/policies"].refs["main"]
    files = stand_in.repositories["ada/policies"].at("main")
    assert files is not None and sorted(files) == ["README.md", "mine.json", "mine.safetensors"]
    assert files["mine.safetensors"] == path.read_bytes() and files["mine.json"] == path.with_suffix(".json").read_bytes()
    stand_in.repositories["ada/policies"].refs["v1"] = commit
    stand_in.requests.clear()
    for spec in ("", "/mine", "/mine.safetensors", "@main", "@v1/mine", f"@{commit}", f"@{commit}/mine"):
        policy = load_policy(f"hf://ada/policies{spec}")
        assert same_decisions(policy, load_policy(path)) and policy.metadata == load_policy(path).metadata
    assert same_decisions(load_policy(Path("hf://ada/policies/mine")), load_policy(path))
    fetched = {request for request in stand_in.requests if "/resolve/" in request and request.startswith("GET")}
    assert fetched and all(request.endswith(".safetensors") for request in fetched)


def test_the_optimizer_takes_a_policy_from_the_hub(stand_in: StandIn, tmp_path: Path) -> None:
    path = frozen(tmp_path / "policy.safetensors")
    stand_in.add("ada/one", {"policy.safetensors": path.read_bytes()})
    decided = []
    for policy in ("hf://ada/one", path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        optimizer = MANGO(model.named_parameters(), policy=policy, memory_budget=0.5, policy_update_freq=2)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(4, 32)).square().mean().backward()
            optimizer.step()
        configs = [layer["config"] for layer in optimizer.memory_report()["layers"]]
        decided.append((configs, [p.detach() for p in model.parameters()]))
    assert decided[0][0] == decided[1][0]
    assert all(torch.equal(a, b) for a, b in zip(decided[0][1], decided[1][1], strict=True))


def test_the_default_file_is_policy_or_the_only_one(stand_in: StandIn, tmp_path: Path) -> None:
    a, b = (frozen(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab"))
    assert not same_decisions(load_policy(a), load_policy(b))
    stand_in.add("ada/two", {"a.safetensors": a.read_bytes(), "deep/b.safetensors": b.read_bytes()})
    with pytest.raises(ValueError, match=r"several policies.* hf://ada/two/a, hf://ada/two/deep/b$") as error:
        load_policy("hf://ada/two")
    one_line(error)
    with pytest.raises(ValueError, match=r"hf://ada/two/c is not in the repository; there are: hf://ada/two/a, "):
        load_policy("hf://ada/two/c")
    assert same_decisions(load_policy("hf://ada/two/deep/b"), load_policy(b))
    stand_in.add("ada/two", {"policy.safetensors": b.read_bytes()})
    assert same_decisions(load_policy("hf://ada/two"), load_policy(b))


def test_a_pickle_is_refused_by_name_and_never_fetched(stand_in: StandIn, tmp_path: Path) -> None:
    planted = pickle.dumps(Planted(tmp_path / "ran"))
    stand_in.add("eve/pickle", {"policy.pt": planted, "model.pkl": planted, "README.md": b"hello"})
    for spec, match in (("", r"no safetensors file but model\.pkl, policy\.pt"), ("/model.pkl", r"model\.pkl is no safetensors")):
        with pytest.raises(ValueError, match=match) as error:
            load_policy(f"hf://eve/pickle{spec}")
        one_line(error)
    assert not [request for request in stand_in.requests if request.startswith("GET /eve/pickle/resolve")]
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(1)}, buffer)
    for disguised in (planted, buffer.getvalue()):
        stand_in.add("eve/disguised", {"policy.safetensors": disguised})
        with pytest.raises(ValueError, match="runs code when loaded"):
            load_policy("hf://eve/disguised")
    stand_in.add("eve/nothing", {"README.md": b"hello"})
    with pytest.raises(ValueError, match=r"hf://eve/nothing holds no policy"):
        load_policy("hf://eve/nothing")
    assert not (tmp_path / "ran").exists()


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_the_hub_does_not_have_is_one_line(stand_in: StandIn, tmp_path: Path) -> None:
    data = frozen(tmp_path / "policy.safetensors").read_bytes()
    stand_in.add("ada/one", {"policy.safetensors": data})
    stand_in.add("ada/secret", {"policy.safetensors": data}, private=True)
    for spec, match in (
        ("ada/none", r"hf://ada/none: http.* has no such repository, or the token \(HF_TOKEN"),
        ("ada/one@v7", r"hf://ada/one@v7: .* no such revision"),
        ("ada/one@v7/policy", r"hf://ada/one@v7/policy: .* no such revision"),
        ("ada/one/other", r"hf://ada/one/other is not in the repository; there are: hf://ada/one/policy"),
        ("ada", "write hf://owner/name, hf://owner/name@revision or hf://owner/name/file"),
        ("ada/one/../../x", "names no policy on the Hub"),
        ("ada/one@", "names no policy on the Hub"),
        ("ada/a--b", r"hf://ada/a--b: .*"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            load_policy(f"hf://{spec}")
        one_line(error)
    assert load_policy("hf://ada/secret")


def test_without_the_token_a_private_repository_is_none(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.add("ada/secret", {"policy.safetensors": frozen(tmp_path / "policy").read_bytes()}, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no such repository, or the token"):
        load_policy("hf://ada/secret")


def test_a_corrupt_file_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    data = frozen(tmp_path / "policy.safetensors").read_bytes()
    flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
    for broken, match in ((flipped, "weights do not match their checksum"), (data[:-8], "corrupt"), (b"", "corrupt")):
        stand_in.add("ada/broken", {"policy.safetensors": broken})
        with pytest.raises(ValueError, match=match) as error:
            load_policy("hf://ada/broken")
        assert "models--ada--broken" in one_line(error)
    stand_in.add("ada/broken", {"policy.safetensors": data})                # mended upstream: fetched anew
    assert load_policy("hf://ada/broken")


@pytest.mark.parametrize("file", ["policy", "mine"])
def test_a_second_load_needs_no_network(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    path = frozen(tmp_path / f"{file}.safetensors")
    commit = stand_in.add("ada/one", {f"{file}.safetensors": path.read_bytes()})
    assert load_policy("hf://ada/one")
    stand_in.close()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        for spec in ("hf://ada/one", f"hf://ada/one/{file}", f"hf://ada/one@{commit}/{file}"):
            assert same_decisions(load_policy(spec), load_policy(path))
    with pytest.raises(ValueError, match=r"hf://ada/other: .* not in the cache") as error:
        load_policy("hf://ada/other")
    one_line(error)


def test_without_a_network_another_policy_than_the_default_is_never_taken(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = frozen(tmp_path / "a.safetensors").read_bytes()
    stand_in.add("ada/two", {"a.safetensors": data, "policy.safetensors": data})
    assert load_policy("hf://ada/two/a")
    stand_in.close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not in the cache"):
        load_policy("hf://ada/two")


def test_the_default_is_looked_for_again_wherever_the_hub_answers(stand_in: StandIn, tmp_path: Path) -> None:
    first, second = (frozen(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("mine", "policy")))
    stand_in.add("ada/grows", {"mine.safetensors": first.read_bytes()})
    assert same_decisions(load_policy("hf://ada/grows"), load_policy(first))
    stand_in.add("ada/grows", {"policy.safetensors": second.read_bytes()})
    assert same_decisions(load_policy("hf://ada/grows"), load_policy(second))


def test_without_the_library_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'pip install "mango-optim\[hub\]"$') as error:
        load_policy("hf://ada/one")
    one_line(error)
    path = frozen(tmp_path / "a.safetensors")
    failed = CliRunner().invoke(app, ["freeze", "--from", str(path), "--out", str(tmp_path / "b"), "--push", "ada/one"])
    assert failed.exit_code == 2 and 'pip install "mango-optim[hub]"' in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "b.safetensors").exists()
    assert load_policy(path)


def front_matter(readme: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(readme.split("---\n")[1])
    return found


def test_the_readme_says_what_the_card_says(tmp_path: Path) -> None:
    path = frozen(tmp_path / "mine.safetensors")
    summary = json.loads(path.with_suffix(".json").read_text())
    readme = publishing.model_card("ada/policies", [summary])
    front = front_matter(readme)
    assert front["license"] == "mit" and front["library_name"] == "mango-optim" and "mango-optim" in front["tags"]
    assert "| digits_mlp | 0.25 | mine | 3 | 0 | 0.0871 | -0.7 | -1.5 | 0.8 | yes |" in readme
    for said in ("0739abcfb8cb", "dffb5504618a", "offline:iql"):
        assert said in readme
    for said in (summary["file_sha256"], "### Limits", "no difference is proven", 'policy="hf://ada/policies"', "hard to beat"):
        assert said in readme
    assert r"a test \| with a \<b\>border" in readme                       # free text stays text
    bare = publishing.model_card("ada/policies", [{**summary, "card": {}}])
    assert "nothing is known about how good it is" in bare and "not recorded" in bare
    assert front_matter(bare)["license"] == "unknown"
    odd = publishing.model_card("ada/p", [{**summary, "card": {"licence": "My: own\n# licence", "made": 3, "evaluation": "x"}}])
    assert front_matter(odd) == {**front, "license": "other", "license_name": "my-own-licence"}


def test_a_repository_of_several_policies_has_one_readme_for_all(stand_in: StandIn, tmp_path: Path) -> None:
    publishing.push(frozen(tmp_path / "first.safetensors", 1), "ada/policies")
    publishing.push(frozen(tmp_path / "second.safetensors", 2, licence="Apache-2.0"), "ada/policies")
    publishing.push(frozen(tmp_path / "second.safetensors", 3, licence="MIT"), "ada/policies")
    files = stand_in.repositories["ada/policies"].at("main")
    assert files is not None and len(files) == 5
    readme = files["README.md"].decode()
    assert readme.count("\n## ") == 2 and readme.index("## second") < readme.index("## first")
    assert "hf://ada/policies/first" in readme and "hf://ada/policies/second" in readme
    assert same_decisions(load_policy("hf://ada/policies/second"), load_policy(tmp_path / "second.safetensors"))
    stand_in.add("ada/policies", {"odd.safetensors": b"", "odd.json": b"{"})
    stand_in.add("ada/policies", {"other.safetensors": b"", "other.json": b'{"card": {}, "architecture": 3}'})
    publishing.push(frozen(tmp_path / "first.safetensors", 4), "ada/policies")


def test_private_is_private_or_nothing_is_uploaded(stand_in: StandIn, tmp_path: Path) -> None:
    path = frozen(tmp_path / "mine.safetensors")
    publishing.push(path, "ada/secret", private=True)
    assert stand_in.repositories["ada/secret"].private
    publishing.push(path, "ada/open")
    assert not stand_in.repositories["ada/open"].private
    before = dict(stand_in.repositories["ada/open"].commits)
    with pytest.raises(ValueError, match="exists and is public"):
        publishing.push(frozen(tmp_path / "mine.safetensors", 5), "ada/open", private=True)
    assert stand_in.repositories["ada/open"].commits == before


def test_what_cannot_be_pushed_is_told_in_one_line(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = frozen(tmp_path / "mine.safetensors")
    for name, match in (("ada", "names no policy"), ("ada/x@v1", "takes owner/name"), ("ada/x/y", "takes owner/name")):
        with pytest.raises(ValueError, match=match):
            publishing.push(path, name)
    with pytest.raises(ValueError, match="'hf://ada/x/a b' names no policy"):
        publishing.push(frozen(tmp_path / "a b.safetensors"), "ada/x")
    with pytest.raises(ValueError, match=r"pushing mine\.safetensors to somebody-else/x: ") as error:
        publishing.push(path, "somebody-else/x")
    one_line(error)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"pushing mine\.safetensors to ada/x: ") as error:
        publishing.push(path, "ada/x")
    assert "hf_wrong" not in one_line(error)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"no token to push to ada/x: set HF_TOKEN"):
        publishing.push(path, "ada/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stand_in.close()
    with pytest.raises(ValueError, match=r"pushing mine\.safetensors to ada/x: ") as error:
        publishing.push(path, "ada/x")
    one_line(error)
    assert stand_in.repositories == {}


def test_the_command_pushes_where_the_environment_says(tmp_path: Path) -> None:
    source, out = frozen(tmp_path / "checkpoint.safetensors"), tmp_path / "mine.safetensors"
    with StandIn() as running:
        words = ["freeze", "--from", str(source), "--out", str(out), "--description", "a test", "--push", "ada/policies"]
        owner = environment(running, tmp_path / "owner", HF_TOKEN=TOKEN)
        pushed = mango(*words, "--json", str(tmp_path / "pushed.json"), env=owner)
        assert pushed.returncode == 0, pushed.stderr
        result = json.loads((tmp_path / "pushed.json").read_text())
        assert result["page"] == f"{running.url}/ada/policies" and f"hf://ada/policies@{result['commit']}/mine" in pushed.stdout
        code = "from mango import load_policy; print(load_policy('hf://ada/policies').card['description'])"
        stranger = environment(running, tmp_path / "stranger")
        there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=stranger)
        assert there.stdout == "a test\n", there.stderr
        assert list((tmp_path / "stranger").rglob("mine.safetensors"))


def test_a_command_without_a_token_says_so_and_makes_nothing(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    source = frozen(tmp_path / "checkpoint.safetensors")
    refused = CliRunner().invoke(app, ["freeze", "--from", str(source), "--out", str(tmp_path / "x"), "--push", "ada/policies"])
    assert refused.exit_code == 2 and refused.stderr.startswith("mango: error: no token to push to ada/policies")
    assert len(refused.stderr.splitlines()) == 1 and refused.stdout == ""
    assert not (tmp_path / "x.safetensors").exists() and stand_in.requests == []


def test_evaluate_takes_a_policy_from_the_hub(stand_in: StandIn, tmp_path: Path) -> None:
    path, rows = frozen(tmp_path / "policy.safetensors"), tmp_path / "rows.json"
    stand_in.add("ada/one", {"policy.safetensors": path.read_bytes()})
    words = "evaluate --workload tests.tiny_workload:tiny --budgets 0.5 --seeds 1 --policy hf://ada/one --policy".split()
    done = CliRunner().invoke(app, [*words, str(path), "--json", str(rows)])
    assert done.exit_code == 0, done.stderr
    found = {row["policy"]: row["val_loss"] for row in json.loads(rows.read_text())}
    assert found["hf://ada/one"] == found["policy"] is not None


def test_inspect_and_freeze_read_from_the_hub(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.add("ada/one", {"policy.safetensors": frozen(tmp_path / "policy.safetensors").read_bytes()})
    shown = CliRunner().invoke(app, ["inspect", "hf://ada/one", "--workload", "tests.tiny_workload:tiny", "--json", "-"])
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["card"]["checkpoint"]["training_data_digest"] == "0739abcfb8cb"
    again = CliRunner().invoke(app, ["freeze", "--from", "hf://ada/one", "--out", str(tmp_path / "again.safetensors")])
    assert again.exit_code == 0, again.stderr
    assert same_decisions(load_policy(tmp_path / "again.safetensors"), load_policy("hf://ada/one"))
    for words in ("inspect hf://ada/none", "inspect hf://x", "evaluate --policy hf://ada/none --workload digits_mlp"):
        failed = CliRunner().invoke(app, words.split())
        assert failed.exit_code == 2 and len(failed.stderr.splitlines()) == 1 and failed.stderr.startswith("mango: error: ")
    alone = CliRunner().invoke(app, ["freeze", "--from", "hf://ada/one", "--out", str(tmp_path / "x"), "--private"])
    assert alone.exit_code == 2 and "--push" in alone.stderr


def test_a_spec_is_printed_as_it_is_read() -> None:
    for spec in ("hf://a/b", "hf://a/b@v1", "hf://a/b/c", "hf://a/b@refs/pr/3/c.d/e"):
        assert str(hub.HubPolicy.parse(spec)) == spec
    assert hub.HubPolicy.parse("hf://a/b@feature%2Fx").revision == "feature/x"
