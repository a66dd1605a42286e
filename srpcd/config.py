"""The configuration: `/etc/srpc/srpcd.toml`, all keys optional, checked once, frozen.

A wrong key, type or value is refused with the file, the key and the reason (`ConfigError`); nothing is guessed.
"""

import copy
import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0.001, le=7 * 86400)]
Interval = Annotated[float, msgspec.Meta(ge=0.1, le=7 * 86400)]
"""Seconds between two of what costs something each time: much less, and the daemon would do nothing else."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

MEMORY_MIN, MEMORY_MAX = 16 << 20, 1 << 50
"""Bytes: what a user's worker and one small program need to get anywhere, and more than there is anywhere."""

GATE_BYTES, CONNECTION_BYTES = 64 << 20, 256 << 10
"""Bytes of a gate without connections, with room, and at most for one connection beside the gate's budget."""

GATE_MEMORY_MIN = 64 << 20
"""Bytes: a user who takes all that a gate gives to one leaves room for a call of another user of the largest size."""


RUNTIME_MAX = 107 - len("/srpc.sock")
"""Bytes of paths.runtime: sockaddr_un holds 108, one of them for the NUL at the end."""

CONNECTIONS_MAX = 12_288
"""Connections of one gate: it may have 16,384 descriptors, and needs two for each worker and some of its own."""


class ConfigError(Exception):
    """The configuration can't be used; the message says which file, which key, and why."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the tables in the file."""


class Paths(Section, frozen=True):
    """Where things are. tree: the endpoints. runtime: local socket and lines. key, certificate: of TLS, PEM files."""

    tree: str = "/srv/rpc"
    runtime: str = "/run/srpc"
    key: str = "/var/lib/srpc/key.pem"
    certificate: str = "/var/lib/srpc/cert.pem"


class Listen(Section, frozen=True):
    """tcp: addresses "host:port" (numeric host, IPv6 in brackets); an empty list: no network. local: the Unix socket."""

    tcp: list[str] = msgspec.field(default_factory=lambda: ["0.0.0.0:7443", "[::]:7443"])
    local: bool = True


class Authentication(Section, frozen=True):
    """Who may authenticate over the network, and how long that is good for.

    allow: accounts that are let in though they are system accounts (uid below `uid_min`) or have no valid shell.
    afid_age: seconds an accepted afid is good for new attaches. session_age: seconds a session lives at most.
    refresh: seconds between two looks at the accounts of users with afids and sessions. refusal: a refusal is answered this
    many seconds (or a multiple) after the answer that it refuses. peer_groups: which groups the mechanism `peer` gives:
    "process", those of the account that the connecting process has too; "account", all of the account's. peer_names:
    accounts that a process may name by `peer` though another account comes first for their uid.
    """

    pam_service: str = "srpcd"
    allow: list[str] = []
    uid_min: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF_FFFE)] = 1000
    timeout: Seconds = 60.0
    afid_age: Seconds = 3600.0
    session_age: Seconds = 86400.0
    refresh: Interval = 120.0
    refusal: Seconds = 2.0
    peer_groups: Annotated[str, msgspec.Meta(pattern="^(process|account)$")] = "process"
    peer_names: list[str] = []


class Limits(Section, frozen=True):
    """How much of everything. Times in seconds.

    connections: those on which a user has authenticated or that serve, of the network and of the local socket each.
    strangers: the others, which come on top. What happens when there is one more is in `srpcd.monitor.admission`.
    per_address: of one IPv4 address, IPv6 /64 or local uid; all of 127.0.0.0/8 and ::1 is one address.
    outstanding: requests of one connection.
    lines_per_worker, workers: of the whole daemon. buffer: bytes that may wait for one slow reader before it is no
    longer read for. stall: whoever takes nothing for so long, or stops in the middle of a message, is disconnected.
    pace: bytes per second; whoever sends a large message, or takes what waits, more slowly for longer than `stall` is
    disconnected. memory: bytes that one gate may hold of large messages and of what waits, a number or a string as in
    `users.memory`; a user gets as much of it as is still free.
    """

    connections: Count = 1024
    connections_per_address: Count = 256
    strangers: Count = 256
    strangers_per_address: Count = 64
    workers: Count = 1024
    lines_per_worker: Count = 256
    outstanding: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1024
    programs_per_worker: Count = 32
    handshake_timeout: Seconds = 10.0
    authentication_timeout: Seconds = 60.0
    idle_timeout: Seconds = 900.0
    call_timeout: Seconds = 60.0
    worker_idle: Seconds = 60.0
    resident_idle: Seconds = 300.0
    drain: Seconds = 10.0
    stall: Seconds = 20.0
    buffer: Annotated[int, msgspec.Meta(ge=65536, le=1 << 30)] = 4 * 1024 * 1024
    pace: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] = 16 * 1024
    memory: int | str = "256M"


class Users(Section, frozen=True):
    """What all workers and programs of one user may take together, where systemd has delegated control groups to the daemon.

    cgroups: whether to use them: false only for a unit without `Delegate=`. memory: bytes, a number or a string with K, M or
    G behind the number (powers of 1024); they get no swap. tasks: processes and threads. cpu_weight: as CPUWeight= of
    systemd, against other users (the daemon's own processes have 1000).
    """

    cgroups: bool = True
    memory: int | str = "512M"
    tasks: Annotated[int, msgspec.Meta(ge=8, le=4_194_304)] = 256
    cpu_weight: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100


class Log(Section, frozen=True):
    """format: "text" or "json" lines, on standard error. Two bounds hold for what peers cause (`srpcd.lograte`).

    lines_per_minute: of one kind and origin. The default leaves in the log what tools that count failed logins look for
    (some five in some minutes), and bounds one origin to about 10 KiB for each kind in a minute. bytes_per_second: of all
    origins together; the default is 2.6 GiB in a day.
    """

    format: Annotated[str, msgspec.Meta(pattern="^(text|json)$")] = "text"
    level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"
    lines_per_minute: Count = 60
    bytes_per_second: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)] = 32768


class Config(Section, frozen=True):
    """All of it.

    gate_user, local_gate_user: the accounts that the gates of the network and of the local socket run as; two, so that
    neither can touch the other (ignored in personal mode). program_path: PATH of programs.
    """

    paths: Paths = Paths()
    listen: Listen = Listen()
    authentication: Authentication = Authentication()
    limits: Limits = Limits()
    users: Users = Users()
    log: Log = Log()
    gate_user: str = "_srpcd"
    local_gate_user: str = "_srpcl"
    program_path: str = "/usr/local/bin:/usr/bin:/bin"


def default_file(personal: bool) -> Path:
    """The file that is read when none is named."""
    if not personal:
        return Path("/etc/srpc/srpcd.toml")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "srpc/srpcd.toml"


def personal_paths() -> dict[str, str]:
    """Defaults of `[paths]` for a daemon that a user runs for himself."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "srpc"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return {
        "tree": str(data / "tree"),
        "runtime": str(Path(runtime) / "srpc") if runtime else str(data / "run"),
        "key": str(data / "key.pem"),
        "certificate": str(data / "cert.pem"),
    }


def load(file: Path | None, overrides: list[str], personal: bool) -> Config:
    """Read and check.

    file: the file to read, which must then exist; None: the default file, if it is there.
    overrides: `"section.key=value"` in TOML syntax, stronger than the file (a bare word is taken as a string).
    personal: whose defaults to take.
    Raises ConfigError.
    """
    source = file or default_file(personal)
    table: dict[str, Any] = {}
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if file is not None:
            raise ConfigError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise ConfigError(f"{source}: {fault}") from None
    whole = copy.deepcopy(table)
    for override in overrides:
        _override(whole, override)
    try:
        return _converted(whole, personal)
    except ConfigError as fault:
        of_the_file = not overrides or str(fault) == _fault_of(table, personal)
        culprit = str(source) if of_the_file else "command line: --set"
        raise ConfigError(f"{culprit}: {fault}") from None


def _fault_of(table: dict[str, Any], personal: bool) -> str:
    """What is wrong with the file alone; empty if nothing is."""
    try:
        _converted(table, personal)
    except ConfigError as fault:
        return str(fault)
    return ""


def _converted(table: dict[str, Any], personal: bool) -> Config:
    """Checked. Raises ConfigError, which does not say where it stands."""
    if personal and isinstance(table.setdefault("paths", {}), dict):
        table["paths"] = personal_paths() | table["paths"]
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as fault:
        raise ConfigError(_place(str(fault))) from None
    except UnicodeEncodeError:  # lone surrogates: the file is UTF-8
        raise ConfigError("holds a byte that is not UTF-8") from None
    _check(config)
    return config


def _override(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"command line: {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"command line: {override!r}: {key} is not a table")
        table = inner
    table[keys[-1]] = value


def _place(fault: str) -> str:
    """msgspec's `Expected int, got str - at `$.limits.workers`` with the key in front."""
    reason, at, place = fault.partition(" - at `$.")
    return f"{place.rstrip('`')}: {reason}" if at else reason


def _check(config: Config) -> None:
    for name in Paths.__struct_fields__:
        path = getattr(config.paths, name)
        if not os.path.isabs(path) or "\0" in path:
            raise ConfigError(f"paths.{name}: {path!r} is not an absolute path")
    if config.listen.local and len(os.fsencode(config.paths.runtime)) > RUNTIME_MAX:
        raise ConfigError(f"paths.runtime: over {RUNTIME_MAX} bytes, with which srpc.sock in it can't be bound")
    for address in config.listen.tcp:
        try:
            tcp_address(address)
        except ValueError as fault:
            raise ConfigError(f"listen.tcp: {address!r}: {fault}") from None
    if not config.listen.tcp and not config.listen.local:
        raise ConfigError("listen: neither tcp nor local: nothing to listen on")
    service = config.authentication.pam_service
    if not service or "/" in service or "\0" in service:
        raise ConfigError(f"authentication.pam_service: {service!r} is not the name of a file in /etc/pam.d")
    if config.gate_user == config.local_gate_user:
        raise ConfigError("local_gate_user: the two kinds of gates need accounts of their own")
    for name, value, least in (
        ("users.memory", config.users.memory, MEMORY_MIN),
        ("limits.memory", config.limits.memory, GATE_MEMORY_MIN),
    ):
        try:
            size(value, least)
        except ValueError as fault:
            raise ConfigError(f"{name}: {value!r}: {fault}") from None
    if config.limits.connections + config.limits.strangers > CONNECTIONS_MAX:
        raise ConfigError(f"limits.connections: over {CONNECTIONS_MAX} with limits.strangers, and a gate can't have more")
    if "root" in config.authentication.allow:
        raise ConfigError("authentication.allow: root can't be allowed: no call is ever made as root")


def tcp_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port". Raises ValueError with the reason."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError("not of the form host:port, with a port from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    return str(ipaddress.IPv4Address(host)), int(port)


def size(value: int | str, least: int = MEMORY_MIN) -> int:
    """The bytes that `users.memory` or `limits.memory` stands for. Raises ValueError with the reason."""
    number, unit = (value[:-1], value[-1:]) if isinstance(value, str) and value[-1:] in "KMG" else (str(value), "")
    if not number.isdecimal() or not number.isascii() or len(number) > 16:
        raise ValueError("not a number of bytes, nor one with K, M or G behind it")
    found = int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]
    if not least <= found <= MEMORY_MAX:
        raise ValueError(f"not from {least >> 20}M, which is needed at least, to {MEMORY_MAX >> 30}G")
    return found


def gates_memory(limits: Limits) -> int:
    """Bytes that all gates together may come to: the limit of their control group.

    A gate keeps its budget. Each connection costs CONNECTION_BYTES beside it: TLS, fids, what has come of a message. Four
    gates: two kinds, and as many again that serve their last connections after a reload.
    """
    connections = limits.connections + limits.strangers
    return 4 * (GATE_BYTES + size(limits.memory, GATE_MEMORY_MIN) + connections * CONNECTION_BYTES)


def within(limits: Limits, descriptors: int) -> Limits:
    """`limits` with no more connections than a monitor with so many descriptors can keep.

    It keeps one for each connection. A sixteenth of all is for the authenticated ones of a gate, and as much for the others:
    a quarter for two gates. Half is for endpoints (`srpcd.monitor.lines`), and the last quarter for workers and logins. So
    connections can't take the descriptors that a login needs.
    """
    each = max(1, descriptors // 16)
    bounded = {"connections": min(limits.connections, each), "strangers": min(limits.strangers, each)}
    return msgspec.structs.replace(limits, **bounded)


def renew(old: Config, new: Config) -> tuple[Config, list[str]]:
    """What a running daemon can take over of a configuration that was read again.

    Returns `new` with what only a restart can change left as it is in `old`; and the names of the keys in which they differ.
    """
    users = msgspec.structs.replace(new.users, cgroups=old.users.cgroups)
    fixed = {name: getattr(old, name) for name in ("paths", "listen", "gate_user", "local_gate_user")}
    renewed = msgspec.structs.replace(new, users=users, **fixed)
    return renewed, _differing(msgspec.to_builtins(renewed), msgspec.to_builtins(new))


def _differing(one: dict[str, Any], other: dict[str, Any], place: str = "") -> list[str]:
    names = []
    for key, value in one.items():
        if isinstance(value, dict):
            names += _differing(value, other[key], f"{place}{key}.")
        elif value != other[key]:
            names.append(place + key)
    return names


def encode(config: Config) -> bytes:
    """As JSON, for a gate."""
    return msgspec.json.encode(config)


def decode(data: bytes) -> Config:
    """What `encode` made."""
    return msgspec.json.decode(data, type=Config)
