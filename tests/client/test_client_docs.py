"""docs/client.md: its examples are Python, and those that stand alone run."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import srpc_client

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/client.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_python(example: str) -> None:
    compile(example, "docs/client.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


def test_the_callers_examples_run(
    local: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SRPC_ADDRESS", local.address)
    monkeypatch.setenv("LOGNAME", "alice")
    for example in EXAMPLES[:2]:
        exec(example, {})
    assert capsys.readouterr().out == "['add', 'never']\nb'3'\nb'3'\nb'3'\nb'7'\n"


async def test_the_handlers_example_is_right() -> None:
    example = next(each for each in EXAMPLES if "async def add" in each)
    names: dict[str, object] = {}
    exec(example.partition("asyncio.run")[0], names)
    handler = names["add"]
    assert callable(handler)
    request = srpc_client.Request(None, 1, b"1 2", b"")  # type: ignore[arg-type]
    assert await handler(request) == b"3"
    request.payload = b"x"
    with pytest.raises(srpc_client.CallError):
        await asyncio.ensure_future(handler(request))


def test_the_tree_of_errors_is_the_one_in_the_code() -> None:
    drawn = re.findall(r"[├└]── (\w+)", TEXT)
    assert set(drawn) == {each for each in srpc_client.__all__ if isinstance(getattr(srpc_client, each), type)} & {
        *("SrpcError", "CallError", "CallTimeout", "AuthenticationError"),
        *("ConnectionLost", "Unreachable", "UntrustedServer", "PinMismatch"),
    }
    for name in drawn:
        assert issubclass(getattr(srpc_client, name), srpc_client.SrpcError)


def test_the_commands_of_the_table_are_the_commands_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "srpc_client.cli", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    listed = set(re.findall(r"^  (\w+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE))
    documented = set(re.findall(r"`(\w+)(?: [^`]*)?`", "".join(re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE))))
    assert listed == documented & listed
    assert {"call", "ls", "stat", "tree", "whoami", "pin"} <= listed


def test_no_line_is_longer_than_those_of_the_sources() -> None:
    text = (ROOT / "docs/client.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 125] == []
