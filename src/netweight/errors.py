"""Every error that Netweight raises on purpose.

    NetweightError
    ├── DataError              the rows cannot be used
    │   ├── ColumnError        a column is missing
    │   └── LabelError         labels do not fit the task
    ├── OptionError            an option is not allowed, or does not apply here
    ├── ModelError             a base model cannot be loaded, or is not supported
    ├── ArtifactError          a folder is not an artifact that this version reads
    │   └── CorruptArtifact    a file differs from its recorded hash
    ├── StoreError             a run store belongs to another job, or is damaged
    ├── ClientError            clients of a federated run are absent, or differ from it
    ├── EndpointError          a service over HTTP refuses, is not there, or keeps failing
    ├── RunError               processes of a run are gone, or one of them failed
    ├── WireError              a message of a federated run cannot be sent, or cannot be read
    ├── CertificateError       a certificate cannot be made or does not hold
    └── MissingExtra           an optional dependency is not installed

Each text says what came, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class NetweightError(Exception):
    """Base of all errors below; catch this to catch them all."""


class DataError(NetweightError, ValueError):
    """The rows cannot be used as they are."""


class ColumnError(DataError):
    """A column that was asked for is not in the table."""

    def __init__(self, wanted: str, present: Iterable[str], source: str) -> None:
        columns = list(present)
        super().__init__(
            f"{source} has no column {wanted!r}; its columns are: {', '.join(columns) or '(none)'}."
            f"{did_you_mean(wanted, columns)}"
        )


class LabelError(DataError):
    """The labels do not fit the task."""


class OptionError(NetweightError, ValueError):
    """An option has a value that is not allowed, or does not apply."""


def within(options: object, of: str, allowed: Mapping[str, tuple[bool, str]]) -> None:
    """Raise OptionError for the first option that is not allowed.

    `of` names the options in the text ("a plan"). `allowed` has, by an option's name, whether its value is fine, and
    the words for what would be ("1 or more").
    """
    for name, (fine, what) in allowed.items():
        if not fine:
            raise OptionError(f"{name} of {of} is {getattr(options, name)}; use {what}.")


class ModelError(NetweightError):
    """A base model cannot be loaded, or its architecture is not supported."""


class ArtifactError(NetweightError):
    """A folder is not an artifact that this version can read."""


class CorruptArtifact(ArtifactError):
    """A file of an artifact is missing, or differs from its recorded hash."""


class StoreError(NetweightError):
    """A run store belongs to another job, or is damaged."""


class ClientError(NetweightError):
    """Clients of a federated run are absent, or differ from it."""


class EndpointError(NetweightError):
    """A service over HTTP refuses, is not there, or keeps failing."""


class RunError(NetweightError):
    """Processes of a run are gone, do not answer, or one of them failed."""


class WireError(NetweightError):
    """A message between server and client cannot be sent, or what came cannot be read."""


class CertificateError(NetweightError):
    """A certificate cannot be made from these rows, or does not hold."""


class MissingExtra(NetweightError, ImportError):
    """An optional dependency is not installed; the text has the pip command. `package`: one of the extra, where it
    will do alone."""

    def __init__(self, purpose: str, extra: str, package: str = "") -> None:
        clone = f"an extra; in a clone of Netweight: pip install '.[{extra}]'"
        super().__init__(f"{purpose} needs {f'{package}: pip install {package}' if package else clone}")


def no_list(given: object, name: str, instead: str = "") -> str:
    """Why something that Python can walk through is no list of texts, as a sentence; nothing where it may be one.

    One string would be a row for each character, and a table (of pandas, a mapping) one for each name of a column.
    `instead` is what to do, where that is not the usual.
    """
    # A column of pandas may have a row of that name.
    if isinstance(given, Mapping) or (hasattr(given, "columns") and getattr(given, "ndim", 2) == 2):
        usual = "pass one column, for example df['review']"
        return f"{name} is a table; {instead or usual}."
    if isinstance(given, str) or not isinstance(given, Iterable):
        what = "one string" if isinstance(given, str) else f"of type {type(given).__name__}"
        return f"{name} is {what}; {instead or 'pass a list of strings'}."
    return ""


def did_you_mean(wanted: str, allowed: Iterable[str]) -> str:
    """A sentence that suggests the closest allowed name, or nothing."""
    folded = {name.casefold(): name for name in allowed}
    close = get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.5)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""
