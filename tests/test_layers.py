"""The layers (docs/privsep.md): a file imports only from rows above its own. Read with ast, imports inside functions too.

An import of a whole package (`from srpcd import ipc`) counts as one of what it names. Imports under `if TYPE_CHECKING:`
are held to the layers of srpcd too, but not to the rules about the rest: they load nothing.
"""

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.syntax import parse

ROOT = Path(__file__).resolve().parents[1]

MONITOR_LINES = 2848
"""Lines of code (no blank ones, comments, docstrings, imports) of all that runs as root, its children included. About a
sixth are pure decisions without I/O (who is admitted, who is served next, which identity a session has). SELinux, PAM
sessions, systemd and control groups have files of their own. The design hopes for 900."""


class Row(NamedTuple):
    """files: patterns of paths. srpcd: patterns of our own modules that they may import. packages: of others. only: of the
    standard library; empty: any but `never`."""

    name: str
    files: tuple[str, ...]
    srpcd: tuple[str, ...]
    packages: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


LIGHT_WIRE = ("srpcd.wire.limits", "srpcd.wire.errors", "srpcd.wire.frames")
"""The part of wire that loads nothing but struct and errno."""

LIGHT = ("_ctypes", "atexit", "_signal", "_socket", "array", "errno", "fcntl", "gc", "os", "select", "struct", "sys", "time")
"""What a worker may load at its start (measured: each of asyncio, json, typing … costs megabytes and milliseconds)."""

PURE = (
    *("_socket", "_thread", "asyncio", "ctypes", "fcntl", "io", "logging", "mmap", "os", "pathlib", "select", "selectors"),
    *("shutil", "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time"),
)
"""What a layer without input and output has no use for; the time is handed to it."""

ROOTS = ("json", "ssl", "http", "urllib", "xml", "zlib", "gzip", "email", "subprocess", "tempfile")
"""Parsers of hostile bytes, and ways to start a program, that root has no use for."""

# The first row that fits a file is its row.
ROWS = (
    Row("package", ("srpcd/__init__.py",), ()),
    Row("wire, messages", ("srpcd/wire/messages.py",), ("srpcd.wire", "srpcd.wire.*"), ("msgspec",), never=PURE),
    # io for BytesIO, in memory: what else is in it would be seen.
    Row("wire, light", ("srpcd/wire/*",), LIGHT_WIRE, only=("errno", "struct", "typing", "collections", "io")),
    Row("session", ("srpcd/session/*",), ("srpcd.wire", "srpcd.wire.*", "srpcd.session", "srpcd.session.*"), never=PURE),
    Row("C library", ("srpcd/libc.py",), (), only=LIGHT),
    Row("descriptors that are sent along", ("srpcd/passing.py",), (), only=LIGHT),
    Row("ipc", ("srpcd/ipc.py",), ("srpcd.passing", *LIGHT_WIRE), only=LIGHT),
    Row("confine", ("srpcd/confine.py", "srpcd/openat2.py", "srpcd/alarm.py"), ("srpcd.libc",), only=LIGHT),
    Row("SELinux", ("srpcd/selinux.py",), ("srpcd.confine",), only=(*LIGHT, "collections", "contextlib")),
    Row("config", ("srpcd/config.py",), ("srpcd.wire", "srpcd.wire.*"), ("msgspec",)),
    Row("log, rate", ("srpcd/lograte.py",), (), only=("typing",)),
    Row("log", ("srpcd/log.py",), ("srpcd.lograte",), never=ROOTS),
    Row("keys", ("srpcd/keys.py",), (), ("cryptography",)),
    Row("records", ("srpcd/records.py",), LIGHT_WIRE, ("OpenSSL",), only=("typing",)),
    Row(
        "monitor, admission",
        ("srpcd/monitor/admission.py", "srpcd/monitor/origins.py"),
        ("srpcd.config", "srpcd.monitor.origins"),
        only=("collections", "ipaddress", "typing"),
    ),
    Row(
        "monitor, PAM child",
        ("srpcd/monitor/pamchild.py",),
        ("srpcd.ipc", "srpcd.confine", *LIGHT_WIRE),
        ("pam",),
        never=("asyncio", *ROOTS),
    ),
    Row(
        "monitor, account child",
        ("srpcd/monitor/accounts.py",),
        ("srpcd.ipc", "srpcd.confine", "srpcd.config", "srpcd.log", "srpcd.monitor", "srpcd.monitor.*", *LIGHT_WIRE),
        never=ROOTS,
    ),
    Row(
        "monitor, contexts by libselinux",
        ("srpcd/monitor/contexts.py",),
        ("srpcd.selinux",),
        only=("contextlib", "ctypes", "errno", "os"),
    ),
    Row(
        "monitor, PAM sessions",
        ("srpcd/monitor/pamsession.py",),
        ("srpcd.confine",),
        never=("pwd", "grp", *ROOTS),
    ),
    Row(
        "monitor",
        ("srpcd/monitor/*",),
        (
            "srpcd.ipc",
            "srpcd.confine",
            "srpcd.openat2",
            "srpcd.passing",
            "srpcd.selinux",
            "srpcd.config",
            "srpcd.log",
            "srpcd.lograte",
            "srpcd.monitor",
            "srpcd.monitor.*",
            *LIGHT_WIRE,
        ),
        never=("pwd", "grp", "spwd", "crypt", *ROOTS),
    ),
    Row(
        "worker",
        ("srpcd/worker/*",),
        (
            "srpcd.ipc",
            "srpcd.confine",
            "srpcd.libc",
            "srpcd.openat2",
            "srpcd.alarm",
            "srpcd.passing",
            "srpcd.worker",
            "srpcd.worker.*",
            *LIGHT_WIRE,
        ),
        only=(*LIGHT, "grp", "pwd"),
    ),
    Row(
        "gate",
        ("srpcd/gate/*",),
        (
            "srpcd.ipc",
            "srpcd.confine",
            "srpcd.alarm",
            "srpcd.passing",
            "srpcd.config",
            "srpcd.libc",
            "srpcd.records",
            "srpcd.wire",
            "srpcd.wire.*",
            "srpcd.session",
            "srpcd.session.*",
            "srpcd.gate",
            "srpcd.gate.*",
        ),
        ("OpenSSL", "cryptography", "pyseccomp"),
        never=("subprocess", "pwd", "grp", "ssl", "tempfile"),
    ),
    Row("composition", ("srpcd/__main__.py",), ("srpcd.*",), never=ROOTS),
    Row(
        "client",
        ("srpc_client/*",),
        ("srpcd.wire", "srpcd.wire.*", "srpcd.alarm", "srpcd.passing", "srpcd.records", "srpc_client", "srpc_client.*"),
        ("OpenSSL", "cryptography", "msgspec", "click", "rich"),
    ),
)

LAZY = ("srpc_client/__init__.py",)
"""Loads its names when they are first used. Every string in it that could be the name of a module of ours counts as one."""

MODULE = re.compile(r"(srpcd|srpc_client)(\.\w+)+")

FILES = sorted(path.relative_to(ROOT).as_posix() for top in ("srpcd", "srpc_client") for path in (ROOT / top).rglob("*.py"))


class Import(NamedTuple):
    """One module that a file imports. typing: under `if TYPE_CHECKING:`."""

    module: str
    line: int
    typing: bool


def row_of(file: str) -> Row:
    """The first row that the file belongs to."""
    for row in ROWS:
        if any(fnmatch.fnmatchcase(file, pattern) for pattern in row.files):
            return row
    raise AssertionError(f"{file} belongs to no layer: give it a row here and in docs/privsep.md")


def imports(file: str, tree: ast.Module) -> Iterator[Import]:
    """All imports of a file. Fails for those that can't be read off."""
    package = file.removesuffix(".py").split("/")[:-1]
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        typing = id(node) in checking
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, line, typing)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for name in node.names:
                assert name.name != "*", f"{file}:{line}: import *"
                yield Import(_named(base, name.name), line, typing)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("__import__", "exec", "eval", "compile"), f"{file}:{line}: {called}"
            if called.endswith("import_module"):
                argument = node.args[0]
                readable = isinstance(argument, ast.Constant)
                assert readable or file in LAZY, f"{file}:{line}: which module this imports can't be read off"
                if isinstance(argument, ast.Constant):
                    yield Import(str(argument.value), line, typing)
    if file in LAZY:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
                yield Import(str(node.value), node.lineno, False)


def _named(base: str, name: str) -> str:
    """`from srpcd import ipc` imports srpcd.ipc; `from srpcd.ipc import Gate` imports srpcd.ipc."""
    place = ROOT.joinpath(*base.split("."), name)
    return f"{base}.{name}" if place.is_dir() or place.with_suffix(".py").is_file() else base


def faults(file: str, source: str) -> list[str]:
    """What is wrong with a file's imports."""
    row, found = row_of(file), []
    for module, line, typing in imports(file, parse(source)):
        top = module.partition(".")[0]
        reason = ""
        if top in ("srpcd", "srpc_client"):
            allowed = any(fnmatch.fnmatchcase(module, pattern) for pattern in row.srpcd)
            # A package's own `__init__` is loaded with anything in it; those of srpcd are empty or light.
            reason = "" if allowed else "is not above it"
        elif top in ("multiprocessing", "pickle", "marshal", "shelve", "dill"):
            reason = "is nowhere to be used"
        elif typing:
            continue
        elif top == "importlib":
            reason = "" if "import_module" in source else "hides what is imported"
        elif top in sys.stdlib_module_names:
            if row.only and top not in row.only:
                reason = "is not light enough, or not pure"
            elif top in row.never:
                reason = "has no business there"
        elif top not in row.packages:
            reason = "is a package that only other layers use"
        if reason:
            found.append(f"{file}:{line}: {module} {reason} (layer {row.name})")
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_rows_above_its_own(file: str) -> None:
    assert faults(file, (ROOT / file).read_text(encoding="utf-8")) == []


FORBIDDEN = [
    ("srpcd/wire/frames.py", "import os"),
    ("srpcd/wire/frames.py", "import msgspec"),
    ("srpcd/wire/errors.py", "from srpcd.wire import messages"),
    ("srpcd/wire/messages.py", "import socket"),
    ("srpcd/wire/messages.py", "def f():\n    import asyncio"),
    ("srpcd/session/rules.py", "from srpcd import ipc"),
    ("srpcd/session/rules.py", "import time"),
    ("srpcd/session/rules.py", "from .. import config"),
    ("srpcd/session/rules.py", "from ..gate import tls"),
    ("srpcd/ipc.py", "from srpcd.wire.messages import Auth"),
    ("srpcd/ipc.py", "import json"),
    ("srpcd/confine.py", "import asyncio"),
    ("srpcd/config.py", "import srpcd.ipc"),
    ("srpcd/monitor/monitor.py", "import json"),
    ("srpcd/monitor/monitor.py", "from OpenSSL import SSL"),
    ("srpcd/monitor/monitor.py", "import msgspec"),
    ("srpcd/monitor/monitor.py", "import ssl"),
    ("srpcd/monitor/monitor.py", "import pwd"),
    ("srpcd/monitor/monitor.py", "import pam"),
    ("srpcd/monitor/monitor.py", "from srpcd.wire import messages"),
    ("srpcd/monitor/monitor.py", "from srpcd import keys"),
    ("srpcd/monitor/monitor.py", "import importlib\nimportlib.util.find_spec(x)"),
    ("srpcd/monitor/accounts.py", "import pam"),
    ("srpcd/monitor/contexts.py", "import pwd"),
    ("srpcd/monitor/pamsession.py", "import pam"),
    ("srpcd/selinux.py", "from srpcd import ipc"),
    ("srpcd/selinux.py", "import asyncio"),
    ("srpcd/worker/lines.py", "from srpcd import selinux"),
    ("srpcd/worker/lines.py", "import json"),
    ("srpcd/worker/lines.py", "import asyncio"),
    ("srpcd/worker/lines.py", "import typing"),
    ("srpcd/worker/lines.py", "import selectors"),
    ("srpcd/worker/lines.py", "from srpcd.wire.messages import Error"),
    ("srpcd/worker/lines.py", "from srpcd.monitor import launch"),
    ("srpcd/worker/lines.py", "if TYPE_CHECKING:\n    from srpcd.monitor import launch"),
    ("srpcd/gate/tls.py", "from srpcd.monitor import launch"),
    ("srpcd/gate/tls.py", "import subprocess"),
    ("srpcd/gate/tls.py", "from srpcd.worker.loop import Loop"),
    ("srpcd/log.py", "import json"),
    ("srpcd/__main__.py", "import srpc_client"),
    ("srpc_client/dial.py", "from srpcd import ipc"),
    ("srpc_client/dial.py", "import srpcd.config"),
    ("srpc_client/dial.py", "import pickle"),
    ("srpc_client/dial.py", "from multiprocessing import Process"),
    ("srpc_client/dial.py", "import requests"),
    ("srpc_client/__init__.py", "HOME = {'Gate': 'srpcd.ipc'}"),
]


@pytest.mark.parametrize(("file", "source"), FORBIDDEN)
def test_the_test_sees_what_is_forbidden(file: str, source: str) -> None:
    assert len(faults(file, source)) == 1


@pytest.mark.parametrize(
    "source", ["__import__('os')", "exec('import os')", "importlib.import_module(name)", "from os import *"]
)
def test_an_import_that_can_not_be_read_off_is_forbidden(source: str) -> None:
    with pytest.raises(AssertionError):
        faults("srpcd/gate/tls.py", source)


def test_a_file_of_no_layer_is_forbidden() -> None:
    with pytest.raises(AssertionError, match="belongs to no layer"):
        faults("srpcd/utils.py", "")


def test_the_package_itself_is_empty() -> None:
    assert (ROOT / "srpcd/__init__.py").read_bytes() == b""


@pytest.mark.parametrize("file", [each for each in FILES if not each.startswith("srpc_client/")])
def test_no_assert_decides_about_what_a_peer_sent(file: str) -> None:
    # It vanishes with -O, and its exception is nobody's. What narrows a type for mypy may stay.
    narrowing = (ast.Name, ast.Attribute)
    for node in ast.walk(parse((ROOT / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assert):
            continue
        test = node.test
        is_instance = isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"
        is_there = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and isinstance(test.left, narrowing)
        assert is_instance or is_there, f"{file}:{node.lineno}: {ast.unparse(node)}"
        assert not file.startswith("srpcd/wire/"), f"{file}:{node.lineno}: {ast.unparse(node)}"


def code_lines(source: str) -> int:
    """Lines with code on them: not blank, no comment, no docstring, no import."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_monitor_can_be_read_in_one_sitting() -> None:
    files = [ROOT / "srpcd/selinux.py", *(ROOT / "srpcd/monitor").glob("*.py")]
    counts = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in files}
    assert sum(counts.values()) <= MONITOR_LINES, counts


def test_a_worker_loads_almost_nothing() -> None:
    # What `-I -S` gives, and each module of the worker: the table above, held by the interpreter itself.
    modules = [file.removesuffix(".py").replace("/", ".") for file in FILES if file.startswith("srpcd/worker/")]
    modules = [each.removesuffix(".__init__") for each in modules if not each.endswith("__main__")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}; print(*sys.modules)"
    python = getattr(sys, "_base_executable", sys.executable)
    loaded = subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"asyncio", "ctypes", "json", "logging", "dataclasses", "typing", "msgspec", "re", "enum", "socket"}
    heavy |= {"selectors", "signal", "types"}
    assert heavy & set(loaded) == set()


def test_no_private_key_is_in_the_repository() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True)
    if listed.returncode:
        pytest.skip("needs git and a clone")
    mark = b"PRIVATE KEY" + b"-----"
    for name in filter(None, listed.stdout.split(b"\0")):
        path = ROOT / name.decode()
        if path.is_file() and (data := path.read_bytes()).count(mark):
            # Words about keys are fine, a key's base64 is not.
            assert b"-----BEGIN" not in data or path.suffix == ".py", f"{path} holds a private key"
            assert not any(len(line) == 64 and line.isalnum() for line in data.splitlines()), f"{path} holds a private key"
