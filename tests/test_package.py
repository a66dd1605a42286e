"""The Debian package's contents. What it does when it is installed is tested in the virtual machine."""

import gzip
import hashlib
import json
import marshal
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import CodeType

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from srpcd import config

REPOSITORY = Path(__file__).resolve().parents[1]
DEBIAN = REPOSITORY / "systemd/debian"
SITE = "usr/lib/srpc/lib/python3.11/site-packages"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def package() -> Path:
    """The package that `make deb` made of these sources."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is missing: no Debian package can be built or looked into here")
    target = (
        f"dist/srpc_{PROJECT['version']}_{subprocess.check_output(['dpkg', '--print-architecture'], text=True).strip()}.deb"
    )
    if subprocess.run(["make", "--question", target], cwd=REPOSITORY, check=False, capture_output=True).returncode:
        pytest.skip("there is no package of these sources: run 'make deb' first")
    return REPOSITORY / target


@pytest.fixture(scope="module")
def contents(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package, unpacked; control files in `DEBIAN`."""
    directory = tmp_path_factory.mktemp("package") / "contents"
    subprocess.run(["dpkg-deb", "--raw-extract", package, directory], check=True)
    yield directory
    shutil.rmtree(directory)


def files(directory: Path) -> list[Path]:
    """Regular files."""
    return sorted(each for each in directory.rglob("*") if each.is_file() and not each.is_symlink())


# --- what is decided before anything is built ---------------------------------------------------------------------------


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and `--hash=sha256:…` words by name."""
    text = (DEBIAN / "requirements.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", text, re.MULTILINE)
    return {
        canonicalize_name(name): (version, re.findall(r"sha256:[0-9a-f]{64}", hashes)) for name, version, hashes in entries
    }


def test_the_lock_file_has_every_dependency_in_a_version_that_the_project_takes() -> None:
    there = locked()
    for each in map(Requirement, PROJECT["dependencies"]):
        assert there[canonicalize_name(each.name)][0] in each.specifier, each


def test_the_lock_file_has_hashes_of_everything() -> None:
    there = locked()
    lines = (DEBIAN / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert len(there) == len([line for line in lines if "==" in line])
    assert all(hashes for _, hashes in there.values())


def test_the_configuration_file_shows_every_key_at_its_default_and_sets_none(tmp_path: Path) -> None:
    file = DEBIAN / "srpcd.toml"
    assert config.load(file, [], personal=False) == config.Config()
    switched_on = re.sub(r"^# (?=\w+ = )", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert tomllib.loads(switched_on) == msgspec.to_builtins(config.Config())


def test_the_pam_file_authenticates_as_the_system_does_and_opens_no_session() -> None:
    lines = [line for line in (DEBIAN / "srpcd.pam").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert lines == ["@include common-auth", "@include common-account"]


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_a_maintainer_script_is_good_shell(script: str) -> None:
    assert (DEBIAN / script).read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    subprocess.run(["/bin/sh", "-n", DEBIAN / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", DEBIAN / script], check=True)


# --- what is in the package -----------------------------------------------------------------------------------------------


def test_it_holds_the_sources_as_they_are(contents: Path) -> None:
    for name in ("srpcd", "srpc_client"):
        here = {each.relative_to(REPOSITORY) for each in files(REPOSITORY / name) if "__pycache__" not in each.parts}
        there = {
            each.relative_to(contents / SITE) for each in files(contents / SITE / name) if "__pycache__" not in each.parts
        }
        assert there == here
        for each in here:
            assert (contents / SITE / each).read_bytes() == (REPOSITORY / each).read_bytes(), each


def test_it_holds_the_libraries_of_the_lock_file_and_no_other(contents: Path) -> None:
    there = {}
    for place in (contents / SITE).glob("*.dist-info/METADATA"):
        head = place.read_text(encoding="utf-8")
        name, version = (re.search(rf"^{field}: (.*)$", head, re.MULTILINE) for field in ("Name", "Version"))
        assert name
        assert version
        there[canonicalize_name(name[1])] = version[1]
    assert there == {name: version for name, (version, _) in locked().items()} | {"srpc": PROJECT["version"]}


def test_every_module_is_compiled_for_where_it_is_installed_and_never_compared_with_its_source(contents: Path) -> None:
    sources = list((contents / SITE).rglob("*.py"))
    assert len(sources) > 200
    for source in sources:
        compiled = Path(util.cache_from_source(str(source)))
        head, code = compiled.read_bytes()[:16], compiled.read_bytes()[16:]
        assert head[:4] == util.MAGIC_NUMBER, compiled
        assert head[4:8] == b"\1\0\0\0", f"{compiled}: not by an unchecked hash"
        if source.is_relative_to(contents / SITE / "srpcd"):
            module = marshal.loads(code)
            assert isinstance(module, CodeType)
            assert module.co_filename == f"/{source.relative_to(contents)}"


def test_nothing_in_it_names_the_place_where_it_was_built(contents: Path) -> None:
    for each in files(contents):
        assert os.fsencode(REPOSITORY) not in each.read_bytes(), each


def test_nobody_but_root_can_change_it_and_nothing_in_it_has_privileges(contents: Path, package: Path) -> None:
    for each in (contents, *contents.rglob("*")):
        mode = each.lstat().st_mode
        assert stat.S_ISLNK(mode) or not mode & 0o7022, each
        assert stat.S_ISLNK(mode) or mode & 0o444 == 0o444, each
    listing = subprocess.check_output(["dpkg-deb", "--contents", package], text=True).splitlines()
    assert {line.split()[1] for line in listing} == {"root/root"}


def test_what_the_daemon_executes_by_name_has_the_systems_interpreter_without_site(contents: Path) -> None:
    for name in ("gate/__main__.py", "worker/__main__.py", "monitor/pamchild.py"):
        program = contents / SITE / "srpcd" / name
        assert program.stat().st_mode & 0o111 == 0o111
        assert program.read_bytes().startswith(b"#!/usr/bin/python3 -IS\n")


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("usr/sbin/srpcd", "usr/lib/srpc/bin/srpcd"),
        ("usr/bin/srpc", "usr/lib/srpc/bin/srpc"),
    ],
    ids=["srpcd", "srpc"],
)
def test_the_commands_are_isolated_from_whoever_calls_them(contents: Path, link: str, target: str) -> None:
    assert (contents / link).resolve() == (contents / target).resolve()
    assert (contents / target).read_bytes().startswith(b"#!/usr/lib/srpc/bin/python3 -I\n")
    assert os.access(contents / target, os.X_OK)


def test_the_environment_is_closed(contents: Path) -> None:
    bin_ = contents / "usr/lib/srpc/bin"
    assert sorted(each.name for each in bin_.iterdir()) == ["python3", "srpc", "srpcd"]
    assert os.readlink(bin_ / "python3") == "../../../bin/python3"
    (contents / "usr/bin/python3").symlink_to(SYSTEM_PYTHON)
    code = "import sys, srpcd.config, json; print(json.dumps([srpcd.config.__file__, sys.path]))"
    ours = contents / "usr/lib/srpc"
    try:
        found, path = json.loads(subprocess.check_output([ours / "bin/python3", "-I", "-c", code]))
    finally:
        (contents / "usr/bin/python3").unlink()
    assert found == str(contents / SITE / "srpcd/config.py")
    assert not [each for each in path if "dist-packages" in each]


def test_configuration_files_are_dpkgs_affair(contents: Path) -> None:
    names = (contents / "DEBIAN/conffiles").read_text(encoding="utf-8").split()
    assert names == ["/etc/pam.d/srpcd", "/etc/srpc/srpcd.toml"]
    assert names == [f"/{each.relative_to(contents)}" for each in files(contents / "etc")]


def test_it_depends_on_nothing_that_a_bare_system_lacks(package: Path) -> None:
    depends = subprocess.check_output(["dpkg-deb", "--field", package, "Depends"], text=True)
    names = {each.split()[0] for each in depends.split(",")}
    bare = {"libc6", "libgcc-s1", "libpam0g", "libpam-runtime", "libseccomp2", "libselinux1", "passwd", "python3"}
    assert names <= bare
    # A recommended package is wanted too, and apt gives the whole installation up where it can't be fetched.
    assert "\nRecommends:" not in subprocess.check_output(["dpkg-deb", "--field", package], text=True)


def test_its_sums_are_right(contents: Path) -> None:
    lines = (contents / "DEBIAN/md5sums").read_text(encoding="utf-8").splitlines()
    for total, name in (line.split("  ", 1) for line in lines):
        assert hashlib.md5((contents / name).read_bytes()).hexdigest() == total
    assert len(lines) == len([each for each in files(contents) if "DEBIAN" not in each.relative_to(contents).parts[0]])


def test_it_holds_the_manual(contents: Path) -> None:
    for page in (REPOSITORY / "docs/man").iterdir():
        there = contents / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"
        assert gzip.decompress(there.read_bytes()) == page.read_bytes()


DOC = "usr/share/doc/srpc"


def test_it_holds_the_documents_and_the_examples(contents: Path) -> None:
    there = {"README.md": "README.md", "CHANGELOG.md": "CHANGELOG.md"}
    there |= {f"docs/{each.name}": f"docs/{each.name}" for each in (REPOSITORY / "docs").glob("*.md")}
    there |= {f"docs/examples/{each.name}": f"examples/{each.name}" for each in (REPOSITORY / "docs/examples").glob("*.py")}
    assert len(there) > 10
    for source, installed in there.items():
        assert (contents / DOC / installed).read_bytes() == (REPOSITORY / source).read_bytes(), installed


def test_no_link_of_a_document_leads_nowhere(contents: Path) -> None:
    documents = [each for each in files(contents / DOC) if each.suffix == ".md"]
    assert documents
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert re.match(r"https?://", link) or (document.parent / link).exists(), f"{document.name}: {link}"


def test_what_texts_point_to_below_the_documents_is_there(contents: Path) -> None:
    texts = [
        contents / "lib/systemd/system/srpcd.service",
        *(each for each in files(contents / DOC) if each.suffix == ".md"),
    ]
    named = {
        name.rstrip(".") for text in texts for name in re.findall(rf"/{DOC}/[\w./-]+", text.read_text(encoding="utf-8"))
    }
    assert f"/{DOC}/docs/systemd.md" in named
    for name in named:
        assert (contents / name[1:]).exists(), name


@pytest.mark.parametrize(
    ("shell", "script", "ask"),
    [
        (
            "bash",
            "usr/share/bash-completion/completions/srpc",
            'source "$0"; COMP_WORDS=(srpc wh) COMP_CWORD=1; _srpc_completion srpc; echo "${COMPREPLY[@]}"',
        ),
        (
            "zsh",
            "usr/share/zsh/vendor-completions/_srpc",
            'words=(srpc wh) CURRENT=2; compdef() {}; _describe() { print -l ${(P)3} }; source "$0"; _srpc_completion',
        ),
        (
            "fish",
            "usr/share/fish/vendor_completions.d/srpc.fish",
            'source $argv[1]; complete --do-complete "srpc wh"',
        ),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_a_shell_without_anything_else_completes(contents: Path, tmp_path: Path, shell: str, script: str, ask: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing")
    bare = {
        "bash": ["bash", "--norc", "--noprofile", "-c"],
        "zsh": ["zsh", "-f", "-c"],
        "fish": ["fish", "--no-config", "-c"],
    }
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(
        [*bare[shell], ask, contents / script], env=environment, check=True, capture_output=True, text=True
    )
    assert re.match(r"whoami\b", found.stdout)


def test_the_same_sources_make_the_same_package_wherever_they_are(package: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    for each in ("srpcd", "srpc_client", "systemd", "policy", "docs"):
        shutil.copytree(REPOSITORY / each, other / each, ignore=shutil.ignore_patterns("__pycache__"))
    for each in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / each, other)
    build = other / "systemd/debian/build.py"
    result = tmp_path / package.name
    subprocess.run([SYSTEM_PYTHON, "-I", build, REPOSITORY / "build/deb", result], check=True, capture_output=True)
    assert result.read_bytes() == package.read_bytes()
