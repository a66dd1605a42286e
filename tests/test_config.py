"""The configuration: what is refused, and with which words."""

from pathlib import Path

import pytest

from srpcd import config

PAIRS = [
    ("[limits]\nconnections = 12000\nstrangers = 300", "limits.connections: over 12288 with limits.strangers"),
    (
        '[listen]\ntcp = ["1.2.3.4:99999"]',
        "listen.tcp: '1.2.3.4:99999': not of the form host:port, with a port from 0 to 65535",
    ),
    ('[listen]\ntcp = ["example.org:1"]', "listen.tcp: 'example.org:1': Expected 4 octets"),
    ('[listen]\ntcp = ["[::1:7443"]', "listen.tcp"),
    ('[listen]\ntcp = ["7443"]', "not of the form host:port"),
    ("[listen]\ntcp = []\nlocal = false", "neither tcp nor local: nothing to listen on"),
    ("[limits]\nworkers = 0", "limits.workers: Expected `int` >= 1"),
    ("[limits]\nworkers = true", "limits.workers: Expected `int`, got `bool`"),
    ('[limits]\nworkers = "many"', "limits.workers: Expected `int`, got `str`"),
    ("[limits]\ncall_timeout = -1", "limits.call_timeout: Expected `float` >= 0.001"),
    ("[limits]\ncall_timeout = nan", "limits.call_timeout"),
    ("[limits]\noutstanding = 5000", "limits.outstanding: Expected `int` <= 4096"),
    ("[limits]\nworker = 1", "limits: Object contains unknown field `worker`"),
    ("[limit]\nworkers = 1", "Object contains unknown field `limit`"),
    ("limits = 3", "limits: Expected `object`, got `int`"),
    (f"[limits]\nbuffer = {10**21}", "limits.buffer: Expected `int` <= 1073741824"),
    (f"[authentication]\nuid_min = {10**21}", "authentication.uid_min: Expected `int` <= 4294967294"),
    ("[authentication]\nrefresh = 1e-300", "authentication.refresh: Expected `float` >= 0.1"),
    ("[authentication]\nrefusal = 1e-310", "authentication.refusal: Expected `float` >= 0.001"),
    ('[paths]\ntree = "srv/rpc"', "paths.tree: 'srv/rpc' is not an absolute path"),
    ('[paths]\ntree = "/srv\\u0000"', "paths.tree: '/srv\\x00' is not an absolute path"),
    (f'[paths]\nruntime = "/{"x" * 97}"', "paths.runtime: over 97 bytes"),
    ('[authentication]\nallow = ["root"]', "authentication.allow: root can't be allowed"),
    ('[authentication]\npam_service = "../x"', "authentication.pam_service: '../x' is not the name of a file"),
    ('[authentication]\npam_service = ""', "authentication.pam_service"),
    ('[log]\nformat = "xml"', "log.format: Expected `str` matching regex"),
    ('[log]\nlevel = "loud"', "log.level: Expected `str` matching regex"),
    ("[paths", "srpcd.toml: "),
    ("a = 1\na = 2", "Cannot overwrite a value"),
]


@pytest.mark.parametrize(("text", "words"), PAIRS)
def test_a_wrong_key_type_or_value_is_refused_with_file_key_and_reason(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_text(text)
    with pytest.raises(config.ConfigError) as caught:
        config.load(file, [], personal=False)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_bytes(b'gate_user = "\xff"')
    with pytest.raises(config.ConfigError, match="utf-8"):
        config.load(file, [], personal=False)


def test_an_override_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(config.ConfigError, match="--set: holds a byte that is not UTF-8"):
        config.load(None, ["limits.workers=\udcff"], personal=False)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="Is a directory"):
        config.load(tmp_path, [], personal=False)


def test_all_keys_are_optional(tmp_path: Path) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_text("")
    loaded = config.load(file, [], personal=False)
    assert loaded == config.Config()
    assert loaded.paths.tree == "/srv/rpc"


def test_a_named_file_must_exist_and_the_default_one_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config.load(None, [], personal=True).gate_user == "_srpcd"
    with pytest.raises(config.ConfigError, match="no such file"):
        config.load(tmp_path / "missing.toml", [], personal=False)


def test_the_command_line_is_stronger_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_text('[log]\nlevel = "error"\n[limits]\nworkers = 7\n')
    overrides = ["log.level=debug", 'log.format="json"', "limits.workers = 9", "listen.tcp=[]", "gate_user=somebody"]
    loaded = config.load(file, overrides, personal=False)
    assert (loaded.log.level, loaded.log.format, loaded.limits.workers, loaded.listen.tcp) == ("debug", "json", 9, [])
    assert loaded.gate_user == "somebody"


@pytest.mark.parametrize("override", ["limits.workers", "=3", ".=3", "limits.=3", "gate_user.x=1"])
def test_an_override_that_makes_no_sense_is_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_text('gate_user = "x"')
    with pytest.raises(config.ConfigError, match="command line"):
        config.load(file, [override], personal=False)


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("", "limits.workers=0", "command line: --set: limits.workers: Expected `int` >= 1"),
        ("", "paths.tree=here", "command line: --set: paths.tree: 'here' is not an absolute path"),
        ("[limits]\nworkers = true", "limits.workers=0", "command line: --set: limits.workers: Expected `int` >= 1"),
        ("[limits]\nworkers = 0", "limits.drain=1", "FILE: limits.workers"),
        ("[limits]\nworkers = 0", "limits.workers=3", ""),
    ],
)
def test_what_is_wrong_is_told_of_the_file_or_of_the_command_line(
    tmp_path: Path, text: str, override: str, words: str
) -> None:
    file = tmp_path / "srpcd.toml"
    file.write_text(text)
    try:
        config.load(file, [override], personal=False)
    except config.ConfigError as fault:
        said = str(fault).replace(str(file), "FILE")
    else:
        said = ""
    assert said.startswith(words)
    assert bool(said) == bool(words)


def test_a_user_has_places_of_his_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    file = tmp_path / "srpcd.toml"
    file.write_text('[paths]\nkey = "/k"\n')
    paths = config.load(file, [], personal=True).paths
    assert (paths.tree, paths.runtime, paths.key) == ("/data/srpc/tree", "/run/user/7/srpc", "/k")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert config.load(file, [], personal=True).paths.runtime == "/data/srpc/run"


def test_a_gate_gets_what_was_loaded() -> None:
    loaded = config.Config(limits=config.Limits(workers=3), gate_user="g")
    assert config.decode(config.encode(loaded)) == loaded


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:7443", ("::1", 7443)), ("[0:0::1]:1", ("::1", 1))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert config.tcp_address(text) == address


@pytest.mark.parametrize(
    ("descriptors", "connections", "strangers"),
    [(1 << 20, 1024, 256), (16_384, 1024, 256), (4096, 256, 256), (160, 10, 10), (8, 1, 1)],
)
def test_a_process_with_few_descriptors_has_few_connections(descriptors: int, connections: int, strangers: int) -> None:
    limits = config.within(config.Limits(), descriptors)
    assert (limits.connections, limits.strangers) == (connections, strangers)
    assert limits.workers == config.Limits().workers
