"""Saved machines to start others from: booted ones, and ones in which the package is installed as well.

Each is made once, from the one before it, and kept by the hash of what it is made from.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.vm import image, machine
from tests.vm.machine import Machine, MachineFault, Start

SELINUX = "security=selinux selinux=1 enforcing=1"
NO_SELINUX = "lsm=landlock,yama,apparmor"
"""Kernel parameters, with and without. (`selinux=0` is ignored beside `security=selinux`.)"""

MODULES = "/var/lib/selinux/default/active/modules/400"
TEST_POLICY = image.CHECKOUT / "tests/vm/guest/srpc_test.cil"


def booted(parameters: str = SELINUX) -> Start:
    """A machine that has booted, with these parameters for the kernel."""
    with image.locked():
        made = image.build()
        version = image.run(["qemu-system-x86_64", "--version"])
        hardware = [machine.MEMORY, machine.PROCESSORS, *machine.accelerator(made), version]
        key = _hash(f"{hardware} {machine.KERNEL} {parameters}".encode())
        return _made(Start(made, parameters), f"booted-{key}", _settle)


def installed(package: Path) -> Start:
    """A machine with the package, and with the policy modules of the example and of the tests.

    Those lie in the store before: so they are loaded together with the package's own, in the time of one.
    """
    base = booted()
    assert base.state
    modules = {path.stem: path for path in sorted((image.CHECKOUT / "policy").glob("*.pp")) if path.stem != "srpc"}
    modules[TEST_POLICY.stem] = TEST_POLICY
    name = f"installed-{_hash(base.state.name.encode(), *(path.read_bytes() for path in (package, *modules.values())))}"

    def install(vm: Machine) -> None:
        for module, path in modules.items():
            language = path.suffix[1:]
            vm.put(path, f"{MODULES}/{module}/{'cil' if language == 'cil' else 'hll'}")
            vm.ssh([f"printf {language} >{MODULES}/{module}/lang_ext"], check=True)
        vm.ssh(["restorecon", "-R", MODULES], check=True)
        vm.put(package, f"/root/{package.name}")
        # On a terminal of its own, as an administrator does it: scripts' children may use that, and not what sshd opened.
        command = f"DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 /root/{package.name}"
        done = vm.ssh(["script", "-qec", command, "/dev/null"], capture_output=True)
        if done.returncode:
            output = done.stdout.decode(errors="replace")
            raise MachineFault(f"{package.name} can't be installed: status {done.returncode}\n{output}")

    with image.locked("installed"):
        return _made(base, name, install)


def _settle(vm: Machine) -> None:
    vm.ssh(["systemctl is-system-running --wait --quiet; systemctl --failed --no-legend"])


def _made(base: Start, name: str, prepare: Callable[[Machine], None]) -> Start:
    """The saved state of this name, made where it is not there yet; older ones of its kind are removed."""
    state = base.image / name
    if not state.exists():
        print(f"making a machine: {name}", file=sys.stderr, flush=True)
        vm = Machine(name)
        vm.up(base)
        new = base.image / f"new-{name}"
        shutil.rmtree(new, ignore_errors=True)
        try:
            prepare(vm)
            vm.save(new)
        finally:
            vm.down()
        if base.state:  # one booted machine for each set of parameters is kept, but one package is enough
            for old in base.image.glob(f"{name.rpartition('-')[0]}-*"):
                shutil.rmtree(old)
        new.rename(state)
        shutil.rmtree(vm.directory)
    return base._replace(state=state)


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
