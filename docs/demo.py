"""`make demo`: a daemon with throwaway users on loopback, and what the kernel lets them do.

As root: in namespaces of its own (`tests.realm`), so that neither users nor files nor processes are left, which is
checked at the end. As an ordinary user: the same daemon in personal mode, as far as that goes. Everything that is shown
is done, and has to come out as it is told: the exit status is 1 where something did not.
"""

import getpass
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from srpc_client import SrpcError, blocking
from tests import realm

console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 110))  # what is no terminal counts as 80
faults: list[str] = []

CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def scene(title: str, *text: str) -> None:
    """A new part of the story."""
    console.print()
    console.rule(f"[bold]{title}", align="left")
    for line in text:
        console.print(line)


def expect(holds: object, sentence: str) -> None:
    """Something that has to be so."""
    if not holds:
        faults.append(sentence)
    console.print(f"  {'[green]✓[/]' if holds else '[bold red]✗ NOT SO:[/]'} {escape(sentence)}")


def shell(command: str, work: Callable[[], object]) -> None:
    """Show what an administrator would type, and do it."""
    console.print(f"  [bold]#[/] {escape(command)}")
    work()


def listing(directory: Path) -> None:
    """`ls -lR`, without what says nothing here."""
    text = subprocess.run(
        ["ls", "-lR", "--time-style=+", "."], cwd=directory, capture_output=True, text=True, check=True
    ).stdout
    for line in text.splitlines():
        if line and not line.startswith("total "):
            console.print(f"    {escape(line)}")


def call(session: blocking.Session, path: str, payload: str, wanted: str) -> None:
    """One call. wanted: what the reply has to be but for white space, or an errno's name."""
    try:
        found = " ".join(session.call(path, payload.encode(), timeout=10).decode().split())
        shown = f"[green]{escape(found)}[/]"
    except SrpcError as fault:
        found, shown = fault.code, f"[red]{escape(str(fault))}[/]"
    holds = found == wanted
    if not holds:
        faults.append(f"{session.user} calls {path}: {found}, not {wanted}")
    mark = "[green]✓[/]" if holds else f"[bold red]✗ NOT {escape(wanted)}:[/]"
    console.print(f"  {mark} {session.user:5} calls {path:14} {escape(shlex.quote(payload)):11} → {shown}")


def install(daemon: realm.Daemon, name: str, mode: int, group: str = "") -> None:
    """Put an example program into the tree."""
    place = realm.enter()
    text = (
        next(each for each in (place.code / "examples", Path("docs/examples")) if each.is_dir()).joinpath(name).read_text()
    )
    if name == "counter":
        # Here srpc is not installed for the system's Python; the example says what to do on a real host.
        first, _, rest = text.partition("\n")
        text = f"{first}\nimport sys; sys.path[:0] = {place.path!r}\n{rest}"
    path = daemon.tree / "tools" / name
    option = f" -g {group}" if group else ""
    gid = realm.group(group) if group else 0
    shell(f"install -D -m {mode:04o}{option} {name} {path}", lambda: realm.install(path, text, mode, gid=gid))


def announce(daemon: realm.Daemon, user: str | None) -> "subprocess.Popen[bytes]":
    """Start docs/examples/add.py as a service."""
    source = (Path(__file__).parent / "examples/add.py").read_text(encoding="utf-8")
    console.print(f"  [bold]$[/] python3 add.py &                 [dim](as {user or getpass.getuser()})[/]")
    service = realm.popen_as(
        user, realm.python(source), env={"SRPC_ADDRESS": f"unix:{daemon.local}"}, stderr=subprocess.DEVNULL
    )
    event = daemon.wait_event("announce", 10)
    expect(event.get("outcome") == "granted", "the daemon has registered the announcement, after the kernel agreed")
    return service


def srpc(user: str | None, *arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
    """Run the command line tool as a process of its own; what it printed."""
    console.print(f"  [bold]$[/] srpc {escape(shlex.join(arguments))}")
    command = realm.python("from srpc_client.cli import main; sys.argv[0] = 'srpc'; main()", *arguments)
    done = realm.run_as(user, command, input=stdin.encode(), env=env)
    text = done.stdout.decode()
    for line in [*text.splitlines(), *done.stderr.decode().splitlines()]:
        console.print(f"    {escape(line)}")
    return text


def processes(daemon: realm.Daemon, personal: bool) -> None:
    """Who is who."""
    rows = ["pid", "role", "uid", "gid", "groups", "CapEff", "NoNewPrivs"], *(_row(each) for each in daemon.processes())
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        console.print("    " + escape("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))))
    loose = []
    for each in daemon.processes():
        facts = realm.status(each.pid)
        sets = [name for name in CAPABILITIES if not (personal and name == "CapBnd")]
        if each.role != "monitor" and (any(int(facts[name], 16) for name in sets) or facts["NoNewPrivs"] != "1"):
            loose.append(each.pid)
    expect(not loose, "no gate, worker or program has a capability in any set, nor can one of them gain any")


def workers(daemon: realm.Daemon) -> dict[str, int]:
    """Whose workers there are: uid by name."""
    return {each.detail: each.uid for each in daemon.processes("worker")}


def _row(process: realm.Process) -> list[str]:
    facts = realm.status(process.pid)
    role = f"program of {process.uid}" if process.role == "other" else f"{process.role} {process.detail}"
    groups = ",".join(map(str, process.groups)) or "-"
    return [str(process.pid), role, str(process.uid), str(process.gid), groups, facts["CapEff"], facts["NoNewPrivs"]]


def in_the_realm() -> None:
    """The whole story, as root."""
    daemon = realm.Daemon({"limits": {"drain": 3.0}}, directory=realm.enter().root)
    service = None
    try:
        scene("A daemon", "Started as on any host, in a mount namespace of its own with throwaway users.")
        daemon.start()
        console.print(f"  srpcd serves {daemon.tree} on {daemon.address} and {daemon.local}")
        console.print(f"  pin of its key, made just now: {daemon.pin}")
        expect(daemon.pin.startswith("sha256:"), "clients pin this key: they send nothing to anybody else")
        for name in ("alice", "bob", "svc"):
            who = realm.account(name)
            console.print(f"  {name:6} uid {who.uid}, groups {', '.join((name, *who.groups))}")

        scene("Programs: an executable in the tree can be called")
        install(daemon, "wc", 0o755)
        install(daemon, "upper", 0o750, "staff2")
        install(daemon, "counter", 0o1755)

        scene(
            "A service: announces an endpoint, where the kernel lets it", "A directory for the members of calc, svc's own:"
        )
        calc, svc = daemon.tree / "calc", realm.account("svc")

        def directory() -> None:
            calc.mkdir()
            os.chown(calc, svc.uid, realm.group("calc"))
            calc.chmod(0o2750)

        shell(f"install -d -m 2750 -o svc -g calc {calc}", directory)
        service = announce(daemon, "svc")

        scene("The tree, as ls shows it: there is no other list of who may do what")
        listing(daemon.tree)

        scene("The tree, as its users see it", "Each by a process of his own, over TLS, with his password.")
        for user in ("alice", "bob"):
            console.print(f"  [bold]{user}[/]")
            text = see_tree(daemon, user)
            expect(("upper" in text, "wc" in text) == (True, True), f"{user} sees the programs")
            expect(
                ("add" in text) == (user == "alice"),
                f"{user} {'sees' if user == 'alice' else 'does not see'} what is in calc",
            )

        with blocking.connect(daemon.address, pins=daemon.pin) as connection:
            alice, bob = (connection.login(name, password=realm.password(name)) for name in ("alice", "bob"))
            calls(alice, bob)
            changes(daemon, alice, bob)

            scene(
                "The processes: a caller's worker is the caller",
                "The monitor alone is root, and reads nothing from the net.",
            )
            wanted = {name: realm.account(name).uid for name in ("alice", "bob")}
            found, deadline = workers(daemon), time.monotonic() + 10
            while found != wanted and time.monotonic() < deadline:
                # Whose permission was taken away has lost his worker with its line; his next call has another one.
                for session in (alice, bob):
                    with suppress(SrpcError):
                        session.call("/tools/wc", b"", timeout=10)
                found = workers(daemon)
            processes(daemon, personal=False)
            expect(found == wanted, "one worker for each of the two")

        refusals(daemon)
        scene("What the administrator reads")
        for event in [*daemon.events("authentication"), *daemon.events("refused")][:8]:
            fields = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "level", "event"))
            console.print(f"    {event['event']} {escape(fields)}")
        expect(realm.password("alice") not in daemon.log_text(), "there is no password in the log")
        clean_up(daemon, service)
        service = None
    finally:
        if service:
            realm.finish(service)
        if daemon.running:
            daemon.kill()


def see_tree(daemon: realm.Daemon, user: str) -> str:
    """`srpc tree` over TLS."""
    options = ("--address", daemon.address, "--pin", daemon.pin, "--user", user, "--password-file", "-")
    return srpc(user, *options, "tree", stdin=realm.password(user) + "\n")


def calls(alice: blocking.Session, bob: blocking.Session) -> None:
    """Who may call what."""
    scene("Calls", "Two users on one TLS connection. Each call is made by a process that runs as its caller.")
    call(alice, "/calc/add", "19 23", "42")
    call(alice, "/tools/upper", "shout", "SHOUT")
    call(alice, "/tools/wc", "two words", "0 2 9")
    call(alice, "/tools/counter", "", "call 1 by alice")
    call(alice, "/tools/counter", "", "call 2 by alice")
    console.print("  [dim]bob is in neither calc nor staff2:[/]")
    call(bob, "/calc/add", "19 23", "EACCES")
    call(bob, "/tools/upper", "shout", "EACCES")
    call(bob, "/tools/wc", "two words", "0 2 9")
    call(bob, "/tools/counter", "", "call 1 by bob")
    call(bob, "/tools/nothing", "", "ENOENT")


def changes(daemon: realm.Daemon, alice: blocking.Session, bob: blocking.Session) -> None:
    """Permissions change under an open session."""
    calc, add, tools = daemon.tree / "calc", daemon.tree / "calc/add", daemon.tree / "tools"
    scene("The same open sessions, while permissions change", "Each change binds the very next call.")
    shell(f"chmod o+x {calc}", lambda: calc.chmod(0o2751))
    call(bob, "/calc/add", "1 2", "EACCES")
    console.print("  [dim]he may walk through the directory now; the endpoint itself is still closed to him[/]")
    shell(f"chmod o+w {add}", lambda: add.chmod(0o622))
    call(bob, "/calc/add", "1 2", "3")
    shell(f"setfacl -m u:bob:- {calc}", lambda: realm.grant(calc, "", uid=realm.account("bob").uid))
    call(bob, "/calc/add", "1 2", "EACCES")
    call(alice, "/calc/add", "1 2", "3")
    console.print("  [dim]a directory above, closed for everybody:[/]")
    shell(f"chmod 0700 {tools}", lambda: tools.chmod(0o700))
    call(alice, "/tools/wc", "x", "EACCES")
    shell(f"chmod 0755 {tools}", lambda: tools.chmod(0o755))
    call(alice, "/tools/wc", "x", "0 1 1")


def refusals(daemon: realm.Daemon) -> None:
    """Who does not get in at all."""
    scene("Who does not get in", "All of them are answered alike, and at the same time after the password.")
    for user, password, why in (
        ("alice", "guess", "a wrong password"),
        ("carol", realm.password("carol"), "a locked account, with its password"),
        ("root", realm.password("root"), "root, with its password"),
    ):
        # A connection each: failures delay what comes after them on the same one.
        try:
            with blocking.dial(daemon.address, pins=daemon.pin, user=user, password=password):
                expect(False, f"{why} is refused")
        except SrpcError as fault:
            expect(fault.code == "EACCES", f"{why}: {fault}")
    other = "sha256:" + "A" * 43 + "="
    try:
        with blocking.connect(daemon.address, pins=other):
            expect(False, "a server with another key is not talked to")
    except SrpcError as fault:
        expect(True, f"a server with another key: {type(fault).__name__}")


def clean_up(daemon: realm.Daemon, service: "subprocess.Popen[bytes]") -> None:
    """End everything, and look."""
    scene("The end")
    realm.finish(service)
    expect(realm.until(lambda: not daemon.processes("other", "add.py")), "the service has ended")
    try:
        daemon.stop()
        expect(True, "SIGTERM: the daemon has ended, and no process, line or socket of its is left")
    except AssertionError as fault:
        expect(False, str(fault))
    left = [each for each in realm.descendants(os.getpid()) if realm.alive(each)]
    expect(not left, f"no process is left{f': {left}' if left else ''}")


def personal() -> None:
    """What an ordinary user can see of it."""
    daemon, service = realm.Daemon({"limits": {"drain": 3.0}}), None
    try:
        scene(
            "A daemon in personal mode",
            "Started by an ordinary user, it serves that user alone. Everything else is the same.",
        )
        daemon.start()
        console.print(f"  srpcd serves {daemon.tree} on {daemon.address} and {daemon.local}")
        console.print(f"  pin of its key, made just now: {daemon.pin}")
        scene("Programs, and a service")
        install(daemon, "wc", 0o755)
        install(daemon, "upper", 0o750)
        install(daemon, "counter", 0o1755)
        (daemon.tree / "calc").mkdir(mode=0o755)
        service = announce(daemon, None)
        listing(daemon.tree)
        scene("The tree")
        text = srpc(None, "tree", env={"SRPC_ADDRESS": f"unix:{daemon.local}"})
        expect("add" in text and "wc" in text, "all of it is there")
        scene("Calls, while permissions change under the open session")
        calc = daemon.tree / "calc"
        with blocking.dial(f"unix:{daemon.local}") as connection:
            me = connection.session
            call(me, "/calc/add", "19 23", "42")
            call(me, "/tools/upper", "shout", "SHOUT")
            call(me, "/tools/counter", "", f"call 1 by {me.user}")
            shell(f"chmod 0600 {calc}", lambda: calc.chmod(0o600))
            call(me, "/calc/add", "1 2", "EACCES")
            shell(f"chmod 0755 {calc}", lambda: calc.chmod(0o755))
            call(me, "/calc/add", "1 2", "3")
            shell(f"chmod a-x {daemon.tree / 'tools/wc'}", lambda: (daemon.tree / "tools/wc").chmod(0o644))
            call(me, "/tools/wc", "x", "ENOENT")
            scene("The processes")
            processes(daemon, personal=True)
        clean_up(daemon, service)
        service = None
        console.print()
        console.print(f"[yellow]Left out: {escape(realm.missing())}; so nobody else's calls, and no password over TLS.[/]")
        console.print("[yellow]As root, `make demo` shows all of it.[/]")
    finally:
        if service:
            realm.finish(service)
        if daemon.running:
            daemon.kill()


def main() -> int:
    """Tell it; the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up all the same
    place = realm.enter()
    if os.geteuid() == 0 and not place.private:
        console.print(f"[red]{escape(realm.missing())}[/]; and root has no personal mode. Nothing can be shown here.")
        return 1
    try:
        (in_the_realm if place.private else personal)()
    except (SrpcError, AssertionError, OSError) as fault:
        faults.append(f"{type(fault).__name__}: {fault}")
    console.print()
    for sentence in faults:
        console.print(f"[bold red]✗[/] {escape(sentence)}")
    console.print("[bold red]Not all went as it should.[/]" if faults else "[bold green]All went as it should.[/]")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
