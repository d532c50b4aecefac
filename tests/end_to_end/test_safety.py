"""A deployment with keys and a certificate: it comes up by itself, and lets in whom it should."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import openai
import pytest
import trustme
from served import SIMULATED, deployment, run, serve

from pdserve.core.api_keys import add_key


def test_keys_and_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("localhost", "127.0.0.1")
    cert, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys.yaml"
    for part in made.cert_chain_pems:
        part.write_to_path(cert, append=True)
    made.private_key_pem.write_to_path(key)
    alice = add_key(keys, "alice", requests_per_minute=3).secret
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    security = f"security: {{api_keys: {keys}, tls_cert: {cert}, tls_key: {key}}}"
    with (
        serve(deployment(tmp_path, SIMULATED + security)) as server,
        httpx.Client(verify=trust, base_url=server.url) as http,
    ):
        assert server.url.startswith("https://")
        assert http.get("/ready").status_code == 200
        assert http.get("/live").status_code == 401
        # Commands of the one who started it need neither.
        shown = run(["status", server.url])
        assert shown.returncode == 0 and "decode-0" in shown.stdout, shown.stderr
        said = run(["chat", "hi", "--url", server.url, "--max-tokens", "4"])
        assert said.returncode == 0, said.stderr

        def client(secret: str) -> openai.OpenAI:
            base_url = f"{server.url}/v1"
            return openai.OpenAI(base_url=base_url, api_key=secret, http_client=http, max_retries=0)

        def ask(secret: str) -> None:
            client(secret).completions.create(model="tiny", prompt="hi", max_tokens=2)

        with pytest.raises(openai.AuthenticationError) as refused:
            ask("pd-wrong")
        assert refused.value.code == "invalid_api_key"
        for _ in range(3):
            ask(alice)
        with pytest.raises(openai.RateLimitError) as limited:
            ask(alice)
        assert 1 <= int(limited.value.response.headers["Retry-After"]) <= 20
