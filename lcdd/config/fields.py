"""What every configuration class is made of: fields with help and range, checks, the command line, YAML.

`Config` is the base of the dataclasses in `lcdd.config`. From the metadata of their fields this module checks
values, builds `argparse` flags and reads YAML, so a setting exists in exactly one place. It imports neither
torch nor transformers: `lcdd --help` has to be fast.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from lcdd.errors import InputError


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    required: bool = False,
    common: bool = False,
    path: bool = False,
    file: bool = False,
    resumable: bool = False,
    settled: bool = False,
    controller: str | None = None,
) -> Any:
    """A dataclass field with everything that is to be known about the setting: help, range, choices, and

    required: the command line insists on it.
    common: people change it; `--help` begins with those.
    path: what one stage hands to another; a pipeline sets it itself, and a resumed run may find it elsewhere.
    file: may be a file on this machine, and means another one from another directory.
    resumable: a resumed run may change it, since it does not decide what is learned (at most how that is rounded).
    settled: such a one that a finished stage was made with nevertheless.
    controller: the gate controller whose setting it is, alone.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "help": help, "choices": choices, "required": required, "bounds": bounds, "common": common or required,
        "path": path, "file": file or path, "resumable": resumable or path, "settled": settled,
        "controller": controller,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def type_name(hint: Any) -> str:
    """A type hint in words, for messages and help: `int | None` -> "an integer or null"."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of strings"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that a field declares; a bool is not an int, an int is a float, and
    NaN and infinity are no numbers."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) and _is_text(item) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and _is_text(value)
    return isinstance(value, hint)


def _is_text(value: str) -> bool:
    """Whether a string is characters alone: bytes that are no UTF-8 come from a shell as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _check_field(owner: str, name: str, value: Any, hint: Any, metadata: typing.Mapping[str, Any]) -> None:
    def fail(expected: str) -> typing.NoReturn:
        raise InputError(f"{owner}.{name}: expected {expected}, got {value!r}")

    if not fits(value, hint):
        fail(type_name(hint))
    if value is None:
        return
    choices = metadata.get("choices")
    if choices:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                fail("one of " + ", ".join(choices))
    bounds = metadata.get("bounds", {})
    tests = {
        "at_least": (lambda bound: value >= bound, ">="),
        "above": (lambda bound: value > bound, ">"),
        "at_most": (lambda bound: value <= bound, "<="),
        "below": (lambda bound: value < bound, "<"),
    }
    for key, (holds, sign) in tests.items():
        bound = bounds.get(key)
        if bound is not None and not holds(bound):
            fail(f"a value {sign} {bound:g}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: checks types, ranges and choices of all fields when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            _check_field(type(self).__name__, item.name, getattr(self, item.name), hints[item.name], item.metadata)
        self.check()

    def check(self) -> None:
        """Conditions that involve more than one field; overridden where there are any."""

    def require(self, *names: str) -> None:
        """Raise unless each named field is set: paths that a library caller may leave out but a stage needs."""
        for name in names:
            if getattr(self, name) in (None, "", ()):
                raise InputError(f"{type(self).__name__}.{name}: expected a value, got nothing (set --{name})")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def named(cls, fact: str) -> tuple[str, ...]:
        """Names of the settings of which a fact holds (`option`): "path", "resumable", ..."""
        return tuple(item.name for item in dataclasses.fields(cls) if item.metadata.get(fact))

    def lasting(self, *, settled: bool = False) -> dict[str, Any]:
        """The settings that decide about a result, as JSON has them; a run that goes on has to share them.

        settled: also those that a finished stage was made with.
        """
        free = set(self.named("resumable")) - set(self.named("settled") if settled else ())
        return {key: value for key, value in json.loads(json.dumps(self.to_dict())).items() if key not in free}


# ---------------------------------------------------------------- command line and YAML


def parse_text(text: str, hint: Any) -> Any:
    """A flag's text as the field's type; "none" and "null" give None where that is allowed."""
    if isinstance(hint, types.UnionType):
        parts = typing.get_args(hint)
        if type(None) in parts and text.lower() in ("none", "null"):
            return None
        return parse_text(text, next(part for part in parts if part is not type(None)))
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {type_name(hint)}, got {text!r}") from None
    return text


def add_flags(parser: argparse.ArgumentParser, *configs: type[Config]) -> None:
    """One `--name` for each field of the classes (bools: `--name` and `--no-name`), and `--config x.yaml`.

    Flags keep argparse's SUPPRESS default, so that a flag that was not given never hides a value of the YAML file.
    Classes used together must not share a field name, which raises here.
    """
    everything = _flags(*configs)
    groups: dict[type[Config] | None, Any] = {None: parser.add_argument_group("what people change")}
    for config in configs:
        if any(owner is config and not item.metadata["common"] for owner, item, _ in everything):
            groups[config] = parser.add_argument_group(config.__name__, (config.__doc__ or "").strip().splitlines()[0])
    for owner, item, hint in sorted(everything, key=lambda flag: not flag[1].metadata["required"]):
        _add_flag(groups[None if item.metadata["common"] else owner], item, hint)
    groups[None].add_argument("--config", metavar="FILE", help="YAML file with settings; flags override it")


def _flags(*configs: type[Config]) -> "list[tuple[type[Config], dataclasses.Field[Any], Any]]":
    """(class, field, type) of every setting of the classes, in order."""
    found, seen = [], set()
    for config in configs:
        hints = typing.get_type_hints(config)
        for item in dataclasses.fields(config):
            if item.name in seen:
                raise ValueError(f"{config.__name__}.{item.name}: expected a name no other section has")
            seen.add(item.name)
            found.append((config, item, hints[item.name]))
    return found


def _metavar(hint: Any) -> str:
    name = type_name(hint).split(" or ")[0]
    return {"an integer": "N", "a number": "X"}.get(name, "TEXT")


def _add_flag(group: Any, item: "dataclasses.Field[Any]", hint: Any) -> None:
    text = item.metadata["help"].replace("%", "%%")
    if item.metadata.get("required"):
        text += " (required)"
    elif item.default not in (None, ()):
        text += f" (default: {item.default})"
    if item.metadata.get("choices"):
        text += " [" + ", ".join(item.metadata["choices"]) + "]"
    common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": item.name}
    if hint is bool:
        group.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, **common)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(f"--{item.name}", nargs="+", action="extend", metavar="TEXT", **common)
    else:
        group.add_argument(f"--{item.name}", type=lambda text: parse_text(text, hint), metavar=_metavar(hint), **common)


def _from_yaml_value(value: Any, hint: Any) -> Any:
    """YAML reads 1e-3 as a string and lists as lists: give a field the type it declares where that is safe."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if hint is str and isinstance(value, date):  # what YAML makes of 2026-01-31
        return value.isoformat()
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; missing file, bad syntax or another kind of document is an InputError."""
    import yaml  # here: `lcdd --help` does not need it

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config: expected a readable YAML file, got {str(path)!r} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from None
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{path}: expected settings, got YAML that is nested too deeply") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of settings, got a {type(values).__name__}")
    return values


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """The known names that are written nearly so, in words; empty if there are none."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.75)
    if not found and len(part := name.strip("-")) >= 4:
        found = [other for other in names if part in other][:2]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _unknown(key: Any, known: typing.Iterable[str], where: str) -> InputError:
    hint = did_you_mean(str(key), known) or f"; known are: {', '.join(sorted(known))}"
    return InputError(f"{where}: unknown setting {key!r}{hint}")


def from_mapping(config: type[Config], values: typing.Mapping[str, Any], *, where: str) -> Any:
    """Build a config from plain values (YAML); sections are nested mappings, unknown keys are errors."""
    hints = typing.get_type_hints(config)
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise _unknown(key, hints, where)
        hint = hints[key]
        if isinstance(hint, type) and issubclass(hint, Config):
            if not isinstance(value, typing.Mapping):
                raise InputError(f"{where}: {key}: expected a mapping of settings, got {value!r}")
            known[key] = from_mapping(hint, value, where=f"{where}: {key}")
        else:
            known[key] = _from_yaml_value(value, hint)
    return config(**known)


def from_flags(namespace: argparse.Namespace, *configs: type[Config]) -> tuple[Any, ...]:
    """The configs that a parsed command line, over the YAML file it names, describes."""
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(namespace).items()}
    path = flags.pop("config", None)
    values = read_yaml(str(path)) if path else {}
    names = {item.name for config in configs for item in dataclasses.fields(config)}
    for key in values:
        if key not in names:
            raise _unknown(key, names, str(path))
    values.update({key: value for key, value in flags.items() if key in names})
    built = []
    for config in configs:
        fields = dataclasses.fields(config)
        own = {item.name: values[item.name] for item in fields if item.name in values}
        instance = from_mapping(config, own, where=str(path or "command line"))
        instance.require(*(item.name for item in fields if item.metadata.get("required")))
        built.append(instance)
    return tuple(built)
