"""The command line: what it says, how it exits, how little it imports."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pdserve
from pdserve import cli
from pdserve.core import config

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "configs" / "smollm2.yaml"


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(pdserve.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["check", str(SMOLLM2)]])
def test_it_needs_no_torch_and_no_sockets_to_help_and_check(arguments: list[str]) -> None:
    done = run_apart(
        "import sys\n"
        "from pdserve.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'zmq', 'aiohttp', 'transformers', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_help_shows_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "pdserve serve configs/smollm2.yaml" in text
    assert "prepare" not in text  # what only `serve` starts is not listed
    listed = [
        line.split()[0] for line in text.splitlines() if line[:5].strip() and line[:4] == "    "
    ]
    assert listed == [
        *("serve", "check", "worker", "status", "chat", "scale", "keys"),
        *("simulate", "bench", "completion"),
    ]


@pytest.mark.parametrize(
    "command",
    ["serve", "check", "worker", "status", "chat", "scale", "keys", "bench", "completion"],
)
def test_every_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    about, _, examples = capsys.readouterr().out.partition("examples:\n")
    assert about.startswith(f"usage: pdserve {command}")
    assert f"  pdserve {command} " in examples


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "status" in script and "prefill" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)
        completed = subprocess.run(
            ["bash", "-c", f"{script}\n{_COMPLETE}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        assert completed.stdout.split() == ["status"]


_COMPLETE = """
COMP_WORDS=(pdserve sta); COMP_CWORD=1; COMP_LINE="pdserve sta"; COMP_POINT=11
_shtab_pdserve; echo "${COMPREPLY[@]}"
"""


def test_examples_are_right() -> None:
    """Each parses, as far as a shell would get."""
    for text in cli._EXAMPLES.values():
        for line in filter(None, (line.strip() for line in text.splitlines())):
            words = shlex.split(
                line.partition(" > ")[0]
                .partition(" | ")[0]
                .partition(" < ")[0]
                .partition(" 2> ")[0]
            )
            if words[0] == "pdserve" and "--help" not in words:
                cli._parser().parse_args(words[1:])


def test_check_says_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(SMOLLM2), "--set", "pools.decode.workers=3"]) == 0
    out = capsys.readouterr().out
    assert out == f"{SMOLLM2}: right: smollm2 on 1 prefill, 3 decode, 0 mixed\n"


def test_a_wrong_file_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("model: {path: m}\nrouter: {prot: 1}\n")
    for command in ("check", "serve"):
        assert cli.main([command, str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.err == f"pdserve: {file}: router.prot: unknown key; did you mean port?\n"
        assert captured.out == ""


def test_a_port_off_loopback_wants_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("model: {path: m}\nrouter: {control: 'tcp://0.0.0.0:8100'}\n")
    assert cli.main(["check", str(file)]) == 2
    assert "can be reached from other hosts; give security.keys" in capsys.readouterr().err
    assert cli.main(["check", str(file), "--set", "security.insecure=true"]) == 0


def test_the_port_option_is_a_key_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(SMOLLM2), "--port", "70000"]) == 2
    assert "router.port: found 70000; allowed: a port" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sevre"],
        ["serve"],
        ["worker", str(SMOLLM2), "--role", "prefil", "--join", "tcp://h:1"],
        ["worker", str(SMOLLM2), "--role", "prefill"],
        ["keys", "old", "d"],
        ["serve", str(SMOLLM2), "--port", "x"],
    ],
)
def test_wrong_use_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: pdserve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("security.api_keys=missing.yaml", "security.api_keys: missing.yaml: no such file"),
        ("security.tls_cert=missing.pem", "give both, or neither"),
        ("security={tls_cert: a.pem, tls_key: b.pem}", "a.pem and b.pem are no certificate"),
    ],
)
def test_files_that_it_names_are_looked_at(
    setting: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(SMOLLM2), "--set", setting]) == 2
    assert sentence in capsys.readouterr().err


def test_keys_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert cli.main(["keys", "new", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert capsys.readouterr().out.startswith(f"{file}: ")
    assert cli.main(["keys", "new", str(folder)]) == 2
    assert f"pdserve: {file} exists" in capsys.readouterr().err


def test_the_status_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pdserve: no answer from http://127.0.0.1:1/live: ")
    assert error.count("\n") == 1


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupted)
    assert cli.main(["check", str(SMOLLM2)]) == 130
