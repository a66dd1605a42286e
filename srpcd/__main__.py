"""`srpcd`: reads the configuration, opens what has to be opened, gives up what is not needed, and runs the monitor."""

import argparse
import asyncio
import fcntl
import os
import pwd
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from srpcd import config as configuration
from srpcd import confine
from srpcd.config import Config, ConfigError
from srpcd.log import Log
from srpcd.monitor import connections, launch
from srpcd.monitor.launch import Identity, Table
from srpcd.monitor.monitor import Monitor
from srpcd.monitor.service import Front, Service

VERSION = "0.1.0"
CODE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class StartFault(Exception):
    """The daemon can't start; the message says why and what to do."""


def main(arguments: list[str] | None = None, table: Table | None = None) -> int:
    """Run the daemon until it is told to end. Returns the exit status: 0, 1 could not start, 2 bad configuration.

    arguments: of the command line. table: what to exec for gates and workers, in the place of the real programs.
    """
    parser = argparse.ArgumentParser("srpcd", description="sRPC daemon: remote procedure calls that the kernel decides")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: /etc/srpc/srpcd.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--check", action="store_true", help="check the configuration, start nothing")
    parser.add_argument("--version", action="version", version=f"srpcd {VERSION}")
    options = parser.parse_args(arguments)
    personal = os.getuid() != 0
    try:
        config = configuration.load(options.config, options.set, personal)
    except ConfigError as fault:
        sys.stderr.write(f"srpcd: {fault}\n")
        return 2
    if options.check:
        sys.stdout.write("srpcd: the configuration is good\n")
        return 0
    log = Log(2, config.log.format, config.log.level)
    try:
        asyncio.run(_serve(config, log, table or launch.launch_table(CODE, library_paths()), personal))
    except (StartFault, OSError) as fault:
        log.event("error", "stop", reason=str(fault))
        return 1
    except Exception as fault:
        log.event("error", "stop", reason=f"a fault of the daemon itself: {fault!r}")
        raise
    return 0


def library_paths() -> list[str]:
    """Directories on sys.path beyond the standard library and the code: what gates need for OpenSSL."""
    standard = {os.path.realpath(each) for each in (os.path.dirname(os.__file__), CODE)}
    standard |= {os.path.join(each, "lib-dynload") for each in list(standard)}
    paths = (os.path.realpath(each) for each in sys.path if each)
    return [each for each in dict.fromkeys(paths) if os.path.isdir(each) and each not in standard]


async def _serve(config: Config, log: Log, table: Table, personal: bool) -> None:
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would reap our children
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: log.event("error", "warning", text=f"{context.get('message')}: {context.get('exception')!r}")
    )
    own = Identity(os.getuid(), os.getgid(), tuple(sorted(os.getgroups())))
    users = {"tls": config.gate_user, "local": config.local_gate_user}
    gates = {kind: own if personal else _gate_identity(user) for kind, user in users.items()}
    _prepare(config, own, personal)
    log.event(
        "info", "start", version=VERSION, mode="personal" if personal else "system", pid=os.getpid(), tree=config.paths.tree
    )
    if not personal:
        _check_reachable(table, gates["tls"])
    fronts, addresses, pin = [], [], ""
    if config.listen.tcp:
        pin = _in_child(_make_keys, config.paths.key, config.paths.certificate)
        files = tuple(os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (config.paths.key, config.paths.certificate))
        listeners = [_listen(address) for address in config.listen.tcp]
        addresses = [_name(listener) for listener in listeners]
        fronts.append(Front("tls", gates["tls"], listeners, files))
    local = os.path.join(config.paths.runtime, "srpc.sock")
    if config.listen.local:
        fronts.append(Front("local", gates["local"], [connections.listen_local(local, personal)], ()))
    for kind, address in [("tls", each) for each in addresses] + [("local", local)] * config.listen.local:
        log.event("info", "listen", gate=kind, address=address)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    confine.make_undumpable()
    if not personal:
        launch.keep_capabilities()
        confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)  # not in personal mode: PAM would need its set-gid helper
    monitor = Monitor(config, log, table, own, frozenset(each.uid for each in gates.values()), personal)

    def ready() -> None:
        log.event(
            "info", "ready", tcp=",".join(addresses) or None, local=local if config.listen.local else None, pin=pin or None
        )

    try:
        await Service(monitor, fronts, ready).run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one would end us before the last line
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        with suppress(FileNotFoundError):
            os.unlink(local)


def _gate_identity(user: str) -> Identity:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise StartFault(
            f"the account {user!r}, as which network processes run, does not exist; make it with "
            f"'useradd --system --no-create-home --shell /usr/sbin/nologin {user}'"
        ) from None
    if entry.pw_uid == 0:
        raise StartFault(f"gate_user, local_gate_user: {user!r} is root; network processes need accounts of their own")
    return Identity(entry.pw_uid, entry.pw_gid, ())


def _prepare(config: Config, own: Identity, personal: bool) -> None:
    """Make the directories that are ours, and check that nobody else can change them."""
    for path, mode in ((config.paths.runtime, 0o755), (config.paths.tree, 0o755)):
        os.makedirs(path, mode=mode, exist_ok=True)
    runtime = os.stat(config.paths.runtime)
    if runtime.st_uid != own.uid or stat.S_IMODE(runtime.st_mode) & 0o022:
        raise StartFault(
            f"paths.runtime: {config.paths.runtime} must belong to uid {own.uid} and be writable for nobody else "
            f"(it belongs to uid {runtime.st_uid}, mode {stat.S_IMODE(runtime.st_mode):o})"
        )
    lock = os.open(config.paths.runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # held until the daemon ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartFault(f"paths.runtime: another daemon runs in {config.paths.runtime}") from None
    if not personal:
        os.chmod(config.paths.runtime, 0o755)  # noqa: S103  everybody may connect; what is in it has modes of its own


def _check_reachable(table: Table, gate: Identity) -> None:
    """Gates and workers run as other users: say which directory is closed to them, rather than fail at every start."""
    files = {word for program in (table["gate"], table["worker"]) for word in program.command if os.path.isabs(word)}
    for path in sorted(files):
        if not os.path.exists(path):
            raise StartFault(f"{path} is missing: the installation is not complete")
        closed = _in_child(_first_closed, path, gate)
        if closed:
            raise StartFault(
                f"{closed} is closed to other users, and the daemon's processes have to read {path} as such: open it "
                f"(chmod o+x for a directory, o+r for a file), or install srpc elsewhere"
            )


def _first_closed(path: str, gate: Identity) -> str:
    os.setgroups([])
    os.setresgid(gate.gid, gate.gid, gate.gid)
    os.setresuid(gate.uid, gate.uid, gate.uid)
    parts = path.split("/")
    for depth in range(2, len(parts)):
        directory = "/".join(parts[:depth])
        if not os.access(directory, os.X_OK):
            return directory
    return "" if os.access(path, os.R_OK) else path


def _make_keys(key: str, certificate: str) -> str:
    from srpcd import keys  # noqa: PLC0415  in the child only: the root daemon never maps OpenSSL

    keys.ensure(key, certificate)
    return keys.pin(certificate)


def _in_child(work: Callable[..., str], *arguments: object) -> str:
    """What `work(*arguments)` returns, run in a fork that ends with it. Raises StartFault with what it raises."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            answer = "+" + work(*arguments)
        except BaseException as fault:
            answer = f"-{fault}"
        finally:
            os.write(write, answer.encode()[:4096])
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        answer = file.read().decode(errors="replace")
    os.waitpid(pid, 0)
    if not answer.startswith("+"):
        raise StartFault(answer[1:] or "a child of the daemon died at start")
    return answer[1:]


def _listen(address: str) -> socket.socket:
    host, port = configuration.tcp_address(address)
    try:
        return connections.listen_tcp(host, port)
    except OSError as fault:
        raise StartFault(f"listen.tcp: {address}: {fault.strerror}") from None


def _name(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
