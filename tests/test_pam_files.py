"""Whether a PAM service asks for sessions, read from its file as libpam would read it."""

from pathlib import Path

import pytest

from srpcd.monitor import pamsession


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The administrator's files, and the vendor's."""
    made = tmp_path / "etc", tmp_path / "usr"
    for directory in made:
        directory.mkdir()
    monkeypatch.setattr(pamsession, "DIRECTORIES", tuple(map(str, made)))
    return made


@pytest.mark.parametrize(
    "text",
    [
        "session required pam_limits.so",
        "auth required pam_unix.so\nsession optional pam_limits.so conf=/etc/x\n",
        "-session optional pam_systemd.so",
        "SESSION Required pam_limits.so",
        "\tsession\t[success=ok default=bad]\tpam_limits.so # a remark",
        "session \\\n required pam_limits.so",
        "auth required \\\n pam_unix.so\nsession required pam_limits.so",
        "@include has-session",
        "session include has-session",
        "session substack has-session",
        "-session Include has-session",
        "auth include has-session\n@include nests",
        "session required",  # broken: libpam is to say so
        "session",
    ],
)
def test_session_lines_are_found(directories: tuple[Path, Path], text: str) -> None:
    (directories[0] / "has-session").write_text("auth required pam_unix.so\nsession required pam_limits.so\n")
    (directories[0] / "nests").write_text("@include has-session\n")
    (directories[0] / "srpcd").write_text(text)
    assert pamsession.asked_for("srpcd")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "auth required pam_unix.so\naccount required pam_unix.so\npassword required pam_unix.so",
        "# session required pam_limits.so",
        "auth required pam_unix.so # session required pam_limits.so",
        "auth required pam_unix.so \\\nsession required pam_limits.so",  # arguments of the line before
        "auth include has-session\naccount include has-session",  # the lines of that kind, and no others
        "session include has-none\n@include has-none",
        "@include",
        "auth required session",
    ],
)
def test_nothing_else_is_a_session_line(directories: tuple[Path, Path], text: str) -> None:
    (directories[0] / "has-session").write_text("session required pam_limits.so\n")
    (directories[0] / "has-none").write_text("auth required pam_unix.so\n")
    (directories[0] / "srpcd").write_text(text)
    assert not pamsession.asked_for("srpcd")


def test_a_service_without_a_file_has_no_session(directories: tuple[Path, Path]) -> None:
    (directories[0] / "other").write_text("session required pam_limits.so\n")  # what libpam would take in its place
    assert not pamsession.asked_for("srpcd")


def test_the_vendors_file_counts_where_the_administrator_has_none(directories: tuple[Path, Path]) -> None:
    (directories[1] / "srpcd").write_text("session required pam_limits.so\n")
    assert pamsession.asked_for("srpcd")
    (directories[0] / "srpcd").write_text("auth required pam_unix.so\n")
    assert not pamsession.asked_for("srpcd")


def test_an_included_file_may_be_named_by_its_whole_path(directories: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("session required pam_limits.so\n")
    (directories[0] / "srpcd").write_text(f"@include {tmp_path}/elsewhere\n")
    assert pamsession.asked_for("srpcd")


@pytest.mark.parametrize("text", ["@include nonesuch", "session include nonesuch", "@include srpcd", "@include ."])
def test_a_file_that_can_not_be_read_to_its_end_is_an_error(directories: tuple[Path, Path], text: str) -> None:
    (directories[0] / "srpcd").write_text(text)
    with pytest.raises(OSError):  # noqa: PT011
        pamsession.asked_for("srpcd")


def test_a_service_is_looked_for_by_its_name_in_small_letters_as_libpam_does(directories: tuple[Path, Path]) -> None:
    """Else sessions, and the limits that they set, would silently not be opened."""
    (directories[0] / "srpcd").write_text("session required pam_limits.so\n")
    assert pamsession.asked_for("Srpcd")
