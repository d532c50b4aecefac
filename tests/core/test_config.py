"""A deployment file: what it means, and one sentence for each way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.core import config
from pdserve.core.config import Deployment, Dtype, Policy, parse_size
from pdserve.core.errors import ConfigError

MODEL = "model: {path: m}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Deployment:
    path = tmp_path / "d.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


def fault(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{tmp_path / 'd.yaml'}: ")


def workers(deployment: Deployment) -> tuple[int, int, int]:
    pools = deployment.pools
    return pools.prefill.workers, pools.decode.workers, pools.mixed.workers


def test_every_key_has_a_default_but_the_model(tmp_path: Path) -> None:
    deployment = read(tmp_path, MODEL)
    assert deployment.model.path == "m"
    assert deployment.model.dtype is Dtype.AUTO
    assert workers(deployment) == (1, 1, 0)
    assert deployment.kv.block_size == 16
    assert (deployment.slo.ttft_ms, deployment.slo.tpot_ms) == (500.0, 50.0)
    assert (deployment.router.host, deployment.router.port) == ("127.0.0.1", 8000)
    assert deployment.router.policy is Policy.ADAPTIVE


def test_values_are_read(tmp_path: Path) -> None:
    deployment = read(
        tmp_path,
        "model: {path: m, dtype: bf16, max_context: 4096}\n"
        "pools:\n"
        "  prefill: {workers: 2, device: cuda, chunk_tokens: 512}\n"
        "  decode: {workers: 3, device: 'cuda:1', max_batch: 64}\n"
        "kv: {memory: 0.5, prefix_cache: false}\n"
        "slo: {ttft_ms: 200}\n",
    )
    assert deployment.model.dtype is Dtype.BF16
    assert deployment.model.max_context == 4096
    assert workers(deployment) == (2, 3, 0)
    assert deployment.pools.prefill.chunk_tokens == 512
    assert deployment.pools.decode.device == "cuda:1"
    assert deployment.kv.memory == 0.5
    assert not deployment.kv.prefix_cache
    assert deployment.slo.ttft_ms == 200.0


def test_pools_that_are_given_are_all_there_are(tmp_path: Path) -> None:
    assert workers(read(tmp_path, MODEL + "pools: {mixed: {workers: 2}}")) == (0, 0, 2)


def test_a_saved_deployment_reads_back_as_itself(tmp_path: Path) -> None:
    deployment = read(tmp_path, MODEL + "kv: {memory: 2GiB}\npools: {mixed: {workers: 2}}")
    path = tmp_path / "saved.json"
    config.save(deployment, path)
    assert config.load(path) == deployment


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "found nothing; allowed: a mapping of sections"),
        ("- a\n", "found ['a']; allowed: a mapping of sections"),
        ("{}", "model.path: missing; it has no default, give for example model: {path: smollm2}"),
        (
            "model: {name: m}",
            "model.path: missing; it has no default, give for example model: {path: smollm2}",
        ),
        (
            "model: smollm2",
            "model: found 'smollm2'; allowed: a section with the keys "
            "path, name, aliases, dtype, load, max_context",
        ),
        ("model: {path: ''}", "model.path: found ''; allowed: a text"),
        ("model: {path: }", "model.path: found nothing; allowed: a text"),
        ("model: {path: m, name: 5}", "model.name: found 5; allowed: a text or null"),
        (
            "model: {path: m, dtype: f32}",
            "model.dtype: found 'f32'; allowed: auto or bf16 or fp16 or fp32",
        ),
        (
            "model: {path: m, max_context: 1.5}",
            "model.max_context: found 1.5; allowed: an integer, at least 1, or auto",
        ),
        (MODEL + "poolz: {}", "poolz: unknown key; did you mean pools?"),
        (MODEL + "slo: {ttft: 5}", "slo.ttft: unknown key; did you mean ttft_ms?"),
        (
            MODEL + "pools: {prefill: {wrokers: 1}}",
            "pools.prefill.wrokers: unknown key; did you mean workers?",
        ),
        (MODEL + "slo: {q: 1}", "slo.q: unknown key; slo knows tpot_ms, ttft_ms"),
        (
            MODEL + "zzz: 1",
            "zzz: unknown key; the file knows engine, faults, kv, kv_transfer, launcher, model, "
            "observability, pools, router, security, simulation, slo",
        ),
        (MODEL + "slo: {1: 2}", "slo.1: unknown key; slo knows tpot_ms, ttft_ms"),
        (
            MODEL + "router: {host: 5, porto: 1}",  # the unknown key is told before the bad value
            "router.porto: unknown key; did you mean port?",
        ),
        (
            MODEL + "pools:",
            "pools: found nothing; allowed: a section with the keys prefill, decode, mixed",
        ),
        (
            MODEL + "pools: {decode: }",
            "pools.decode: found nothing; allowed: a section with the keys "
            "workers, device, chunk_tokens, max_batch",
        ),
        (
            MODEL + "pools: {prefill: {workers: -1}}",
            "pools.prefill.workers: found -1; allowed: an integer from 0 to 1024",
        ),
        (
            MODEL + "pools: {prefill: {workers: true}}",
            "pools.prefill.workers: found True; allowed: an integer from 0 to 1024",
        ),
        (
            MODEL + "pools: {prefill: {workers: '2'}}",
            "pools.prefill.workers: found '2'; allowed: an integer from 0 to 1024",
        ),
        (
            MODEL + "pools: {prefill: {chunk_tokens: lots}}",
            "pools.prefill.chunk_tokens: found 'lots'; allowed: an integer, at least 1, or auto",
        ),
        (
            MODEL + "pools: {prefill: {device: gpu}}",
            "pools.prefill.device: found 'gpu'; allowed: auto, cpu, cuda, or one GPU: cuda:0",
        ),
        (
            MODEL + "kv: {memory: 5GB}",
            "kv.memory: found '5GB'; allowed: a fraction such as 0.85, "
            "a size such as 512MiB or 2GiB, or auto",
        ),
        (
            MODEL + "kv: {memory: 1.5}",
            "kv.memory: found 1.5; allowed: a fraction such as 0.85, "
            "a size such as 512MiB or 2GiB, or auto",
        ),
        (
            MODEL + "kv: {prefix_cache: maybe}",
            "kv.prefix_cache: found 'maybe'; allowed: true or false",
        ),
        (
            MODEL + "kv_transfer: {lease_s: .inf}",
            "kv_transfer.lease_s: found inf; allowed: seconds, more than 0",
        ),
        (
            MODEL + "slo: {ttft_ms: .nan}",
            "slo.ttft_ms: found nan; allowed: milliseconds, more than 0",
        ),
        (
            MODEL + "router: {port: 70000}",
            "router.port: found 70000; allowed: a port from 0 to 65535 (0: any free one)",
        ),
        (
            MODEL + "router: {control: here}",
            "router.control: found 'here'; allowed: an address such as "
            "tcp://192.168.1.10:8100 or null",
        ),
        (MODEL + "launcher: k8s", "launcher: found 'k8s'; allowed: local"),
        (
            MODEL + "pools: {}",
            "pools: no workers; give pools.prefill.workers and pools.decode.workers "
            "(or pools.mixed.workers) at least 1, or router.control for workers to join",
        ),
        (
            MODEL + "router: {policy: disaggregated}\npools: {mixed: {workers: 1}}",
            "router.policy: disaggregated needs a worker to prefill and another to decode; "
            "give pools.prefill.workers and pools.decode.workers at least 1",
        ),
        ("a: b: c", "not valid YAML: line 1, column 5: mapping values are not allowed here"),
        (MODEL + MODEL, "not valid YAML: line 2, column 1: the key model stands twice"),
        (
            "model: {path: m, path: n}",
            "not valid YAML: line 1, column 18: the key path stands twice",
        ),
        ("{[a]: 1}", "not valid YAML: line 1, column 2: found unhashable key"),
        (MODEL + "x: 2020-99-99", "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_fault_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    assert fault(tmp_path, text) == sentence


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    sentence = fault(tmp_path, MODEL + f"launcher: {'k' * 500}")
    assert sentence.endswith("k...; allowed: local")
    assert len(sentence) < 130


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    sentence = fault(tmp_path, "!!python/object/apply:os.system [exit 1]")
    assert "could not determine a constructor" in sentence


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file or directory"):
        config.load(missing)
    with pytest.raises(ConfigError, match="is a directory"):
        config.load(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"not a text file \(byte 3 is not UTF-8\)"):
        config.load(binary)


def test_workers_of_other_hosts_may_be_the_only_ones(tmp_path: Path) -> None:
    router = "router: {control: 'tcp://0.0.0.0:8100', policy: disaggregated}"
    assert workers(read(tmp_path, MODEL + "pools: {}\n" + router)) == (0, 0, 0)


def test_set_changes_one_key(tmp_path: Path) -> None:
    text = MODEL + "router: {port: 1, host: h}"
    deployment = read(tmp_path, text, "router.port=8080", "model.dtype=fp32", "kv.memory=1GiB")
    assert (deployment.router.port, deployment.router.host) == (8080, "h")
    assert deployment.model.dtype is Dtype.FP32
    assert deployment.kv.memory == "1GiB"


def test_set_on_absent_pools_keeps_the_other_default_pool(tmp_path: Path) -> None:
    assert workers(read(tmp_path, MODEL, "pools.decode.workers=2")) == (1, 2, 0)


def test_set_takes_whole_sections(tmp_path: Path) -> None:
    assert workers(read(tmp_path, MODEL, "pools={mixed: {workers: 1}}")) == (0, 0, 1)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "router.port",
            "--set router.port: found no key=value; allowed: for example --set router.port=8080",
        ),
        (
            "router..port=1",
            "--set router..port=1: found no key=value; allowed: for example --set router.port=8080",
        ),
        ("model.path.x=1", "--set model.path.x=1: model.path is 'm', not a section"),
        (
            "kv={",
            "--set kv={: not valid YAML: line 1, column 2: "
            "expected the node content, but found '<stream end>'",
        ),
        ("router.prot=1", "router.prot: unknown key; did you mean port?"),
        (
            "router.port=x",
            "router.port: found 'x'; allowed: a port from 0 to 65535 (0: any free one)",
        ),
    ],
)
def test_a_bad_set_is_one_sentence(tmp_path: Path, override: str, sentence: str) -> None:
    assert fault(tmp_path, MODEL, override) == sentence


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5KiB", 1536), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "5GB", "-1GiB", "0MiB", "GiB", "infGiB", "nanMiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("faults: {kv: {drop: 2.0}}", "faults.kv.drop: found 2.0; allowed: a share from 0 to 1"),
        ("faults: {control: {dorp: 0.1}}", "faults.control.dorp: unknown key; did you mean drop?"),
        ("faults: {control: {damage: 0.1}}", "faults.control.damage: unknown key; "),
        (
            "faults: {kv: {damage: 0.1}}\nkv_transfer: {checksums: 'off'}",
            "faults.kv.damage: nothing would notice it; it needs kv_transfer.checksums",
        ),
    ],
)
def test_faults_that_can_not_be(tmp_path: Path, text: str, said: str) -> None:
    assert fault(tmp_path, f"{MODEL}{text}\n").startswith(said)


def test_faults_are_off_unless_asked_for(tmp_path: Path) -> None:
    assert not read(tmp_path, MODEL).faults.any
    assert read(tmp_path, MODEL, "faults.control.drop=0.1").faults.any
