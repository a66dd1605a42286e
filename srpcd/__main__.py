"""`srpcd`: reads the configuration, opens what has to be opened, gives up what is not needed, and runs the monitor."""

import argparse
import asyncio
import fcntl
import os
import pwd
import resource
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from srpcd import config as configuration
from srpcd import confine, selinux
from srpcd.config import Config, ConfigError
from srpcd.log import Log, is_journal
from srpcd.lograte import LogRate
from srpcd.monitor import cgroups, launch
from srpcd.monitor.cgroups import Groups
from srpcd.monitor.faults import StartFault
from srpcd.monitor.forked import in_child
from srpcd.monitor.front import Front, Terms
from srpcd.monitor.launch import Identity, Table
from srpcd.monitor.listeners import address_of, listen
from srpcd.monitor.monitor import Monitor
from srpcd.monitor.pamsession import DIRECTORIES
from srpcd.monitor.service import Renewal, Service
from srpcd.monitor.systemd import Manager

VERSION = "0.1.0"
CODE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
        return _check(config, personal)
    rate = LogRate(config.log.lines_per_minute, config.log.bytes_per_second)
    log = Log(2, config.log.format, config.log.level, is_journal(2, os.environ), rate)

    def load() -> Config:
        return configuration.load(options.config, options.set, personal)

    try:
        asyncio.run(_serve(config, load, log, table or launch.launch_table(CODE, library_paths()), personal))
    except (StartFault, OSError) as fault:
        log.event("error", "stop", reason=str(fault))
        return 1
    except Exception as fault:
        log.event("error", "stop", reason=f"a fault of the daemon itself: {fault!r}")
        raise
    return 0


def _check(config: Config, personal: bool) -> int:
    """Say whether a start with this would succeed, and what would not be as it was meant. Returns the exit status."""
    doubts = []
    if not personal:
        try:
            accounts = [_gate_account(name) for name in (config.gate_user, config.local_gate_user)]
        except StartFault as fault:
            sys.stderr.write(f"srpcd: {fault}\n")
            return 2
        doubts = [
            f"gate_user, local_gate_user: {each.pw_name!r} is an account that people use: its other processes can touch the "
            f"daemon's; network processes need accounts of their own"
            for each in accounts
            if each.pw_uid >= config.authentication.uid_min and os.path.basename(each.pw_shell) not in ("nologin", "false")
        ]
    service = config.authentication.pam_service.lower()  # as libpam has it
    if not any(os.path.exists(os.path.join(directory, service)) for directory in DIRECTORIES):
        doubts.append(
            f"authentication.pam_service: no file {service!r} in {' or '.join(DIRECTORIES)}: PAM goes by the one "
            f"for 'other', and without that refuses every login"
        )
    with suppress(OSError):  # not there: it is made at the start
        if os.stat(config.paths.tree).st_mode & stat.S_IWOTH:
            doubts.append(f"paths.tree: everybody may write in {config.paths.tree}, and so put endpoints there")
    sys.stderr.writelines(f"srpcd: warning: {each}\n" for each in doubts)
    sys.stdout.write("srpcd: the configuration is good\n" if not doubts else "srpcd: the configuration can be used\n")
    return 0


def library_paths() -> list[str]:
    """Directories on sys.path beyond the standard library and the code: what gates need for OpenSSL."""
    standard = {os.path.realpath(each) for each in (os.path.dirname(os.__file__), CODE)}
    standard |= {os.path.join(each, "lib-dynload") for each in list(standard)}
    paths = (os.path.realpath(each) for each in sys.path if each)
    return [each for each in dict.fromkeys(paths) if os.path.isdir(each) and each not in standard]


async def _serve(config: Config, load: Callable[[], Config], log: Log, table: Table, personal: bool) -> None:
    os.umask(0o022)
    manager = Manager(os.environ)  # first of all: what it passes must not get into a child
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would reap our children
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: log.peer_event(
            "daemon", "error", "warning", text=f"{context.get('message')}: {context.get('exception')!r}"
        )
    )
    own = Identity(os.getuid(), os.getgid(), tuple(sorted(os.getgroups())), "" if personal else _own_context())
    users = {"tls": config.gate_user, "local": config.local_gate_user}
    gates = {kind: own if personal else _gate_identity(user, own.context) for kind, user in users.items()}
    groups = _groups(config, manager, log, personal)
    _prepare(config, own, personal)
    log.event(
        "info", "start", version=VERSION, mode="personal" if personal else "system", pid=os.getpid(), tree=config.paths.tree
    )
    if not personal:
        await _check_reachable(table, gates["tls"])
    terms = {"tls": await _terms("tls", config)} if config.listen.tcp else {}
    listeners = listen(config.listen, os.path.join(config.paths.runtime, "srpc.sock"), manager, personal)
    if listeners.warning:
        log.event("warning", "warning", text=listeners.warning)
    if listeners.local:
        terms["local"] = await _terms("local", config)
    sockets = {"tls": listeners.tcp, "local": listeners.local}
    for kind in terms:
        for sock in sockets[kind]:
            log.event("info", "listen", gate=kind, address=address_of(sock))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    confine.make_undumpable()
    if not personal:
        launch.keep_capabilities()
        confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)  # not in personal mode: PAM would need its set-gid helper
    monitor = Monitor(config, log, table, own, frozenset(each.uid for each in gates.values()), personal, groups)

    async def read() -> Renewal:
        renewed, fixed = configuration.renew(monitor.config, load())
        return Renewal(renewed, fixed, {kind: await _terms(kind, renewed) for kind in terms})

    fronts = [Front(monitor, kind, gates[kind], sockets[kind], its) for kind, its in terms.items()]
    try:
        await Service(monitor, fronts, manager, read).run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a second one would end us before the last line
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        if listeners.remove:
            with suppress(FileNotFoundError):
                os.unlink(listeners.remove)


def _groups(config: Config, manager: Manager, log: Log, personal: bool) -> Groups | None:
    """Control groups, where systemd runs us as a service of the system: there they must work, or be switched off."""
    if personal or not manager.there or not os.path.isdir("/run/systemd/system"):
        log.event("info", "cgroups", state="not used", reason="not a service of systemd's")
    elif not config.users.cgroups:
        log.event("warning", "cgroups", state="not used", reason="users.cgroups is false")
    else:
        return Groups(cgroups.delegated(), config)
    return None


async def _terms(kind: str, config: Config) -> Terms:
    """What gates of this kind are started with: key and certificate as they are now, made if they are missing."""
    if kind == "local":
        return Terms(config)
    paths = config.paths.key, config.paths.certificate
    pin = await in_child(_make_keys, *paths)
    files = tuple(os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths)
    facts = [os.fstat(fd) for fd in files]
    return Terms(config, files, pin, tuple((each.st_dev, each.st_ino, each.st_size, each.st_ctime_ns) for each in facts))


def _own_context() -> str:
    try:
        return selinux.own_context()
    except selinux.Misplaced as fault:
        raise StartFault(str(fault)) from None


def _gate_identity(user: str, own_context: str) -> Identity:
    entry = _gate_account(user)
    return Identity(entry.pw_uid, entry.pw_gid, (), selinux.with_domain(own_context, selinux.GATE))


def _gate_account(user: str) -> pwd.struct_passwd:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise StartFault(
            f"the account {user!r}, as which network processes run, does not exist; make it with "
            f"'useradd --system --no-create-home --shell /usr/sbin/nologin {user}'"
        ) from None
    if entry.pw_uid == 0:
        raise StartFault(f"gate_user, local_gate_user: {user!r} is root; network processes need accounts of their own")
    return entry


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


async def _check_reachable(table: Table, gate: Identity) -> None:
    """Gates and workers run as other users: say which directory is closed to them, rather than fail at every start."""
    files = {word for program in (table["gate"], table["worker"]) for word in program.command if os.path.isabs(word)}
    for path in sorted(files):
        closed = await in_child(_first_closed, path, gate)
        if closed:
            raise StartFault(
                f"{closed} is closed to other users, and the daemon's processes have to read {path} as such: open it "
                f"(chmod o+x for a directory, o+r for a file), or install srpc elsewhere"
            )


def _first_closed(path: str, gate: Identity) -> str:
    if not os.path.exists(path):
        raise StartFault(f"{path} is missing: the installation is not complete")
    os.setgroups([])
    os.setresgid(gate.gid, gate.gid, gate.gid)
    os.setresuid(gate.uid, gate.uid, gate.uid)
    launch.check_undumpable()
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


if __name__ == "__main__":
    sys.exit(main())
