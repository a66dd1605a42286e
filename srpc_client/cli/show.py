"""What the command prints, for people or as JSON.

Names, sentences and prompts come from the other side: nothing of them reaches the terminal that it would obey.
"""

import json
import stat as stat_bits
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import E2BIG, ELOOP
from typing import TYPE_CHECKING, Any

import click
import msgspec

from srpc_client.blocking import Session
from srpc_client.errors import CallError
from srpc_client.text import lines_of, plain
from srpcd.wire.messages import StatReply

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

_KIND_BITS = {"directory": stat_bits.S_IFDIR, "service": stat_bits.S_IFIFO}


DEPTH_MAX = 64
"""Levels that `tree` goes down at most. Trees of procedures have three or four; each level costs calls inside calls here."""

ENTRIES_MAX = 10_000
"""Files that `tree` and `ls -l` describe at most: what a server says about each, up to 18 KB, is kept until it is printed.
A server can make up a directory that contains itself, and others without end."""


def mode_of(found: StatReply) -> str:
    """As `ls -l` writes it: `p` a service, `-` a program, `d` a directory."""
    return stat_bits.filemode(_KIND_BITS.get(found.kind, stat_bits.S_IFREG) | found.mode)


def _as_dict(found: StatReply) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(found)
    return facts


def _print_json(value: object) -> None:
    text = json.dumps(value, indent=2 if sys.stdout.isatty() else None)  # in ASCII, with escapes for all else
    click.echo(text.replace("\x7f", "\\u007f"))


def reply(payload: bytes, raw: bool) -> None:
    """A call's reply: as it is, and on a terminal so that it does not obey it, unless raw output is asked for."""
    if raw or not sys.stdout.isatty():
        sys.stdout.buffer.write(payload)
        sys.stdout.buffer.flush()
    else:
        click.echo(lines_of(payload), nl=not payload.endswith(b"\n"))


def facts(values: dict[str, Any], as_json: bool, only: str = "") -> None:
    """A few facts, one a line; `only` names the one that a person gets, without its name."""
    if as_json:
        _print_json(values)
    elif only:
        click.echo(plain(str(values[only])))
    else:
        width = max(map(len, values))
        for name, value in values.items():
            click.echo(f"{name:<{width}}  {'-' if value is None else plain(str(value))}")


def stat(found: StatReply, as_json: bool) -> None:
    """All that stat told."""
    if as_json:
        _print_json(_as_dict(found))
        return
    values: dict[str, Any] = {
        "name": found.name or "/",
        "kind": found.kind,
        "mode": f"{mode_of(found)} ({found.mode:04o})",
        "user": f"{found.user} ({found.uid})",
        "group": f"{found.group} ({found.gid})",
        "context": found.context,
        "changed": _time(found),
        "qid": found.qid,
    }
    if not found.is_dir:
        values["live"] = "yes" if found.live else "no: nobody serves it at the moment"
    elif found.children is None:
        values["names"] = "may not be read"
    else:
        values["names"] = f"{len(found.children)}{' and more' if found.more else ''}"
    facts(values, as_json=False)


def _time(found: StatReply) -> str:
    return datetime.fromtimestamp(found.mtime // 1_000_000_000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _stat_or_error(session: Session, path: str) -> StatReply | CallError:
    try:
        return session.stat(path)
    except CallError as refusal:
        return refusal


def _below(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def listing(session: Session, path: str, long: bool, as_json: bool) -> None:
    """Names in a directory; of an endpoint, itself."""
    found = session.stat(path)
    names = session.list(path) if found.is_dir else [found.name]
    if long and len(names) > ENTRIES_MAX:
        raise CallError(E2BIG, f"{len(names)} names: -l describes at most {ENTRIES_MAX}; list them without it")
    if not long:
        if as_json:
            _print_json(names)
        else:
            for name in names:
                click.echo(plain(name))
        return
    entries = [(name, _stat_or_error(session, _below(path, name)) if found.is_dir else found) for name in names]
    if as_json:
        _print_json([{"name": name, **_described(entry)} for name, entry in entries])
        return
    rows = []
    for name, entry in entries:
        if isinstance(entry, CallError):
            rows.append(("?---------", "-", "-", "-", f"{plain(name)}  ({plain(entry.message)})"))
        else:
            kind = entry.kind if entry.live or entry.is_dir else f"{entry.kind}, not live"
            rows.append((mode_of(entry), plain(entry.user), plain(entry.group), _time(entry), f"{plain(name)}  ({kind})"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        click.echo("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[4]]))


def _described(entry: StatReply | CallError) -> dict[str, Any]:
    if isinstance(entry, CallError):
        return {"error": {"errno": entry.errno, "code": entry.code, "message": entry.message}}
    return {key: value for key, value in _as_dict(entry).items() if key not in ("name", "children", "more")}


# --- tree --------------------------------------------------------------------------------------------------------------


class _Walk:
    """What one `tree` has seen: how much it may still describe, and which directories lie above the one it is in."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._left = ENTRIES_MAX
        self._above: set[str] = set()

    def entries(self, path: str, found: StatReply) -> list[tuple[str, StatReply | CallError]] | None:
        """What is in a directory; None where its names may not be read. Raises CallError (E2BIG) for too much in all."""
        if found.children is None:
            return None
        names = self._session.list(path) if found.more else found.children
        self._left -= len(names)
        if self._left < 0:
            raise CallError(E2BIG, f"the tree has over {ENTRIES_MAX} files: name a directory further down, or give --depth")
        return [(name, _stat_or_error(self._session, _below(path, name))) for name in names]

    @contextmanager
    def inside(self, path: str, found: StatReply) -> Iterator[None]:
        """Be in a directory. Raises CallError (ELOOP) where it is one of those above it: no kernel has such a tree."""
        if found.qid in self._above:
            raise CallError(ELOOP, f"{path} is one of the directories that it lies in: the server makes its tree up")
        self._above.add(found.qid)
        try:
            yield
        finally:
            self._above.discard(found.qid)


def tree(session: Session, path: str, depth: int, as_json: bool) -> None:
    """The tree below a path, as this session may see it."""
    root, walk = session.stat(path), _Walk(session)
    if as_json:
        _print_json({"name": root.name or "/", **_described(root), **_children(walk, path, root, depth)})
        return
    from rich.console import Console  # noqa: PLC0415  # a tenth of a second that the other commands need not wait
    from rich.tree import Tree  # noqa: PLC0415

    drawn = Tree(_label(path if path.startswith("/") else f"/{path}", root))
    _draw(walk, path, root, depth, drawn)
    Console(soft_wrap=True, highlight=False).print(drawn)


def _children(walk: _Walk, path: str, found: StatReply, depth: int) -> dict[str, Any]:
    if not found.is_dir or depth == 0:
        return {}
    with walk.inside(path, found):
        entries = walk.entries(path, found)
        if entries is None:
            return {"children": None}
        children = []
        for name, entry in entries:
            deeper = {} if isinstance(entry, CallError) else _children(walk, _below(path, name), entry, depth - 1)
            children.append({"name": name, **_described(entry), **deeper})
        return {"children": children}


def _draw(walk: _Walk, path: str, found: StatReply, depth: int, drawn: "Tree") -> None:
    if not found.is_dir:
        return
    if depth == 0:
        drawn.add("…")
        return
    with walk.inside(path, found):
        entries = walk.entries(path, found)
        if entries is None:
            drawn.add("(its names may not be read)", style="dim")
            return
        for name, entry in entries:
            branch = drawn.add(_label(name, entry))
            if isinstance(entry, StatReply):
                _draw(walk, _below(path, name), entry, depth - 1, branch)


def _label(name: str, found: StatReply | CallError) -> "Text":
    from rich.text import Text  # noqa: PLC0415

    if isinstance(found, CallError):
        return Text.assemble((plain(name), "dim"), (f"  {found.code}", "dim red"))
    style = {"directory": "bold blue", "service": "green", "program": "cyan", "resident": "cyan"}[found.kind]
    facts = f"  {mode_of(found)} {plain(found.user)}:{plain(found.group)}"
    text = Text.assemble((plain(name), style), (facts, "dim"))
    if not found.is_dir:
        text.append(f"  {found.kind}", "dim")
        if not found.live:
            text.append("  nobody serves it", "yellow")
    return text
