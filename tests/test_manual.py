"""The manual pages say what is there: every key with its default, every command with its options, and nothing else."""

import argparse
import re
import tomllib
from pathlib import Path

import click
import msgspec
import pytest

from srpc_client.cli.commands import cli
from srpcd import __main__ as daemon
from srpcd.config import Config

MANUAL = Path(__file__).resolve().parents[1] / "docs/man"


def page(name: str) -> str:
    """The source of a page, without mdoc's escapes."""
    text = (MANUAL / name).read_text(encoding="utf-8")
    return text.replace("\\(dq", '"').replace("\\-", "-").replace("\\e", "\\")


def section(text: str, name: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def options(text: str) -> set[str]:
    """Options that have a paragraph of their own."""
    found = set()
    for head in re.findall(r"^\.It Fl (.*)$", text, re.MULTILINE):
        found |= {f"-{each}" for each in re.split(r" , ", re.sub(r" Ar .*", "", head))}
    return found


def test_srpcd_toml_tells_every_key_with_its_default_in_its_table() -> None:
    described, table = "", ""
    for line in page("srpcd.toml.5").splitlines():
        if head := re.match(r"\.Ss Table (\[\w+\])", line):
            table += f"{head[1]}\n"
            described += f"{head[1]}\n"
        elif item := re.match(r'\.It Li "(.*)"$', line):
            described += f"{item[1]}\n"
    assert tomllib.loads(described) == msgspec.to_builtins(Config())
    assert table.count("[") == len([each for each in msgspec.to_builtins(Config()).values() if isinstance(each, dict)])


def test_srpc_tells_every_option_that_stands_before_a_command() -> None:
    there = {each for parameter in cli.params for each in parameter.opts} | {"-h", "--help"}
    assert options(section(page("srpc.1"), "DESCRIPTION")) == there


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_srpc_tells_every_option_of_a_command(name: str) -> None:
    commands = section(page("srpc.1"), "COMMANDS")
    found = re.search(rf"^\.It Ic {name} ?([^\n]*)\n(.*?)(?=^\.It Ic |\Z)", commands, re.MULTILINE | re.DOTALL)
    assert found, f"{name} is not described"
    parameters = cli.commands[name].params
    assert options(found[2]) == {each for one in parameters if isinstance(one, click.Option) for each in one.opts}
    usage = found[1]
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            assert any(f"Fl {each[1:]}" in usage for each in parameter.opts), usage
        else:
            assert re.search(rf"(Op )?Ar {parameter.name}", usage), usage
            assert (f"Op Ar {parameter.name}" in usage) is not parameter.required, usage


def test_srpc_tells_no_command_that_does_not_exist() -> None:
    assert set(re.findall(r"^\.It Ic (\w+)", page("srpc.1"), re.MULTILINE)) == set(cli.commands)


def test_srpcd_tells_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def look(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Asked({each for action in parser._actions for each in action.option_strings})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", look)
    with pytest.raises(Asked) as asked:
        daemon.main([])
    assert options(section(page("srpcd.8"), "DESCRIPTION")) == asked.value.args[0]


@pytest.mark.parametrize("name", [each.name for each in sorted(MANUAL.iterdir())])
def test_a_page_has_the_title_of_its_file_and_the_usual_parts(name: str) -> None:
    text = page(name)
    title, _, number = name.rpartition(".")
    assert re.search(rf"^\.Dt {re.escape(title.upper())} {number}$", text, re.MULTILINE)
    heads = re.findall(r"^\.Sh (.*)$", text, re.MULTILINE)
    assert heads[0] == "NAME"
    assert heads[-1] == "SEE ALSO"
    others = {f"{each.stem} {each.suffix[1:]}" for each in MANUAL.iterdir()} - {f"{title} {number}"}
    seen = re.findall(r"^\.Xr (\S+ \d)", section(text, "SEE ALSO"), re.MULTILINE)
    assert others - {"srpcd.toml 5"} <= set(seen)
