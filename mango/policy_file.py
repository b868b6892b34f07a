"""Frozen policies: one safetensors file that carries a policy to any model, written by `freeze`, read by `load_policy`.

The file holds the tensors of a `PolicyNetwork` and, as metadata, everything that must agree before they mean anything:
the observation schema, the menus, the ladder. Reading it parses safetensors and JSON and nothing else: no file that
is given to `load_policy` is ever unpickled. The format is written down in `policies/README.md`.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mango.config import KNOBS, KNOBS_VERSION, LADDER, Ladder
from mango.features import FEATURE_DIM, FEATURES, SCHEMA_HASH
from mango.hub import PICKLES, fetch, is_on_hub
from mango.networks import PolicyNetwork, PolicyOutput
from mango.trunks import State

T = TypeVar("T")
FORMAT, FORMAT_VERSION = "mango-policy", "1"
HEADS = ("rung", "knobs")
REQUIRED = (
    *("format", "format_version", "schema_hash", "feature_names", "knobs_version", "knobs", "ladder"),
    *("architecture", "head", "card", "weights_sha256"),
)
_RETRAIN = "retrain the policy, or install the version of mango-optim that wrote the file"


class FrozenPolicy:
    """A network that only acts: greedy, on the CPU, without gradients; its memory is one state of its trunk per layer.

    `act(obs (L, 64)) -> (L, 7)` knob indices. With the rung head there is also `scores(obs) -> (L, R)`, the log-probability
    of every rung, which the optimizer's knapsack maximises under the budget; with the knobs head there is no such attribute.
    Each call of `act` or `scores` is one decision and moves the memory on. `metadata` is the file's, `card` its free part.
    The network is copied, so the original may go on training.
    """

    scores: Callable[[Tensor], Tensor]                   # set only where head == "rung"

    def __init__(
        self,
        network: PolicyNetwork,
        *,
        head: str = "rung",
        ladder: Ladder = LADDER,
        metadata: Mapping[str, str] | None = None,
        name: str = "unnamed",
    ) -> None:
        _check_head(network, head, ladder)
        self.network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
        self.head, self.ladder, self.name = head, ladder, name
        self.metadata = dict(metadata or {})
        self.card: dict[str, Any] = json.loads(self.metadata.get("card", "{}"))
        self._rung_actions = torch.tensor([rung.to_action() for rung in ladder])               # (R, 7)
        self._state: State | None = None
        if head == "rung":
            self.scores = self._scores

    def __repr__(self) -> str:
        return f"FrozenPolicy({self.name!r}, head={self.head!r}, architecture={self.network.architecture})"

    def act(self, obs: Tensor) -> Tensor:
        """One decision per layer: observations (L, 64) to knob indices (L, 7) int64."""
        output = self._decide(obs)
        if self.head == "rung":
            return self._rung_actions[output.rung_logits.argmax(-1)]
        return self.network.distribution(output).mode()

    def reset(self) -> None:
        """Forget the carried state: a new run."""
        self._state = None

    def state_dict(self) -> dict[str, Tensor]:
        """The carried state, two tensors under the trunk's `state_names` ("h" and "c" of an LSTM); empty without a memory."""
        names = self.network.trunk.state_names
        return {} if self._state is None else {name: part.clone() for name, part in zip(names, self._state, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`: the next decisions are the same bit for bit."""
        names = self.network.trunk.state_names
        self._state = (state[names[0]].clone(), state[names[1]].clone()) if names and names[0] in state else None

    def _scores(self, obs: Tensor) -> Tensor:
        return self._decide(obs).rung_logits.log_softmax(-1)

    def _decide(self, obs: Tensor) -> PolicyOutput:
        if obs.dim() != 2 or obs.shape[1] != FEATURE_DIM:
            raise ValueError(f"a policy reads observations (L, {FEATURE_DIM}); got {tuple(obs.shape)}")
        if self._state is not None and self._state[0].shape[1] != obs.shape[0]:
            self._state = None                           # another model: other layers
        with torch.no_grad():
            output = self.network(obs.detach().to("cpu", torch.float32), self._state)
        assert isinstance(output, PolicyOutput)
        self._state = output.state
        return output


def policy_dir() -> Path:
    """The folder of the shipped policies: `mango/frozen` in an installed package, `policies/` in a checkout."""
    installed = Path(__file__).parent / "frozen"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "policies"


def shipped_policies() -> list[str]:
    """The names that `load_policy` knows."""
    return sorted(path.stem for path in policy_dir().glob("*.safetensors"))


def freeze(
    network: PolicyNetwork, path: str | Path, *, head: str = "rung", ladder: Ladder = LADDER, card: Mapping[str, Any]
) -> Path:
    """Write `<name>.safetensors` and its card `<name>.json`; returns the path of the former.

    `head` says which head decides, `ladder` what the rungs mean. `card` is free JSON: what it was trained on (digest), commit,
    evaluation rows, licence. Both files are written aside and moved into place; the same policy gives the same bytes.
    """
    if not isinstance(network, PolicyNetwork):
        raise TypeError(f"only a PolicyNetwork can be frozen; got {type(network).__name__} (some have to_network())")
    _check_head(network, head, ladder)
    if network.architecture["feature_dim"] != FEATURE_DIM:
        raise ValueError(f"the network reads {network.architecture['feature_dim']} features; the observation has {FEATURE_DIM}")
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous().clone() for name, t in network.state_dict().items()}
    broken = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise ValueError(f"the network has NaN or infinite weights in {', '.join(broken)}; freeze an earlier checkpoint")
    try:
        card_text = json.dumps(dict(card), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the card is not JSON (strings, finite numbers, lists, dicts): {error}") from error
    target = Path(path) if Path(path).suffix == ".safetensors" else Path(f"{path}.safetensors")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "schema_hash": SCHEMA_HASH,
        "feature_names": json.dumps([feature.name for feature in FEATURES]),
        "knobs_version": str(KNOBS_VERSION),
        "knobs": json.dumps(KNOBS),
        "ladder": ladder.to_json(),
        "architecture": json.dumps(network.architecture),
        "head": head,
        "card": card_text,
        "weights_sha256": _weights_sha256(tensors),
    }
    data = _sorted_header(save(tensors, metadata=metadata))
    summary = {
        "name": target.stem,
        "head": head,
        "architecture": network.architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "ladder": list(ladder.names),
        "schema_hash": SCHEMA_HASH,
        "knobs_version": KNOBS_VERSION,
        "file_sha256": hashlib.sha256(data).hexdigest(),
        "card": json.loads(card_text),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target.with_suffix(".json"), (json.dumps(summary, indent=2) + "\n").encode())
    _write(target, data)
    return target


def load_policy(name_or_path: str | Path, *, ladder: Ladder = LADDER) -> FrozenPolicy:
    """The policy of a shipped name, of a `.safetensors` file, or of the Hub (`hf://owner/name`), checked and ready to act.

    `ladder` is the one that the optimizer uses: a policy that scores rungs is refused where its own differs. A file that is
    corrupt, of another format, schema or menu, or that would have to be unpickled (SB3 zip, d3rlpy .d3, torch .pt) is a
    ValueError that says what was found and what was expected.
    """
    path = _find(name_or_path)
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file ({error}); get or freeze it again") from error
    _check_metadata(path, metadata)
    if _weights_sha256(tensors) != metadata["weights_sha256"]:
        raise ValueError(f"{path} is corrupt: its weights do not match their checksum; get or freeze it again")
    own = _parse(path, metadata, "ladder", Ladder.from_json)
    if metadata["head"] == "rung" and own != ladder:
        raise ValueError(
            f"{path} scores the rungs {', '.join(own.names)}; the ladder here is {', '.join(ladder.names)}: "
            "pass the file's ladder to the optimizer, or retrain"
        )
    network = _parse(path, metadata, "architecture", lambda text: _build(json.loads(text), tensors))
    return FrozenPolicy(network, head=metadata["head"], ladder=own, metadata=metadata, name=path.stem)


def _find(name_or_path: str | Path) -> Path:
    name = os.fspath(name_or_path)
    if name in shipped_policies():
        return policy_dir() / f"{name}.safetensors"
    if is_on_hub(name):
        return fetch(name)
    if not Path(name).is_file():
        shipped = ", ".join(shipped_policies()) or "none yet"
        raise ValueError(f"unknown policy {name!r}: no file, no hf://owner/name, and the shipped policies are: {shipped}")
    return Path(name)


def _refuse_pickle(path: Path) -> None:
    """Loading a pickle runs whatever code it names, so the first bytes decide before any reader sees the file."""
    with path.open("rb") as file:
        start = file.read(9)
    is_pickle = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{"
    if start[:2] == b"PK" or is_pickle or path.suffix in PICKLES:
        raise ValueError(
            f"{path} is no safetensors file but one that runs code when loaded (SB3 zip, d3rlpy .d3 or pickle): if you trust "
            f"who made it, convert it with `mango freeze --from {path} --trust-pickle` (trust_pickle=True) and load the result"
        )


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no policy: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {metadata.get('format_version')!r}, expected {FORMAT_VERSION!r}; {_RETRAIN}")
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f"{path} lacks the metadata {', '.join(missing)}; freeze it again")
    if metadata["schema_hash"] != SCHEMA_HASH:
        raise ValueError(f"{path} reads the observation schema {metadata['schema_hash']}, expected {SCHEMA_HASH}; {_RETRAIN}")
    found, expected = (metadata["knobs_version"], metadata["knobs"]), (str(KNOBS_VERSION), json.dumps(KNOBS))
    if found != expected:
        raise ValueError(f"{path} was made for knobs {' '.join(found)}, expected {' '.join(expected)}; {_RETRAIN}")
    if metadata["head"] not in HEADS:
        raise ValueError(f"{path} decides with the head {metadata['head']!r}, expected one of: {', '.join(HEADS)}")
    if not isinstance(_parse(path, metadata, "card", json.loads), dict):
        raise ValueError(f"{path} has a card that is no JSON object; freeze it again")


def _parse(path: Path, metadata: Mapping[str, str], key: str, read: Callable[[str], T]) -> T:
    try:
        return read(metadata[key])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged or foreign {key}: {error}") from error


def _build(architecture: Any, tensors: dict[str, Tensor]) -> PolicyNetwork:
    """The network with the file's tensors as its weights; shapes are compared before anything is allocated."""
    network = PolicyNetwork(**architecture, device="meta")
    if network.architecture != architecture:
        raise ValueError(f"it is not what PolicyNetwork writes: {network.architecture}")
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        shapes = "; ".join(f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in wrong)
        raise ValueError(f"the tensors do not fit it: {shapes}")
    if not all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError("the tensors are not all finite float32")
    network.load_state_dict(tensors, assign=True)
    return network


def _check_head(network: PolicyNetwork, head: str, ladder: Ladder) -> None:
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
    if head == "rung" and network.architecture["rungs"] != len(ladder):
        raise ValueError(f"the network scores {network.architecture['rungs']} rungs; the ladder has {len(ladder)}")


def _weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sorted_header(data: bytes) -> bytes:
    """The same file with its header in sorted order: safetensors writes metadata in an order that differs between runs."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)                    # a full disk leaves nothing half written
