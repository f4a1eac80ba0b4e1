"""Loading typed settings from YAML and `key=value` overrides, with errors that name the cure.

An unknown key is refused with the nearest valid name; a wrong value with the file, the line, the field, what was
found and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from polm.errors import RecipeError


class Settings(BaseModel):
    """Base of every typed section: immutable, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)
Readers = Mapping[str, Mapping[str, Any]]  # choice -> the knobs that it reads, with their defaults


def require_readers(settings: Settings, choice: str, readers: Readers) -> None:
    """ValueError for a knob that is given and that the chosen value of `choice` does not read."""
    chosen = getattr(settings, choice)
    for name in sorted({name for knobs in readers.values() for name in knobs} - set(readers[chosen])):
        if getattr(settings, name) is not None:
            others = ", ".join(other for other, knobs in readers.items() if name in knobs)
            raise ValueError(
                f"{name} is {getattr(settings, name)}, and {choice}: {chosen} does not read it; leave it out "
                f"({chosen} reads {', '.join(sorted(readers[chosen])) or 'no knob'}; {name} is read by {others})"
            )


def fill_defaults(values: Any, choice: str, default: str, readers: Readers) -> Any:
    """The values with the defaults of the chosen value of `choice`, so that a resolved recipe says what was used."""
    if not isinstance(values, dict):
        return values
    chosen = values.get(choice, default)
    defaults = readers.get(chosen, {}) if isinstance(chosen, str) else {}
    return {**values, **{name: value for name, value in defaults.items() if values.get(name) is None}}


def load_settings(
    kind: type[SettingsT], file: Path | None, overrides: Iterable[str] = (), section: str | None = None
) -> SettingsT:
    """Settings of type `kind` from a YAML file (or from nothing but defaults), with overrides applied.

    With `section`, a file that holds a whole recipe gives its section of that name; a file without such a section is
    read as the section itself.
    """
    values, lines = read_yaml(file) if file is not None else ({}, {})
    prefix: tuple[str, ...] = ()
    if section is not None and isinstance(values.get(section), dict):
        values, prefix = values[section], (section,)
    values = apply_overrides(values, overrides)
    return validate(kind, values, str(file) if file else "the command line", lines, prefix)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in a YAML file, and the line of each key (of a list: of each place in it) by its path."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {file}; shipped recipes: {', '.join(list_shipped())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read as text: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: expected a mapping of settings, found {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines, file)
    return values, lines


def _collect_lines(
    node: yaml.Node | None, path: tuple[str, ...], lines: dict[tuple[str, ...], int], file: Path
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:  # YAML itself would silently take the last one
                raise RecipeError(f"{file}:{line}: {'.'.join(here)!r} is given twice (first in line {lines[here]})")
            lines[here] = line
            _collect_lines(value, here, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _collect_lines(value, (*path, str(index)), lines, file)


def list_shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_folder() -> Path:
    return Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by the name of a shipped one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    shipped = recipe_folder() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise RecipeError(f"no recipe {name!r}: neither a file nor a shipped recipe{_nearest(name, list_shipped())}")


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` strings; values are read as YAML. A plain value for a section with a `path` sets that path."""
    out: dict[str, Any] = _copy(values)
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r} is not of the form key=value, for example seed=1")
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error
        target = out
        *sections, last = key.split(".")
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"override {override!r}: {section} is {inner!r}, not a section with keys of its own")
            target = inner
        if isinstance(target.get(last), dict) and isinstance(value, str):
            target[last]["path"] = value
        else:
            target[last] = value
    return out


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def validate(
    kind: type[SettingsT],
    values: Mapping[str, Any],
    source: str,
    lines: Mapping[tuple[str, ...], int] | None = None,
    prefix: tuple[str, ...] = (),
) -> SettingsT:
    """Check values against a settings type; RecipeError lists every problem."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_describe(kind, dict(item), source, lines or {}, prefix) for item in error.errors()]
        raise RecipeError("\n".join(problems)) from None


def _describe(
    kind: type[BaseModel],
    item: dict[str, Any],
    source: str,
    lines: Mapping[tuple[str, ...], int],
    prefix: tuple[str, ...],
) -> str:
    """One problem in words: place, field, what was found, what is allowed."""
    path = tuple(str(part) for part in item["loc"])
    field = ".".join(path)
    line = next((lines[(*prefix, *path[:n])] for n in range(len(path), 0, -1) if (*prefix, *path[:n]) in lines), None)
    place = f"{source}:{line}" if line else source
    if item["type"] == "extra_forbidden":
        allowed = _names_at(kind, path[:-1])
        return f"{place}: unknown key {field!r}{_nearest(path[-1], allowed)} (allowed: {', '.join(sorted(allowed))})"
    if item["type"] == "missing":
        return f"{place}: {field} is missing and has no default"
    found = item.get("input")
    shown = repr(found) if not isinstance(found, dict) else "a section"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{place}: {field or 'the recipe'}: found {shown}: {message}"


def _names_at(kind: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Field names of the section that a path leads to (all candidates of a union)."""
    kinds: list[type[BaseModel]] = [kind]
    for part in path:
        below = [_models_in(k.model_fields[part]) for k in kinds if part in k.model_fields]
        # Parts that are not fields are union tags, dictionary keys or list positions: stay where we are.
        kinds = [model for models in below for model in models] or kinds
    return sorted({name for k in kinds for name in k.model_fields})


def _models_in(field: FieldInfo) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    stack: list[Any] = [field.annotation]
    while stack:
        item = stack.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            found.append(item)
        stack.extend(get_args(item))
    return found


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def semantic_values(settings: Settings) -> dict[str, Any]:
    """The settings that change an artifact's content: the input of its key. Cadences and the like stay out, and so does
    a later-born knob at its default: it changes nothing, and what was made before keeps its key."""
    out: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("semantic") is False:
            continue
        value = getattr(settings, name)
        if isinstance(extra, dict) and extra.get("semantic") == "if given" and value == field.default:
            continue
        out[name] = semantic_values(value) if isinstance(value, Settings) else _plain(value)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return semantic_values(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
