"""`mango run` in this process, for tests of studies."""

from typing import Any

from typer.testing import CliRunner

from train_policy.cli import app


def mango_run(*words: str, code: int = 0) -> Any:
    """What it printed; its exit code is `code`."""
    done = CliRunner().invoke(app, ["run", *words])
    assert done.exit_code == code, done.output
    return done
