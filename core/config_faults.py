"""What is wrong with a deployment file, in one sentence: key, what was found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f"not valid YAML: {' '.join(str(error).split())}"


def first_fault(root: type[BaseModel], error: ValidationError, data: Mapping[str, Any]) -> str:
    """One sentence for the first fault (an unknown key before others): path, found, allowed."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    section, field, path = _locate(root, fault["loc"])
    where = ".".join(path)
    if not path:  # a rule between sections: its text names the keys
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "missing":
        return "model.path: missing; it has no default, give for example model: {path: smollm2}"
    if field is None:
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        holder = ".".join(path[:-1]) or "the file"
        hint = f"did you mean {near[0]}?" if near else f"{holder} knows {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    found: Any = data
    for part in path:
        found = found[part]
    return f"{where}: found {shown(found)}; allowed: {allowed(field.annotation, field)}"


def _locate(
    root: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None, tuple[str, ...]]:
    """Where a fault is: the section, the field (None for an unknown key), and the path.

    What pydantic appends to tell the members of a union apart is left out.
    """
    section = root
    path: tuple[str, ...] = ()
    for part in loc:
        path = (*path, str(part))
        field = section.model_fields.get(path[-1])
        inner = field.annotation if field is not None else None
        if len(path) == len(loc) or not _is_section(inner):
            return section, field, path
        section = inner
    return section, None, path


def allowed(annotation: object, field: FieldInfo | None = None) -> str:
    """What a field takes, in words: its description where it has one."""
    if field is not None and field.description is not None:
        return field.description
    if _is_section(annotation):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(str(member.value) for member in annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(allowed(member) for member in get_args(annotation))
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return allowed(inner, next((m for m in metadata if isinstance(m, FieldInfo)), None))
    if annotation is NoneType:
        return "null"
    assert get_origin(annotation) is Literal, annotation
    return " or ".join(str(choice) for choice in get_args(annotation))


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
