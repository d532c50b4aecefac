"""Every deployment file that comes with the project is right, and says what its comment says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pdserve import cli
from pdserve.core import config
from pdserve.core.config import Deployment
from pdserve.core.config_reference import reference

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_it_checks(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["keys", "new", "keys"])  # as the comment of two-hosts.yaml says
    code = cli.main(["check", str(CONFIGS / name)])
    assert (code, capsys.readouterr().err) == (0, "")


def test_two_hosts_wants_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(CONFIGS / "two-hosts.yaml")]) == 2
    assert "pdserve keys new keys" in capsys.readouterr().err


def test_smollm2_names_every_key_with_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "smollm2.yaml").read_text())
    default = Deployment.model_validate({"model": {"path": "smollm2", "max_context": 4096}})
    deployment = config.load(CONFIGS / "smollm2.yaml")
    assert deployment == default
    assert missing(deployment, written) == ["pools.mixed." + key for key in UNUSED_POOL]


def test_the_reference_in_the_docs_is_that_of_the_schema() -> None:
    """If this fails, run ``make docs``."""
    made = reference((CONFIGS / "smollm2.yaml").read_text(encoding="utf-8"))
    written = (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == made, "docs/configuration.md is not what `make docs` makes"
    unexplained = [line for line in made.splitlines() if line.endswith("|  |")]
    assert unexplained == [], "say what it is beside the key, in configs/smollm2.yaml"


UNUSED_POOL = ("device", "chunk_tokens", "max_batch")


def missing(section: BaseModel, written: dict[str, object], prefix: str = "") -> list[str]:
    """The keys of a section that a file does not name."""
    found = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        inner = written.get(key)
        if key not in written:
            found.append(prefix + key)
        elif isinstance(value, BaseModel):
            assert isinstance(inner, dict)
            found += missing(value, inner, f"{prefix}{key}.")
    return found
