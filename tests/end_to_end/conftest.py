"""One fp32 SmolLM2 deployment of two pools for all tests that do it no harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from served import SIMULATED, SPLIT, Server, deployment, run, serve

from pdserve.core.card import ModelCard


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(deployment(tmp_path_factory.mktemp("split"), SPLIT)) as running:
        yield running


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(deployment(tmp_path_factory.mktemp("simulated"), SIMULATED)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.at_rest()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as the deployments load it, readable by transformers."""
    folder = tmp_path_factory.mktemp("card")
    card = folder / "card.json"
    files = ("--card", str(card), "--devices", str(folder / "devices.json"))
    done = run(["prepare", str(deployment(folder, SPLIT)), *files], limit_s=150)
    assert done.returncode == 0, done.stderr
    return Path(ModelCard.read(card).folder)
