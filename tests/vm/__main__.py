"""`python -m tests.vm`: virtual machines for development, and the tests that run in one."""

import argparse
import sys
from pathlib import Path

from tests.vm import image, machine, states, suite


def main() -> int:
    """The command line. Returns the status."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the image and boot it once, where that has not been done")
    for name, text in (
        ("up", "start a new machine"),
        ("run", "run a command inside, as root; a single word is a shell's command line"),
        ("put", "copy a file or directory in"),
        ("get", "copy a file or directory out"),
        ("console", "what it wrote to its console"),
        ("down", "end it"),
    ):
        commands.add_parser(name, help=text).add_argument("name")
    commands.choices["up"].add_argument("--no-selinux", action="store_true", help="a kernel without SELinux")
    commands.choices["up"].add_argument("--installed", action="store_true", help="with the package of dist/ installed")
    commands.choices["run"].add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    for name in ("put", "get"):
        commands.choices[name].add_argument("source")
        commands.choices[name].add_argument("target")
    test = commands.add_parser("test", help="run the tests of the installed package")
    test.add_argument("--keep", action="store_true", help="do not end the machines")
    test.add_argument(
        "--part",
        action="append",
        default=[],
        help="not the usual tests, but those of this machine: service, system, package, functional, whole",
    )
    test.add_argument("--all", action="store_true", help="the usual tests, and the whole functional suite")
    test.add_argument("words", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="for pytest")
    given = parser.parse_args()
    try:
        return _do(given)
    except (image.ImageFault, machine.MachineFault) as fault:
        print(fault, file=sys.stderr)
        return 1


def _do(given: argparse.Namespace) -> int:
    if given.command == "build":
        print(states.booted().image)
        return 0
    words = getattr(given, "words", [])
    words = words[1:] if words[:1] == ["--"] else words
    if given.command == "test":
        return suite.run(["all"] if given.all else given.part, given.keep, words)
    vm = machine.Machine(given.name)
    match given.command:
        case "up":
            if given.installed:
                vm.up(states.installed(suite.package()))
            else:
                vm.up(states.booted(states.NO_SELINUX if given.no_selinux else states.SELINUX))
        case "run":
            return int(vm.ssh(words).returncode)
        case "put":
            vm.put(Path(given.source), given.target)
        case "get":
            vm.get(given.source, Path(given.target))
        case "console":
            print(vm.serial.read_text(errors="replace"))
        case "down":
            vm.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
