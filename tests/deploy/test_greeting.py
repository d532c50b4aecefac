"""What ``serve`` prints once it is ready."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from pdserve.core.api_keys import add_key
from pdserve.core.card import ModelCard
from pdserve.core.config import SecuritySection
from pdserve.deploy.local import greeting, reachable


def first_request(folder: Path, name: str = "m") -> tuple[str, dict[str, object]]:
    card = ModelCard(name, str(folder), "f", "llama", 10, 10, (1,))
    url = "http://127.0.0.1:8000"
    ready, line = greeting(card, url, SecuritySection()).splitlines()
    assert ready == f"pdserve is ready: http://127.0.0.1:8000 (model {name})"
    curl, url, _, header, _, body = shlex.split(line)  # as a shell takes it
    assert (curl, header) == ("curl", "Content-Type: application/json")
    return url, json.loads(body)


def test_a_chat_model_is_asked_in_a_chat(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").touch()
    url, body = first_request(tmp_path, 'it\'s "m"')
    assert url == "http://127.0.0.1:8000/v1/chat/completions"
    assert body["model"] == 'it\'s "m"'
    assert body["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_the_template_may_lie_in_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert first_request(tmp_path)[0].endswith("/v1/chat/completions")


def test_another_model_completes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    url, body = first_request(tmp_path)
    assert url == "http://127.0.0.1:8000/v1/completions"
    assert body["prompt"]


def test_with_keys_and_a_certificate_it_says_where_they_go(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    add_key(keys, "alice")
    card = ModelCard("m", str(tmp_path), "f", "llama", 10, 10, (1,))
    security = SecuritySection(api_keys=str(keys), tls_cert="my cert.pem", tls_key="key.pem")
    words = shlex.split(greeting(card, "https://h:1", security).splitlines()[1])
    assert words[:3] == ["curl", "--cacert", "my cert.pem"]
    assert "Authorization: Bearer KEY" in words


@pytest.mark.parametrize(
    ("bound", "written"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("gpu-3", "gpu-3"),
    ],
)
def test_where_it_is_reached(bound: str, written: str) -> None:
    assert reachable(bound) == written
