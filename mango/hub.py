"""Frozen policies on the Hugging Face Hub: `hf://owner/name` becomes a file in the Hub's cache on this machine.

A spec is `hf://owner/name`, with `@revision` (a branch, a tag or a commit) and `/file` where they are wanted. Only safetensors
files are fetched; what comes down is then checked like any local file (`mango.policy_file`). Endpoint, token, cache and offline
mode are huggingface_hub's own: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE. The library is the extra `[hub]`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HUB = "hf://"
DEFAULT_FILE = "policy.safetensors"
PICKLES = (".zip", ".d3", ".pt", ".pth", ".pkl", ".pickle")                # loading one runs code that it names
_NAME = r"[A-Za-z0-9_][\w.+-]*"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.%+-]+"
_SPEC = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>{_NAME}(?:/{_NAME})*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubPolicy:
    """Which policy of which repository.

    >>> HubPolicy.parse("hf://ada/policies@v2/small")
    HubPolicy(repo='ada/policies', revision='v2', file='small.safetensors')
    """

    repo: str                                            # owner/name
    revision: str | None = None                          # None: the repository's main branch
    file: str | None = None                              # None: `DEFAULT_FILE`, or the only policy that there is

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{revision}" + (f"/{self.file.removesuffix('.safetensors')}" if self.file else "")

    @classmethod
    def parse(cls, spec: str) -> "HubPolicy":
        found = _SPEC.fullmatch(re.sub("^hf:/+", "", spec))
        if found is None:
            ways = "hf://owner/name, hf://owner/name@revision or hf://owner/name/file"
            raise ValueError(f"{spec!r} names no policy on the Hub; write {ways}")
        file, revision = found["file"], found["revision"]
        if file is not None and file.endswith(PICKLES):
            raise ValueError(f"{spec} is no safetensors file but one that may run code when loaded: it is not fetched")
        if file is not None:
            file = file.removesuffix(".safetensors") + ".safetensors"
        return cls(found["repo"], revision and unquote(revision), file)


def is_on_hub(name: object) -> bool:
    """Whether a name is a spec of the Hub; a `Path` made of one has lost a slash and counts too.

    >>> is_on_hub("hf://ada/policies"), is_on_hub(Path("hf://ada/policies")), is_on_hub("policies/demo.safetensors")
    (True, True, False)
    """
    return isinstance(name, str | Path) and str(name).startswith("hf:/")


def fetch(spec: str) -> Path:
    """The policy's file in the Hub's cache; without a network the one that was fetched before."""
    asked = HubPolicy.parse(spec)
    library = hub_library()
    with told_in_one_line(str(asked)):
        known = None if asked.file else _only_one_in_cache(asked)
        if known is not None and not _answers(asked):
            return known
        try:
            return _download(asked, asked.file or DEFAULT_FILE)            # without a network: from the cache
        except library.errors.LocalEntryNotFoundError:                     # the Hub was not reached, and it is not in the cache
            raise
        except library.errors.EntryNotFoundError:                          # the Hub was reached and has no such file
            pass
        return _download(asked, _only_one(asked, library.HfApi().list_repo_files(asked.repo, revision=asked.revision)))


def hub_library() -> Any:
    """huggingface_hub, or one line that says how to get it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ValueError(f'policies on the Hub need huggingface_hub ({error}): pip install "mango-optim[hub]"') from error
    return huggingface_hub


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """What the Hub, or the way to it, answers becomes one ValueError that says what was wanted, of whom, and what came back."""
    library = hub_library()
    errors, endpoint = library.errors, library.constants.ENDPOINT
    try:
        yield
    except errors.RepositoryNotFoundError as error:                        # also what a private one answers, and a gated one
        problem = f"{endpoint} has no such repository, or the token (HF_TOKEN, or `hf auth login`) gives no access to it"
        raise ValueError(f"{what}: {problem}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{what}: the repository at {endpoint} has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        problem = f"{endpoint} gave no answer that helps, and the file is not in the cache"
        raise ValueError(f"{what}: {problem} ({_short(error.__cause__ or error)})") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{what}: {_short(error)}") from error
    except (*_web_errors(), errors.OfflineModeIsEnabled, RuntimeError) as error:
        cause = f"; {_short(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else ""
        raise ValueError(f"{what}: {endpoint} could not do it ({_short(error)}{cause})") from error


def _download(asked: HubPolicy, file: str) -> Path:
    assert file.endswith(".safetensors")
    return Path(hub_library().hf_hub_download(asked.repo, file, revision=asked.revision, library_name="mango-optim"))


def _answers(asked: HubPolicy) -> bool:
    """Whether the Hub can be asked at all, in one attempt: the library asks for a file several times over half a minute."""
    library = hub_library()
    try:
        library.HfApi().model_info(asked.repo, revision=asked.revision, timeout=10)
    except library.errors.RevisionNotFoundError:
        return True
    except (*_web_errors(), library.errors.OfflineModeIsEnabled):
        return False
    return True


def _web_errors() -> tuple[type[Exception], ...]:
    """What a request raises: the library's error and those it is built on, of an HTTP library that differs by version."""
    return tuple(kind for kind in hub_library().errors.HfHubHTTPError.__mro__ if kind.__module__ != "builtins")


def _only_one(asked: HubPolicy, files: list[str]) -> str:
    """The one policy that a repository without the wanted file has; where there are none or several, an error that lists them."""
    policies = sorted(file for file in files if file.endswith(".safetensors"))
    if asked.file is None and len(policies) == 1:
        return policies[0]
    if policies:
        ways = ", ".join(str(HubPolicy(asked.repo, asked.revision, file)) for file in policies[:20])
        problem = "is not in the repository" if asked.file else "holds several policies, none of them by default"
        raise ValueError(f"{asked} {problem}; there are: {ways}")
    pickles = ", ".join(sorted(file for file in files if file.endswith((*PICKLES, ".bin", ".ckpt")))[:5])
    if pickles:
        raise ValueError(
            f"{asked} holds no safetensors file but {pickles}, which may run code when loaded and is not fetched: "
            "ask its author for a frozen policy (`mango freeze --push`)"
        )
    raise ValueError(f"{asked} holds no policy: there is no .safetensors file in the repository")


def _only_one_in_cache(asked: HubPolicy) -> Path | None:
    """The policy that was found as the only one before. Only where it is known that there is no default file to prefer."""
    library = hub_library()
    if library.try_to_load_from_cache(asked.repo, DEFAULT_FILE, revision=asked.revision) is None:
        return None
    try:
        folder = library.snapshot_download(
            asked.repo, revision=asked.revision, allow_patterns="*.safetensors", local_files_only=True
        )
    except library.errors.LocalEntryNotFoundError:
        return None
    files = sorted(Path(folder).rglob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _short(error: BaseException) -> str:
    """An answer on one line; the Hub's run over several and end in advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
