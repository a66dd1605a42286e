"""A real srpcd, started as an administrator would start it, and looked at from outside."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.realm import accounts, labels, place, processes
from tests.realm.processes import Process

READY_TIMEOUT = 20.0
"""Seconds for a start: a key is made, two interpreters load OpenSSL, on a machine that does other things too."""

_numbers = itertools.count(1)
_running: "list[Daemon]" = []


class DaemonFault(AssertionError):
    """The daemon did not do as it should; the message ends with its log."""


class Daemon:
    """One srpcd with a directory, a tree, a configuration and a log of its own.

    config: tables of the configuration, `{"limits": {"workers": 2}}`, over those that fit a test: an ephemeral port on
    loopback, JSON log lines, level debug. user: an account to run it in personal mode; None: as whoever runs this.
    programs: scripts to run in the place of the real ones, by role ("gate", "worker", "authenticate"); each is started
    as the real one is, by `python -I -S SCRIPT`, with the directory of srpcd in front of the other arguments.
    environment: added to the daemon's own. directory: where all of it lies, for a second daemon in the place of a first.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        user: str | None = None,
        programs: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._place = place.enter()
        self.directory = directory or self._place.root / f"d{next(_numbers)}"
        self.tree = self.directory / "rpc"
        self.runtime = self.directory / "run"
        self.local = self.runtime / "srpc.sock"
        self.lines = self.runtime / "lines"
        self.file = self.directory / "srpcd.toml"
        self.log = self.directory / "log"
        self.user = user
        self.tcp: tuple[str, int] = ("", 0)
        self.pin = ""
        self._environment = dict(environment or {})
        self._programs = {role: self._copied(script) for role, script in (programs or {}).items()}
        self._process: subprocess.Popen[bytes] | None = None
        self._left: list[Process] = []
        kinds = {self.directory: labels.TESTS, self.tree: "srpc_tree_t"}
        if labels.ON and user is None:
            # On a system these are there, with their labels, before the daemon is started for the first time.
            kinds |= {self.runtime: "srpc_runtime_t", self.directory / "keys": "srpc_var_lib_t"}
        for directory_, kind in kinds.items():
            place.make_directories(directory_)
            labels.label(directory_, kind)
        if user is not None:
            who = accounts.account(user)
            for directory_ in (self.directory, self.tree):
                os.chown(directory_, who.uid, who.gid)
        self.configure(config or {})

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the configuration file: the test's usual one, with these tables and keys over it."""
        keys = self.directory / "keys"
        tables: dict[str, dict[str, Any]] = {
            "paths": {
                "tree": str(self.tree),
                "runtime": str(self.runtime),
                "key": str(keys / "key.pem"),
                "certificate": str(keys / "cert.pem"),
            },
            "listen": {"tcp": ["127.0.0.1:0"]},
            "log": {"format": "json", "level": "debug", "lines_per_minute": 1_000_000, "bytes_per_second": 1 << 30},
        }
        top = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
        for name, table in config.items():
            if isinstance(table, Mapping):
                tables[name] = tables.get(name, {}) | dict(table)
        lines = [f"{name} = {_toml(value)}" for name, value in top.items()]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        self.file.write_text("\n".join([*lines, ""]), encoding="utf-8")
        self.file.chmod(0o644)
        labels.label(self.file, "srpc_conf_t")

    @property
    def address(self) -> str:
        """host:port of the first TLS listener."""
        return f"{self.tcp[0]}:{self.tcp[1]}"

    @property
    def pid(self) -> int:
        """Of the monitor."""
        if not self._process:
            raise DaemonFault("it was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the monitor runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> "Daemon":
        """Start it and wait until it serves. May be called again after `stop` or `kill`. Raises DaemonFault."""
        self.begin()
        try:
            ready = self.wait_event("ready", READY_TIMEOUT)
        except BaseException:
            self._end(signal.SIGKILL, 5)
            raise
        host, _, port = str(ready.get("tcp", ":0")).split(",")[0].rpartition(":")
        self.tcp, self.pin = (host, int(port)), str(ready.get("pin", ""))
        return self

    def begin(self) -> None:
        """Start it, and do not wait."""
        self.log.write_bytes(b"")
        stream = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        # Only the monitor gets the path: what it starts has to find its own.
        environment = {"PYTHONPATH": os.pathsep.join(self._place.path)} | self._environment
        command = [*self._start_command(), "--config", str(self.file)]
        try:
            self._process = processes.popen_as(self.user, command, env=environment, stdout=stream, stderr=stream)
        finally:
            os.close(stream)
        processes.forget(self._process)  # it is this object that sees to its end
        _running.append(self)

    def _copied(self, script: Path) -> str:
        """A script where other users can read it."""
        target = self._place.root / "programs" / script.name
        place.install(target, script.read_text(encoding="utf-8"), 0o644)
        return str(target)

    def _start_command(self) -> list[str]:
        if labels.ON and self.user is None:
            return ["runcon", labels.DAEMON, *self._labelled_program()]
        return [place.PYTHON, "-P", "-s", *self._start_code()]

    def _labelled_program(self) -> list[str]:
        """The way into the daemon's domain: the installed program, or one with our start code and the same label."""
        kind, code = self._start_code()
        if kind == "-m":
            return [labels.PROGRAM]
        program = place.install(self.directory / "srpcd", f"#!/usr/lib/srpc/bin/python3 -I\n{code}", 0o755)
        labels.label(program, "srpcd_exec_t")
        return [str(program)]

    def _start_code(self) -> list[str]:
        if not self._programs:
            return ["-m", "srpcd"]
        code = (
            "import sys\n"
            "from srpcd import __main__ as daemon\n"
            "from srpcd.monitor import launch\n"
            "table = launch.launch_table(daemon.CODE, daemon.library_paths())\n"
            f"for role, script in {self._programs!r}.items():\n"
            "    command = (*table[role].command[:-1], script, daemon.CODE)\n"
            "    table[role] = table[role]._replace(command=command)\n"
            "sys.exit(daemon.main(None, table))\n"
        )
        return ["-c", code]

    def log_text(self) -> str:
        """All that it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def events(self, event: str = "", **fields: object) -> list[dict[str, Any]]:
        """The logged events so far, of one kind and with these fields where they are given."""
        found = []
        for line in self.log_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a traceback, or half a line
            if event in ("", entry["event"]) and all(entry.get(key) == value for key, value in fields.items()):
                found.append(entry)
        return found

    def wait_event(self, event: str, timeout: float = 5, count: int = 1, **fields: object) -> dict[str, Any]:
        """The `count`-th such event, when it is there. Raises DaemonFault after `timeout` seconds, or when it ends."""
        deadline = time.monotonic() + timeout * processes.PACE
        while len(found := self.events(event, **fields)) < count:
            ended = not self.running
            if (ended and len(self.events(event, **fields)) < count) or time.monotonic() > deadline:
                what = f"ended with status {self.wait(0)}" if ended else f"has not said so within {timeout} s"
                raise DaemonFault(f"{event} {fields}: srpcd {what}; its log:\n{self.log_text()}")
            time.sleep(0.01)
        return found[count - 1]

    def processes(self, role: str = "", detail: str = "") -> list[Process]:
        """Its processes, the monitor too, of one role and detail (see `Process`) where they are given."""
        monitor = processes.look(self.pid) if self.running else None
        found = []
        for each in [*([monitor] if monitor else []), *processes.descendants(self.pid)]:
            known = next((role_ for role_, script in self._programs.items() if script in each.command), each.role)
            if known == "monitor" and each.pid != self.pid:
                known = "child"  # a fork that has not become anything else: a probe
            found.append(dataclasses.replace(each, role=known))
        return [each for each in found if role in ("", each.role) and detail in ("", each.detail)]

    def wait(self, timeout: float = 20) -> int:
        """Wait for its end; its status."""
        if not self._process:
            raise DaemonFault("it was not started")
        return self._process.wait(timeout * processes.PACE)

    def stop(self, timeout: float = 20) -> None:
        """SIGTERM, as the system's manager would; and look that nothing is left. Raises DaemonFault where something is."""
        self._end(signal.SIGTERM, timeout)
        faults = [] if self.wait(0) == 0 else [f"status {self.wait(0)}"]
        if self.local.exists():
            faults.append(f"{self.local} is still there")
        if self.lines.is_dir() and (left := [str(path) for path in self.lines.rglob("*")]):
            faults.append(f"lines are left: {left}")
        if faults or self._left:
            raise DaemonFault(f"after SIGTERM: {faults} {self._left}; its log:\n{self.log_text()}")

    def kill(self, timeout: float = 5) -> None:
        """SIGKILL for the monitor. Raises DaemonFault where a process of its outlives it by `timeout` seconds."""
        self._end(signal.SIGKILL, timeout)
        if self._left:
            raise DaemonFault(f"after SIGKILL: {self._left}")

    def _end(self, number: signal.Signals, timeout: float) -> None:
        self._left = []
        if not self._process:
            return
        before = processes.descendants(self._process.pid)
        strangers = {each.pid for each in processes.descendants(os.getpid())}
        if self.running:
            self._process.send_signal(number)
        try:
            self._process.wait(timeout * processes.PACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DaemonFault(f"does not end within {timeout} s after {number.name}; its log:\n{self.log_text()}") from None
        finally:
            if self in _running:
                _running.remove(self)
            # A process that came in between became ours when its parent ended (`adopt_orphans`).
            ours = [each for each in processes.descendants(os.getpid()) if each.parent == os.getpid()]
            before += [each for each in ours if each.pid not in strangers]
            allowed = timeout if number is signal.SIGKILL else 1.0
            processes.until(lambda: not any(map(processes.alive, before)), allowed)
            self._left = [each for each in before if processes.alive(each)]
            for each in self._left:
                os.kill(each.pid, signal.SIGKILL)

    def __enter__(self) -> "Daemon":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        elif self.running:
            self._end(signal.SIGKILL, 5)


def running() -> list[Daemon]:
    """Daemons that were started and not ended."""
    return list(_running)


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
