"""What is wrong with a configuration file, in words: the mistakes, and the check of each value's type.

Used by the front and the commands, through `pool.config`. Pure: documents in, mistakes out.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from pool.errors import ConfigError

MISSING: Any = object()


class Mistake(msgspec.Struct, frozen=True):
    """One broken rule: the dotted key, what the rule is, and the value found (`MISSING`: none)."""

    key: str
    rule: str
    got: Any

    def __str__(self) -> str:
        if self.got is MISSING:
            return f"{self.key}: {self.rule}, got nothing"
        shown = _shown(self.got)
        return f"{self.key}: {self.rule}, got {shown if len(shown) <= 120 else shown[:117] + '...'}"


def _shown(value: Any) -> str:
    """A value on one line, much as the file has it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str)


def quoted(key: str) -> str:
    """A key as TOML writes it."""
    return key if re.fullmatch(r"[A-Za-z0-9_.-]+", key) else _shown(key)


def raise_all(file: str, mistakes: list[Mistake]) -> None:
    """Tell all mistakes of a file at once, one a line, each with the file's name if that is known.

    Raises:
        ConfigError: there are any.
    """
    if mistakes:
        head = f"{file}: " if file else ""
        raise ConfigError("\n".join(f"{head}{mistake}" for mistake in mistakes))


def find_table(document: dict[str, Any], key: str, mistakes: list[Mistake]) -> dict[str, Any] | None:
    """A table of the document; None if it is not there, or is no table, which is a mistake."""
    found = document.get(key)
    if found is None or isinstance(found, dict):
        return found
    mistakes.append(Mistake(key, "must be a table", found))
    return None


Struct = typing.TypeVar("Struct", bound=msgspec.Struct)
Places = Mapping[str, type[msgspec.Struct]]


def decode_table(
    kind: type[Struct], table: dict[str, Any], key: str, places: Places, mistakes: list[Mistake]
) -> Struct | None:
    """A table as a struct. Each key is checked by itself, so that one mistake does not hide the next.

    Args:
        kind: The struct: its fields are the keys there may be.
        table: What the TOML parser gave.
        key: The dotted key of the table.
        places: What kinds of tables there are, by what the user calls them: some keys are in the wrong one.
        mistakes: Those found are put after these.

    Returns:
        None if there are mistakes.
    """
    types = typing.get_type_hints(kind, include_extras=True)
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    before = len(mistakes)
    values = {}
    for name, value in table.items():
        if name not in types:
            mistakes.append(unknown_key(f"{key}.{quoted(name)}", name, value, kind, places))
            continue
        try:
            values[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError:
            rule = "must be " + _describe(msgspec.inspect.type_info(types[name]))
            mistakes.append(Mistake(f"{key}.{name}", rule, value))
    mistakes += [
        Mistake(f"{key}.{name}", "must be given", MISSING) for name in sorted(required - table.keys())
    ]
    return kind(**values) if len(mistakes) == before else None


def unknown_key(key: str, name: str, value: Any, kind: type[msgspec.Struct], places: Places) -> Mistake:
    """The mistake of a key that this kind of table does not have; it says which it may have meant."""
    valid = kind.__struct_fields__
    for place, other in places.items():
        if name in other.__struct_fields__ and other is not kind:
            return Mistake(key, f"unknown key here; {name} belongs in {place}", value)
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
    return Mistake(key, f"unknown key; the nearest valid key is {nearest}", value)


def _describe(kind: msgspec.inspect.Type) -> str:
    """What a value of this type is, in words."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_describe(t) for t in types if not isinstance(t, msgspec.inspect.NoneType))
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"an integer from {low} to {high}"
        case msgspec.inspect.FloatType(ge=low, le=high):
            return f"a number from {low:g} to {high:.10g}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(json.dumps(value) for value in values)
        case msgspec.inspect.StrType(pattern=str()):
            return 'three octal digits such as "0660"'
        case msgspec.inspect.StrType(min_length=low):
            return "a string that is not empty" if low else "a string"
        case msgspec.inspect.DictType():
            return "a table of strings"
        case msgspec.inspect.VarTupleType(item_type=item):
            inner = _describe(item)
            return "a list, each item " + inner
    raise AssertionError(f"no words for {kind}")  # pragma: no cover - a new field's type


def syntax_mistake(message: str, text: str) -> str:
    """`line N: rule, got line`, of the parser's own message."""
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    lines = text.split("\n")
    if place is not None:
        line = int(place[1])
        rule = f"must be TOML ({message[: place.start()]} at column {place[2]})"
    else:  # "(at end of document)"
        line = len(lines) - (len(lines) > 1 and not lines[-1])
        rule = f"must be TOML ({message})"
    return str(Mistake(f"line {line}", rule, lines[line - 1]))
