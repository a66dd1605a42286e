"""Control groups, in a directory with the files that the kernel would make. `make test-vm` has the real ones."""

from pathlib import Path

import msgspec
import pytest

from srpcd.config import Config, Limits, Users, gates_memory
from srpcd.monitor.cgroups import Groups

MIB = 1 << 20
LEAVES = ("monitor", "gates", "authentication")
FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.kill", "cpu.weight", "memory.max", "memory.swap.max", "pids.max")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    for name in ("", *LEAVES, "users", "users/u1000"):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in FILES:
            (tmp_path / name / file).touch()
    return tmp_path


def value(unit: Path, name: str) -> str:
    return (unit / name).read_text()


def test_the_gates_have_a_limit_derived_from_their_budget_and_the_monitor_has_none(unit: Path) -> None:
    Groups(str(unit), Config())
    assert value(unit, "gates/memory.max") == str(gates_memory(Limits()))
    assert value(unit, "gates/memory.swap.max") == "0"
    assert value(unit, "monitor/memory.max") == value(unit, "authentication/memory.max") == ""
    assert 4 * 256 * MIB < gates_memory(Limits()) < 4096 * MIB


def test_a_reload_changes_the_limits_of_those_who_are_here(unit: Path) -> None:
    groups = Groups(str(unit), Config())
    config = Config(limits=Limits(memory="1G"), users=Users(memory="64M"))
    groups.configure(config)
    for file in FILES:
        (unit / "gates" / file).write_text("")
    groups.limit_all()
    assert value(unit, "gates/memory.max") == str(gates_memory(config.limits))
    assert value(unit, "users/u1000/memory.max") == str(64 * MIB)
    assert gates_memory(config.limits) - gates_memory(msgspec.structs.replace(config.limits, memory="512M")) == 4 * 512 * MIB
