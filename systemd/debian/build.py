"""Builds the Debian package: `python3 -I build.py CACHE OUTPUT`. `make deb` calls it.

CACHE: a directory in which the Python libraries are kept from build to build. OUTPUT: the package to write, `….deb`.
The same sources, libraries and interpreter make the same bytes: times are the changelog's, and compiled modules name the
installed paths. They are never compared with their sources, so nothing is ever written below /usr/lib/srpc.
"""

import compileall
import email.utils
import fcntl
import gzip
import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
DEBIAN = Path(__file__).resolve().parent
HOME = "/usr/lib/srpc"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"{HOME}/lib/{PYTHON}/site-packages"
DOC = "/usr/share/doc/srpc"


def _each(directory: str, pattern: str, target: str) -> list[tuple[str, str]]:
    """The rows of FILES for what is in a directory of the sources."""
    places = sorted(place for place in (SOURCE / directory).glob(pattern) if place.is_file())
    return [(place.relative_to(SOURCE).as_posix(), target) for place in places]


FILES = (
    ("systemd/srpcd.service", "/lib/systemd/system/"),
    ("systemd/srpcd.socket", "/lib/systemd/system/"),
    ("systemd/srpc.sysusers.conf", "/usr/lib/sysusers.d/srpc.conf"),
    ("systemd/srpc.tmpfiles.conf", "/usr/lib/tmpfiles.d/srpc.conf"),
    ("systemd/debian/srpcd.toml", "/etc/srpc/"),
    ("systemd/debian/srpcd.pam", "/etc/pam.d/srpcd"),
    ("systemd/debian/copyright", f"{DOC}/"),
    ("systemd/debian/lintian-overrides", "/usr/share/lintian/overrides/srpc"),
    ("policy/srpc.pp", "/usr/share/selinux/packages/srpc/"),
    ("policy/srpc.if", "/usr/share/selinux/devel/include/contrib/"),
    ("README.md", f"{DOC}/"),
    ("CHANGELOG.md", f"{DOC}/"),
    *_each("docs", "*.md", f"{DOC}/docs/"),
    *_each("docs/plots", "*.svg", f"{DOC}/docs/plots/"),
    *_each("docs/examples", "*", f"{DOC}/examples/"),
    *_each("policy/examples/payroll", "*", f"{DOC}/examples/payroll/"),
)
"""Documents are not compressed, and lie to each other as in the sources: so their links lead somewhere."""

COMPRESSED = (
    ("systemd/debian/changelog", f"{DOC}/changelog.gz"),
    ("docs/man/srpcd.8", "/usr/share/man/man8/srpcd.8.gz"),
    ("docs/man/srpcd.toml.5", "/usr/share/man/man5/srpcd.toml.5.gz"),
    ("docs/man/srpc.1", "/usr/share/man/man1/srpc.1.gz"),
)
LINKS = (
    (f"{HOME}/bin/python3", "../../../bin/python3"),
    ("/usr/sbin/srpcd", "../lib/srpc/bin/srpcd"),
    ("/usr/bin/srpc", "../lib/srpc/bin/srpc"),
    (f"{DOC}/docs/examples", "../examples"),
    (f"{DOC}/policy/examples", "../examples"),
    (f"{DOC}/policy/srpc.if", "../../../selinux/devel/include/contrib/srpc.if"),
)
SCRIPTS = {
    "srpcd": "import sys\n\nfrom srpcd.__main__ import main\n\nsys.exit(main())\n",
    "srpc": "from srpc_client.cli import main\n\nmain()\n",
}
EXECUTED = ("srpcd/gate/__main__.py", "srpcd/worker/__main__.py", "srpcd/monitor/pamchild.py")
"""What the daemon executes by its own name: SELinux goes by the label of the file."""

COMPLETIONS = {
    "bash": "/usr/share/bash-completion/completions/srpc",
    "zsh": "/usr/share/zsh/vendor-completions/_srpc",
    "fish": "/usr/share/fish/vendor_completions.d/srpc.fish",
}
MAINTAINER_SCRIPTS = ("postinst", "prerm", "postrm")


def main(cache: Path, output: Path) -> None:
    """Build it."""
    os.umask(0o022)
    version, date = _changelog()
    cache.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stage = Path(scratch) / "stage"
        _environment(stage, _libraries(cache), version)
        _files(stage)
        _control(stage, version)
        for place in (stage, *stage.rglob("*")):
            os.utime(place, (date, date), follow_symlinks=False)
        package = output.with_suffix(".new")  # whoever looks at `output` meanwhile sees all of the old one
        environment = {"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": str(date)}
        # gzip: a third larger than xz makes it, and unpacked in a fraction of the time.
        command = ("dpkg-deb", "--build", "--root-owner-group", "-Zgzip", stage, package)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        package.replace(output)


def _changelog() -> tuple[str, int]:
    """Version and date, in seconds, of the newest entry."""
    text = (DEBIAN / "changelog").read_text(encoding="utf-8")
    version = re.match(r"srpc \((\S+)\)", text)
    date = re.search(r"^ -- .*>  (.*)$", text, re.MULTILINE)
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not version or not date or version[1] != project:
        raise SystemExit(f"{DEBIAN}/changelog: its newest entry is not of version {project}, which pyproject.toml names")
    return version[1], int(email.utils.parsedate_to_datetime(date[1]).timestamp())


def _libraries(cache: Path) -> Path:
    """The directory of the libraries, compiled; fetched where the cache has others or none."""
    lock = DEBIAN / "requirements.txt"
    wanted = hashlib.sha256(sys.version.encode() + lock.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    libraries, mark = cache / "libraries", cache / "libraries.sha256"
    if mark.exists() and mark.read_text() == wanted:
        return libraries
    mark.unlink(missing_ok=True)
    shutil.rmtree(libraries, ignore_errors=True)
    venv.create(cache / "pip", clear=True, with_pip=True)
    pip = (cache / "pip/bin/python", "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check", "install")
    what = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-compile", "--requirement", lock)
    subprocess.run((*pip, *what, "--target", libraries), check=True)
    shutil.rmtree(cache / "pip")
    shutil.rmtree(libraries / "bin", ignore_errors=True)  # commands of libraries, with the path of this directory in them
    for record in ("RECORD", "INSTALLER", "REQUESTED"):
        for place in libraries.glob(f"*.dist-info/{record}"):
            place.unlink()
    _compile(libraries, libraries, SITE)
    mark.write_text(wanted)
    return libraries


def _compile(directory: Path, root: Path, installed: str) -> None:
    """Compile what is in `directory`; `root` is `installed` on the machines that the package goes to."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    if not compileall.compile_dir(directory, quiet=1, stripdir=root, prependdir=installed, invalidation_mode=mode):
        raise SystemExit(f"{directory}: a module can't be compiled")


def _environment(stage: Path, libraries: Path, version: str) -> None:
    """The private virtual environment. It has no pip: what is in it changes with the package only."""
    site = stage / SITE[1:]
    shutil.copytree(libraries, site)
    for package in ("srpcd", "srpc_client"):
        shutil.copytree(SOURCE / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
        _compile(site / package, site, SITE)
    for place in site.rglob("*"):
        place.chmod(0o755 if place.is_dir() else 0o644)
    for name in EXECUTED:
        if not (site / name).read_bytes().startswith(b"#!/usr/bin/python3 -IS\n"):
            raise SystemExit(f"{name}: its first line is not the interpreter's")
        (site / name).chmod(0o755)
    metadata = f"Metadata-Version: 2.1\nName: srpc\nVersion: {version}\n"
    _write(stage, f"{SITE}/srpc-{version}.dist-info/METADATA", metadata)
    home = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON.removeprefix('python')}\n"
    _write(stage, f"{HOME}/pyvenv.cfg", home)
    for name, text in SCRIPTS.items():
        _write(stage, f"{HOME}/bin/{name}", f"#!{HOME}/bin/python3 -I\n{text}", 0o755)


def _files(stage: Path) -> None:
    """Everything else that is installed."""
    for source, target in FILES:
        name = target + Path(source).name if target.endswith("/") else target
        _write(stage, name, (SOURCE / source).read_bytes())
    for source, target in COMPRESSED:
        _write(stage, target, gzip.compress((SOURCE / source).read_bytes(), 9, mtime=0))
    for shell, target in COMPLETIONS.items():
        _write(stage, target, _completion(stage, shell))
    for name, target in LINKS:
        place = stage / name[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)


def _completion(stage: Path, shell: str) -> bytes:
    """The script that click makes for a shell."""
    site = str(stage / SITE[1:])
    code = f"import sys; sys.path.insert(0, {site!r}); from srpc_client.cli.commands import cli; cli(prog_name='srpc')"
    environment = {"PATH": os.environ["PATH"], "_SRPC_COMPLETE": f"{shell}_source"}
    return subprocess.run([sys.executable, "-IB", "-c", code], check=True, stdout=subprocess.PIPE, env=environment).stdout


def _control(stage: Path, version: str) -> None:
    """The directory DEBIAN."""
    files = sorted(place for place in stage.rglob("*") if place.is_file() and not place.is_symlink())
    values = {
        "VERSION": version,
        "ARCHITECTURE": subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip(),
        "SIZE": str(sum((each.stat().st_size + 1023) // 1024 for each in files)),
        "PYTHON": PYTHON.removeprefix("python"),
        "PYTHON_NEXT": f"3.{sys.version_info.minor + 1}",
    }
    control = re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], (DEBIAN / "control").read_text(encoding="utf-8"))
    sums = "".join(f"{hashlib.md5(each.read_bytes()).hexdigest()}  {each.relative_to(stage)}\n" for each in files)  # noqa: S324  dpkg's format
    _write(stage, "/DEBIAN/control", control)
    _write(stage, "/DEBIAN/md5sums", sums)
    _write(
        stage,
        "/DEBIAN/conffiles",
        "".join(f"/{each.relative_to(stage)}\n" for each in files if stage / "etc" in each.parents),
    )
    _write(stage, "/DEBIAN/triggers", (DEBIAN / "triggers").read_bytes())
    for name in MAINTAINER_SCRIPTS:
        _write(stage, f"/DEBIAN/{name}", (DEBIAN / name).read_bytes(), 0o755)


def _write(stage: Path, name: str, data: bytes | str, mode: int = 0o644) -> None:
    """A file of the package, by its installed path."""
    place = stage / name[1:]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data.encode() if isinstance(data, str) else data)
    place.chmod(mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
