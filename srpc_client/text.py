"""What another host says, as text that a terminal does not obey."""

from unicodedata import category


def plain(text: str, keep: str = "") -> str:
    """The text with everything escaped that is not printable: escape sequences, line ends, bidirectional overrides.

    keep: characters that are left as they are all the same.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape", "backslashreplace").decode()
        for each in text
    )


def lines_of(payload: bytes) -> str:
    """A payload for a terminal: lines, tabs and blanks of any script stay, and what is not UTF-8 or a control is escaped."""
    text = payload.decode(errors="backslashreplace")
    blanks = {each for each in set(text) if category(each) == "Zs"}
    return plain(text, "\n\t" + "".join(blanks))
