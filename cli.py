"""The command ``pdserve``. A room is imported by the command that needs it: most need no torch."""

from __future__ import annotations

import argparse
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .core import config, logs
from .core.config import Deployment, EngineKind, Policy
from .core.errors import ConfigError, PdserveError
from .core.ids import Role
from .core.orphans import die_with_parent
from .core.supervised import SENTENCE
from .simulation.options import add_options as add_simulation_options

Run = Callable[[argparse.Namespace], int]

_DEFAULT_URL = "http://127.0.0.1:8000"
_SHELLS = ("bash", "zsh", "tcsh")
_EXAMPLES = {
    "": """
  pdserve serve configs/smollm2.yaml
  pdserve chat
  pdserve status --watch
  pdserve serve configs/smollm2.yaml --port 8080 --set pools.decode.workers=2
  pdserve check configs/two-hosts.yaml
  pdserve keys new ./keys
  pdserve worker --role decode --join tcp://192.168.1.10:8100 configs/two-hosts.yaml""",
    "serve": """
  pdserve serve configs/smollm2.yaml
  pdserve serve configs/smollm2.yaml --port 0 --set pools.decode.workers=2
  pdserve serve deployment.yaml --set observability.log_format=json 2> pdserve.log""",
    "check": """
  pdserve check configs/smollm2.yaml
  pdserve check deployment.yaml --set kv.memory=2GiB""",
    "worker": """
  pdserve worker --role decode --join tcp://192.168.1.10:8100 configs/two-hosts.yaml
  pdserve worker --role prefill --device cuda:1 --join tcp://router:8100 deployment.yaml""",
    "status": """
  pdserve status
  pdserve status http://192.168.1.10:8000 --watch
  pdserve status --json | jq .recent""",
    "chat": """
  pdserve chat
  pdserve chat "Why is the sky blue?" --max-tokens 64
  pdserve chat --url http://192.168.1.10:8000 --system "Answer in one sentence."
  pdserve chat < question.txt""",
    "scale": """
  pdserve scale --prefill 1 --decode 3
  pdserve scale http://127.0.0.1:8080 --mixed 2""",
    "keys": """
  pdserve keys new ./keys
  scp -r keys second:pdserve/
  pdserve keys api api-keys.yaml alice --requests-per-minute 600 --max-concurrent 16""",
    "completion": """
  pdserve completion bash > ~/.local/share/bash-completion/completions/pdserve
  pdserve completion zsh > ~/.zfunc/_pdserve""",
    "simulate": """
  pdserve simulate configs/two-gpu.yaml --trace 2048/256 --rate 16
  pdserve simulate configs/two-gpu.yaml --trace azure-code.csv.gz --rate 12 --capacity
  pdserve simulate deployment.yaml --trace mooncake.jsonl --rate 2 --set pools.decode.workers=3""",
    "bench": """
  pdserve bench serve --workload chat --rate 4
  pdserve bench goodput --workload 2048/256 --slo 200/15
  pdserve bench compare a.yaml b.yaml --workload chat --out results
  pdserve bench report results
  pdserve bench engine --help""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (can't), 2 (wrong use or file), 130 (interrupted)."""
    arguments = _parser().parse_args(argv)
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    run: Run = arguments.run
    try:
        return run(arguments)
    except PdserveError as error:
        print(f"{SENTENCE}{' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdserve",
        description="Serves a language model from two pools of workers: prefill and decode.",
        epilog=f"examples:{_EXAMPLES['']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parent=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: Run | None, about: str | None = None) -> argparse.ArgumentParser:
        """Without a text it is not listed."""
        if about is None:
            made = commands.add_parser(name)
        else:
            made = commands.add_parser(
                name,
                help=about,
                description=f"{about[0].upper()}{about[1:]}.",
                epilog=f"examples:{_EXAMPLES[name]}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        if run is not None:
            made.set_defaults(run=run)
        return made

    serve = command("serve", _serve, "bring a deployment up and keep it until Ctrl-C")
    _takes_file(serve)
    serve.add_argument("--port", type=int, metavar="N", help="the same as --set router.port=N")

    check = command("check", _check, "say whether a deployment file is right")
    _takes_file(check)

    worker = command("worker", _worker, "run one worker that joins a router elsewhere")
    _takes_file(worker)
    worker.add_argument("--role", required=True, choices=[role.value for role in Role])
    worker.add_argument(
        "--join", required=True, metavar="ENDPOINT", help="the router's, tcp://HOST:PORT"
    )
    worker.add_argument("--id", metavar="NAME", help="unique among the workers; default: a new one")
    worker.add_argument("--device", default="auto", metavar="D", help="cpu, cuda:N, default auto")

    status = command("status", _status, "show how a running deployment is")
    status.add_argument("url", nargs="?", default=_DEFAULT_URL, help=f"default {_DEFAULT_URL}")
    how = status.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=1.0,
        metavar="SECONDS",
        help="keep it up to date until Ctrl-C; every second",
    )
    how.add_argument("--json", action="store_true", help="all of it, for programs")

    chat = command("chat", _chat, "talk to a running deployment")
    chat.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="answered once; without it, a conversation"
    )
    chat.add_argument("--url", default=_DEFAULT_URL, help=f"default {_DEFAULT_URL}")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    chat.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    chat.add_argument(
        "--route",
        choices=[Policy.DISAGGREGATED.value, Policy.COLOCATED.value],
        help="two workers, or one; default: the router's choice",
    )

    scale = command("scale", _scale, "give the workers of a running deployment other roles")
    scale.add_argument("url", nargs="?", default=_DEFAULT_URL, metavar="URL")
    for role in Role:
        scale.add_argument(f"--{role}", type=int, default=0, metavar="N", help="so many of them")
    scale.add_argument("--auto", action="store_true", help="the planner's choice again")

    keys = command("keys", None, "make the keys that hosts share, or one for a client of the API")
    actions = keys.add_subparsers(required=True, metavar="WHAT", title="keys")
    new = actions.add_parser("new", help="the keys that the hosts of one deployment share")
    new.set_defaults(run=_keys_new)
    _completes(new.add_argument("folder", type=Path, metavar="DIR"), "DIRECTORY")
    api = actions.add_parser("api", help="a key for a client: printed once, its hash kept in FILE")
    api.set_defaults(run=_keys_api)
    _completes(api.add_argument("file", type=Path, metavar="FILE"), "FILE")
    api.add_argument("name", metavar="NAME", help="whose it is; it stands in the log")
    api.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no limit")
    api.add_argument("--max-concurrent", type=int, metavar="N", help="default: no limit")

    about = "try a deployment's policies on a load, in virtual time, without any GPU"
    simulated = command("simulate", _simulate, about)
    _takes_file(simulated)
    add_simulation_options(simulated)

    bench = command("bench", _bench, "measure: see `pdserve bench serve --help`")
    kinds = ["serve", "goodput", "compare", "report", "engine", "transfer", "router", "policies"]
    bench.add_argument("what", choices=kinds)
    bench.add_argument("options", nargs=argparse.REMAINDER)

    completion = command("completion", _completion, "print what makes a shell complete pdserve")
    completion.add_argument("shell", choices=_SHELLS)

    # What `serve` starts. They take the resolved file of its run folder.
    prepare = command("prepare", _prepare)
    _takes_file(prepare)
    prepare.add_argument("--devices", type=Path, required=True)
    router = command("router", _router)
    _takes_file(router)
    router.add_argument("--run-dir", type=Path, required=True)
    for child in (prepare, router):
        child.add_argument("--card", type=Path, required=True)
    hidden = argparse.SUPPRESS
    worker.add_argument("--card", type=Path, help=hidden)
    worker.add_argument("--memory-share", type=float, default=1.0, help=hidden)
    worker.add_argument("--threads", type=int, help=hidden)
    for child in (prepare, router, worker):
        child.add_argument("--parent", type=int, help=hidden)
    return parser


def _takes_file(parser: argparse.ArgumentParser) -> None:
    file = parser.add_argument("file", type=Path, metavar="FILE", help="a deployment, YAML")
    _completes(file, "FILE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one key of the file, such as pools.decode.workers=2; may be repeated",
    )


def _completes(argument: argparse.Action, kind: str) -> None:
    """What a shell offers for it, read by ``shtab``."""
    argument.complete = _PATHS[kind]  # type: ignore[attr-defined]


_PATHS = {
    "FILE": {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"},
    "DIRECTORY": {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"},
}


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("allowed: 0.1 to 3600 seconds")
    return seconds


def _deployment(arguments: argparse.Namespace) -> Deployment:
    return config.load(arguments.file, arguments.overrides)


def _serve(arguments: argparse.Namespace) -> int:
    from .deploy import local

    if arguments.port is not None:
        arguments.overrides.append(f"router.port={arguments.port}")
    deployment = _deployment(arguments)
    logs.setup(deployment.observability.log_format)
    return local.serve(deployment)


def _check(arguments: argparse.Namespace) -> int:
    from .core.api_keys import all_keys
    from .core.tls import tls_context

    deployment = _deployment(arguments)
    if deployment.router.control is not None:
        from .core.keys import require_safe_bind

        require_safe_bind(deployment.router.control, deployment.security)
    all_keys(deployment.security.api_keys)
    tls_context(deployment.security)
    pools = deployment.pools
    print(
        f"{arguments.file}: right: {deployment.model.path} on {pools.prefill.workers} prefill, "
        f"{pools.decode.workers} decode, {pools.mixed.workers} mixed"
    )
    return 0


def _worker(arguments: argparse.Namespace) -> int:
    from .core.card import ModelCard
    from .deploy.devices import usable_cores
    from .worker import process

    deployment = _deployment(arguments)
    logs.setup(deployment.observability.log_format)
    if arguments.card is not None:
        card = ModelCard.read(arguments.card)
    else:  # on a host of its own
        from .engine.prepare import prepare

        card = prepare(deployment.model)
    role = Role(arguments.role)
    post = process.Post(
        role=role,
        worker_id=arguments.id or f"{role}-{socket.gethostname()[:64]}-{secrets.token_hex(4)}",
        join=arguments.join,
        device=arguments.device,
        memory_share=arguments.memory_share,
        num_threads=arguments.threads or usable_cores(),
    )
    return process.run(deployment, card, post)


def _prepare(arguments: argparse.Namespace) -> int:
    from .deploy.devices import Devices, usable_cores
    from .engine.prepare import count_gpus, prepare

    deployment = _deployment(arguments)
    logs.setup(deployment.observability.log_format)
    prepare(deployment.model).save(arguments.card)
    simulated = deployment.engine is EngineKind.SIMULATED
    Devices(0 if simulated else count_gpus(), usable_cores()).save(arguments.devices)
    return 0


def _router(arguments: argparse.Namespace) -> int:
    from .core.card import ModelCard
    from .router import process

    deployment = _deployment(arguments)
    logs.setup(deployment.observability.log_format)
    return process.run(deployment, ModelCard.read(arguments.card), arguments.run_dir)


def _status(arguments: argparse.Namespace) -> int:
    from .deploy import status

    if arguments.json:
        status.show_json(arguments.url)
    elif arguments.watch is not None:
        status.watch(arguments.url, arguments.watch)
    else:
        status.show(arguments.url)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from .deploy import chat

    options = chat.Options(
        arguments.url,
        arguments.max_tokens,
        arguments.temperature,
        arguments.system,
        arguments.route,
    )
    return chat.run(options, arguments.message)


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(_parser(), arguments.shell))
    return 0


def _scale(arguments: argparse.Namespace) -> int:
    from .deploy import status
    from .deploy.scale import scale

    wanted = {role: getattr(arguments, role) for role in Role}
    if arguments.auto and any(wanted.values()):
        raise ConfigError("--auto: found numbers beside it; allowed: one of the two")
    scale(arguments.url, None if arguments.auto else wanted)
    status.show(arguments.url)
    return 0


def _keys_api(arguments: argparse.Namespace) -> int:
    from .core.api_keys import add_key

    made = add_key(
        arguments.file, arguments.name, arguments.requests_per_minute, arguments.max_concurrent
    )
    print(made.secret)
    print(
        f"{made.entry.name}: the key stands above and nowhere else; {arguments.file} has its hash "
        f"(security.api_keys: {arguments.file})",
        file=sys.stderr,
    )
    return 0


def _keys_new(arguments: argparse.Namespace) -> int:
    from .core.keys import new_keys

    print(f"{new_keys(arguments.folder)}: copy the folder to each host; who has it is a member")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from .simulation import command

    return command.main(_deployment(arguments), arguments)


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.what == "policies":
        from .bench import policies

        return policies.main(arguments.options)
    if arguments.what == "transfer":
        from .bench import transfer

        return transfer.main(arguments.options)
    if arguments.what == "router":
        from .bench import router

        return router.main(arguments.options)
    if arguments.what == "engine":
        from .bench import engine

        return engine.main(arguments.options)
    from .bench.slo import commands

    return commands.main(arguments.what, arguments.options)


if __name__ == "__main__":
    sys.exit(main())
