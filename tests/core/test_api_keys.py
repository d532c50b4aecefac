"""API keys: made, kept as hashes, read back; and every way that a file of them can be wrong."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pdserve import cli
from pdserve.core.api_keys import ENVIRONMENT, add_key, all_keys, digest, read_keys
from pdserve.core.errors import ConfigError


def test_a_key_is_made_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    alice = add_key(path, "alice", requests_per_minute=60, max_concurrent=4)
    bob = add_key(path, "bob")
    assert len(alice.secret) > 40 and alice.secret != bob.secret
    assert alice.secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == [alice.entry, bob.entry]
    assert alice.entry.sha256 == digest(alice.secret)
    assert (alice.entry.requests_per_minute, alice.entry.max_concurrent) == (60, 4)
    with pytest.raises(ConfigError, match="the name alice is taken"):
        add_key(path, "alice")
    with pytest.raises(ConfigError, match="requests_per_minute"):
        add_key(path, "carol", requests_per_minute=0)
    assert len(read_keys(path)) == 2


def test_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "alice")
    given = {ENVIRONMENT: " bob=0123456789abcdef, carol=fedcba9876543210=="}
    found = all_keys(str(path), given)
    assert [key.name for key in found] == ["alice", "bob", "carol"]
    assert found[2].sha256 == digest("fedcba9876543210==")
    assert all_keys(None, {}) == []
    for wrong in ("bob", "bob=short", "a b=0123456789abcdef", "alice=0123456789abcdef"):
        with pytest.raises(ConfigError) as error:
            all_keys(str(path), {ENVIRONMENT: wrong})
        assert "0123456789abcdef" not in str(error.value)


HASH = "a" * 64


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not valid YAML"),
        ("a: 1", "should be a valid list"),
        ("- {name: a}", "0.sha256: field required"),
        ("- {name: a, sha256: abc}", "0.sha256"),
        (f"- {{name: a, sha256: {HASH}, rate: 1}}", "0.rate"),
        (f"- {{name: a, sha256: {HASH}}}\n- {{name: a, sha256: {HASH}}}", "stands twice"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_keys(path)


def test_missing_and_open_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="make a key with: pdserve keys api"):
        read_keys(path)
    add_key(path, "alice")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="can be changed by other users"):
        read_keys(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    assert cli.main(["keys", "api", str(path), "alice", "--max-concurrent", "3"]) == 0
    shown = capsys.readouterr()
    (key,) = read_keys(path)
    assert key.sha256 == digest(shown.out.strip()) and key.max_concurrent == 3
    assert shown.out.strip() not in shown.err
    assert cli.main(["keys", "api", str(path), "alice"]) == 2
