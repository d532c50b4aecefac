"""What can't be brought up: one sentence that says what to do, its exit code, nothing left.

Each case is the whole command. What the parts say of each kind of damage is tested beside
them: ``tests/engine/test_prepare.py``, ``tests/core/test_config.py``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import served

LIMIT_S = 120.0  # some seconds on an idle machine
REAL = ("--set", "engine=torch")  # loads the weights

DEPLOYMENT = """
engine: simulated
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 1, device: cpu}
router: {port: 0}
"""

# A disk of so many KiB for the run folder, shared memory of its own, and a look at what is left
OWN_MOUNTS = """
mount -t tmpfs -o size="$1"k,mode=700 none "$2" || exit 77
mount -t tmpfs -o size=512m none /dev/shm || exit 77
shift 2
"$@"
code=$?
ls "$XDG_RUNTIME_DIR/pdserve" /dev/shm | grep -v ':$' | sed '/^$/d; s/^/left: /'
exit $code
"""
SMALL_FILES = 1000  # bytes, the largest that may be written


def _damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    return _damage("config.json", lambda old: json.dumps({**json.loads(old), **changes}).encode())


def _as_it_is(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    name: str
    code: int
    sentence: str  # how it begins; {file} is the deployment, {model} and {run} are folders
    damage: Callable[[Path], None] = _as_it_is
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(
        "an unknown key",
        2,
        "{file}: routr: unknown key; did you mean router?",
        arguments=("--set", "routr.port=1"),
    ),
    Case(
        "no such model",
        2,
        "model.path: found '{model}', which does not exist; allowed: a folder with config.json",
        damage=shutil.rmtree,
    ),
    Case(
        "weights cut short",
        1,
        "{model}/model.safetensors: damaged: it has ",
        damage=_damage("model.safetensors", lambda old: old[:-1000]),
    ),
    Case(
        "weights of another length",
        1,
        "{model}/model.safetensors: damaged: it has ",
        damage=_damage("model.safetensors", lambda old: old + bytes(1000)),
    ),
    Case(
        "a broken header",
        1,
        "{model}/model.safetensors: damaged: its header can't be read; copy or download it again",
        damage=_damage("model.safetensors", lambda old: old[:9] + b"\0\0" + old[11:]),
    ),
    Case(
        "no tokenizer",
        1,
        "{model}: no tokenizer.json",
        damage=lambda folder: (folder / "tokenizer.json").unlink(),
    ),
    Case(
        "a damaged tokenizer",
        1,
        "{model}/tokenizer.json can't be read: ",
        damage=_damage("tokenizer.json", lambda old: old[:200]),
    ),
    Case(
        "a chat template that is no text",
        1,
        "{model}/chat_template.jinja can't be read: ",
        damage=lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe"),
    ),
    Case(
        "an architecture that is not run",
        1,
        "{model}/config.json: architecture GPT2LMHeadModel is not supported; supported are ",
        damage=_config(architectures=["GPT2LMHeadModel"]),
    ),
    Case(
        "the config of another model",
        1,
        "{model}/model.safetensors: model.embed_tokens.weight is [307, 48], "
        "config.json says [307, 96]",
        damage=_config(hidden_size=96),
        arguments=REAL,
    ),
    Case(
        "a GPU where there is none",
        2,
        "pools.decode.device: found 'cuda:0'; allowed: auto or cpu (no GPU is usable here)",
        arguments=("--set", "pools.decode.device=cuda:0"),
    ),
    Case(
        "more KV cache than memory",
        1,
        "this host has no ",
        arguments=("--set", "kv.memory=99999GiB"),
    ),
]


@dataclass(frozen=True)
class Place:
    """A deployment file with its model and its run folder, all of which may be damaged."""

    file: Path
    model: Path
    run: Path

    def serve(
        self,
        arguments: Sequence[str],
        before: Sequence[str] = (),
        limits: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *served.command("serve", str(self.file), *arguments)],
            env=served.environment() | {"XDG_RUNTIME_DIR": str(self.run)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            preexec_fn=limits,
        )

    def refuses(self, ended: subprocess.CompletedProcess[str], code: int, sentence: str) -> None:
        """One sentence, the right exit code, and nothing left."""
        begins = "pdserve: " + sentence.format(file=self.file, model=self.model, run=self.run)
        said = [line for line in ended.stderr.splitlines() if line.startswith("pdserve: ")]
        assert "Traceback" not in ended.stderr, ended.stderr
        assert len(said) == 1 and said[0].startswith(begins), (begins, ended.stderr)
        assert ended.stderr.splitlines()[-1] == said[0], ended.stderr
        assert (ended.returncode, ended.stdout) == (code, "")
        self.nothing_is_left()

    def nothing_is_left(self) -> None:
        base = self.run / "pdserve"
        assert not base.is_dir() or [path.name for path in base.iterdir()] in ([], [".lock"])
        assert processes_of(self.run) == []


def processes_of(run: Path) -> list[int]:
    """Those that were given a file of the run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(run) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # ended meanwhile
    return found


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models
    from transformers import LlamaConfig

    from pdserve.engine.presets import write_tokenizer

    folder = tmp_path_factory.mktemp("whole") / "model"
    sizes = tiny_models.SIZES | {"hidden_size": 48, "intermediate_size": 80}
    tiny_models.save(LlamaConfig(**sizes, tie_word_embeddings=True), folder)
    write_tokenizer(folder, tiny_models.VOCAB)
    return folder


def _place(whole_model: Path, folder: Path) -> Place:
    model, run, file = folder / "model", folder / "run", folder / "deployment.yaml"
    shutil.copytree(whole_model, model)
    run.mkdir(mode=0o700)
    file.write_text(f"model: {{path: {model}}}\n{DEPLOYMENT}")
    return Place(file, model, run)


@pytest.fixture
def place(whole_model: Path) -> Iterator[Place]:
    # pytest's own folders are too deep for the path of a unix socket
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield _place(whole_model, Path(folder))


@pytest.fixture(scope="module")
def neighbour(whole_model: Path) -> Iterator[tuple[Place, str]]:
    """A deployment that is up, and its port."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = _place(whole_model, Path(folder))
        with served.serve(place.file, env={"XDG_RUNTIME_DIR": str(place.run)}) as server:
            yield place, server.url.rpartition(":")[2]
        place.nothing_is_left()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_sentence(case: Case, place: Place) -> None:
    case.damage(place.model)
    place.refuses(place.serve(case.arguments), case.code, case.sentence)


def _unprivileged() -> list[str]:
    """Before a command: root may read all files, and is to be held to their permissions."""
    if os.getuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    without = "-dac_override,-dac_read_search"
    before = [setpriv or "", "--bounding-set", without, "--inh-caps", without]
    if setpriv is None or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("root can't be held to permissions here")
    return before


@pytest.mark.parametrize(
    ("closed", "sentence"),
    [
        ("model/model.safetensors", "{model}/model.safetensors: permission denied"),
        ("model", "{model}/config.json: permission denied"),
        ("", "{file}: permission denied"),
    ],
)
def test_no_permission(closed: str, sentence: str, place: Place) -> None:
    path = place.file if not closed else place.file.parent / closed
    before, mode = _unprivileged(), path.stat().st_mode
    path.chmod(0)
    try:
        ended = place.serve((), before)
    finally:
        path.chmod(mode)
    place.refuses(ended, 2 if path == place.file else 1, sentence)


def test_a_model_in_a_folder_that_may_not_be_entered(place: Place) -> None:
    before, outer = _unprivileged(), place.file.parent / "outer"
    outer.mkdir()
    moved = place.model.rename(outer / "model")
    outer.chmod(0)
    try:
        ended = place.serve(("--set", f"model.path={moved}"), before)
    finally:
        outer.chmod(0o700)
    place.refuses(ended, 1, f"model.path: {moved}: permission denied")


def test_a_run_folder_that_is_none(place: Place) -> None:
    (place.run / "pdserve").write_text("")
    ended = place.serve(())
    place.refuses(ended, 1, "no run folder in {run}/pdserve: file exists; set XDG_RUNTIME_DIR to ")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_run_folder_of_another_user(place: Place) -> None:
    (place.run / "pdserve").mkdir()
    os.chown(place.run / "pdserve", 12345, 12345)
    place.refuses(place.serve(()), 1, "{run}/pdserve belongs to someone else; set XDG_RUNTIME_DIR")


def test_files_that_may_not_grow(place: Place) -> None:
    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, SMALL_FILES))

    ended = place.serve((), limits=limits)
    (name,) = re.findall(r"/pdserve/\w+/(\S+) can't be written", ended.stderr)
    assert name == "deployment.json"
    said = ended.stderr.splitlines()[-1]
    assert said.endswith(
        ": file too large; make room there, or set XDG_RUNTIME_DIR to a folder that has some"
    )
    place.refuses(ended, 1, "{run}/pdserve/")


@pytest.mark.parametrize(("kib", "file"), [(4, "card.json"), (16, "http.json")])
def test_a_full_disk(kib: int, file: str, place: Place) -> None:
    """Whoever comes to write the next file of the run folder: the preparing child, the router."""
    if resource.getpagesize() != 4096 or (unshare := shutil.which("unshare")) is None:
        pytest.skip("a disk of a few pages can't be made here")
    own = [unshare, "-m"] if os.getuid() == 0 else [unshare, "-rm"]
    before = [*own, "sh", "-c", OWN_MOUNTS, "sh", str(kib), str(place.run)]
    ended = place.serve((), before)
    if ended.returncode in (1, 77) and "pdserve: " not in ended.stderr:
        pytest.skip(f"nothing may be mounted here: {ended.stderr}")
    assert f"/{file} can't be written: no space left on device; make room there" in ended.stderr
    place.refuses(ended, 1, "{run}/pdserve/")


def test_a_taken_port_and_two_side_by_side(neighbour: tuple[Place, str], place: Place) -> None:
    other, port = neighbour
    ended = place.serve(("--set", f"router.port={port}"))
    place.refuses(ended, 1, f"router.port: 127.0.0.1:{port} can't be bound: ")
    # on a port of its own it comes up, in the other's run folder, and leaves it alone
    with served.serve(place.file, env={"XDG_RUNTIME_DIR": str(other.run)}) as server:
        folders = [path for path in (other.run / "pdserve").iterdir() if path.is_dir()]
        assert len(folders) == 2
        for url in (server.url, f"http://127.0.0.1:{port}"):
            with urllib.request.urlopen(f"{url}/ready", timeout=30) as answer:
                assert answer.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
        assert answer.status == 200


def test_a_signal_in_the_middle_leaves_nothing(place: Place) -> None:
    process = subprocess.Popen(
        served.command("serve", str(place.file)),
        env=served.environment() | {"XDG_RUNTIME_DIR": str(place.run)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting decode-0" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "Traceback" not in rest, rest
    place.nothing_is_left()
