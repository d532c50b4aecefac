"""``pdserve bench serve | goodput | compare | report``: the options, and what each does."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from . import live, report
from .compare import Comparison, Entry, Task, checked
from .folder import Folder
from .goodput import Budget, OutOfTime, Search, measure
from .measures import Objectives
from .prompts import PromptKind
from .runs import LoadSpec
from .search import Settings
from .servers import Server, probe
from .staircases import Flight
from .verdict import read_peer

_URL = "http://127.0.0.1:8000"
_OF_A_CALL = ("servers", "out", "resume", "budget", "shares", "no_report")  # and not of the plan
_EXAMPLES = {
    "serve": """examples:
  pdserve bench serve --workload chat --rate 4
  pdserve bench serve http://gpu:8000 --workload 2048/256 --concurrency 32 --out results
  pdserve bench serve --workload trace:mooncake.jsonl.gz --arrivals trace --time-scale 2""",
    "goodput": """example:
  pdserve bench goodput --workload 2048/256 --start 8 --slo 500/30 --slo 200/15 --out results""",
    "compare": """example:
  pdserve bench compare split.yaml colocated.yaml --workload 2048/256@16 --workload 512/512@30 \\
    --slo 200/15 --out results --budget 480
  pdserve bench compare --resume results --budget 480        # the same, where it was left""",
    "report": """example:
  pdserve bench report results""",
}


def main(what: str, argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 (a run that is invalid), 3 (compare: not all done yet)."""
    parser = argparse.ArgumentParser(
        prog=f"pdserve bench {what}",
        epilog=_EXAMPLES[what],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options, run = _COMMANDS[what]
    options(parser)
    return run(parser.parse_args(argv))


def _load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the load")
    add = group.add_argument
    add("--arrivals", choices=["poisson", "gamma", "constant", "trace"], default="poisson")
    add("--burstiness", type=float, default=1.0, help="gamma's shape: 1 is Poisson, less burstier")
    add("--time-scale", type=float, default=1.0, help="a trace, so many times as fast")
    add("--duration", type=float, default=30.0, metavar="S", help="seconds of arrivals")
    add("--warmup", type=float, default=3.0, metavar="S", help="the first of them don't count")
    add("--prompts", choices=[kind.value for kind in PromptKind], default="tokens")
    add("--vocab", type=int, default=32000, metavar="N", help="token ids are below it")
    add("--lengths", type=float, default=1.0, metavar="F", help="all lengths times this")
    add("--seed", type=int, default=0)
    add("--clients", type=int, default=1, metavar="N", help="client processes")
    add("--timeout", type=float, default=120.0, metavar="S", help="of a request")
    add("--temperature", type=float, default=0.0)
    add("--no-ignore-eos", action="store_true", help="answers may end before their length")
    add("--max-requests", type=int, default=4000, metavar="N", help="of a closed loop")


def _server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default=_URL, help=f"default {_URL}")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--name", default="", help="what the report calls the server")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="that the server has")


def _search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the search")
    group.add_argument("--target", type=float, default=0.9, help="attainment: 0.9, or 0.99")
    group.add_argument("--tolerance", type=float, default=0.05, help="of the rate that is found")
    group.add_argument("--lowest", type=float, default=0.1, help='below it is "not met"')
    group.add_argument("--highest", type=float, default=1000.0)
    group.add_argument("--min-requests", type=int, default=30, help="a run lasts for so many")
    group.add_argument(
        "--no-tell",
        action="store_true",
        help="don't tell a server of ours what each request should meet; saves runs",
    )
    group.add_argument("--budget", type=float, metavar="S", help="start no run that ends later")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    _server_options(parser)
    parser.add_argument("--workload", default="chat", help="see docs/benchmarks.md")
    parser.add_argument("--rate", type=float, help="requests a second: an open loop")
    parser.add_argument("--concurrency", type=int, help="requests at once: a closed loop")
    parser.add_argument("--slo", action="append", default=[], metavar="TTFT/TPOT", help="ms")
    parser.add_argument("--out", type=Path, help="the folder of results; default: a new one")
    _load_options(parser)


def _goodput_options(parser: argparse.ArgumentParser) -> None:
    _server_options(parser)
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--start", type=float, default=1.0, help="the first rate to try")
    parser.add_argument("--slo", action="append", default=[], metavar="TTFT/TPOT", help="ms")
    parser.add_argument("--out", type=Path)
    _search_options(parser)
    _load_options(parser)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("servers", nargs="*", metavar="[NAME=]FILE_OR_URL")
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="W[@RATE]",
        help="with the first rate to try, or with the rates to run: 2048/256@4,8,16",
    )
    parser.add_argument("--slo", action="append", default=[], metavar="TTFT/TPOT", help="ms")
    parser.add_argument(
        "--staircase",
        action="store_true",
        help="hold the rates of W@R1,R2,.. in one run, each for --duration, from R1 up to the "
        "first that is missed; capacity is interpolated",
    )
    parser.add_argument(
        "--shares",
        metavar="N,N,..",
        help="of the budget for each server; default: the first ones take what they need",
    )
    parser.add_argument("--no-report", action="store_true", help="only keep the runs, for report")
    parser.add_argument("--rounds", type=int, default=1, help="each visits every server once")
    parser.add_argument("--gpus", type=int, metavar="N", help="of each; default: its workers")
    parser.add_argument("--start-limit", type=float, default=300.0, metavar="S")
    parser.add_argument("--accept-divergence", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with that folder's plan")
    _search_options(parser)
    _load_options(parser)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--peer", type=Path, metavar="JSON", help="figures to set beside")


def _load(arguments: argparse.Namespace, workload: str) -> LoadSpec:
    return LoadSpec(
        workload=workload,
        arrivals=arguments.arrivals,
        burstiness=arguments.burstiness,
        time_scale=arguments.time_scale,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
        prompts=PromptKind(arguments.prompts),
        vocab_size=arguments.vocab,
        lengths=arguments.lengths,
        seed=arguments.seed,
        clients=_positive("--clients", arguments.clients),
        timeout_s=arguments.timeout,
        max_requests=_positive("--max-requests", arguments.max_requests),
        ignore_eos=not arguments.no_ignore_eos,
        temperature=arguments.temperature,
    )


def _positive(name: str, found: int) -> int:
    if found < 1:
        raise ConfigError(f"{name}: found {found}; allowed: at least 1")
    return found


def _search_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    for name, low, high in (("target", 0, 1), ("tolerance", 0, 10)):
        found = getattr(arguments, name)
        if not low < found <= high:
            raise ConfigError(f"--{name}: found {found}; allowed: above {low}, up to {high}")
    _positive("--min-requests", arguments.min_requests)
    names = ("target", "tolerance", "lowest", "highest", "min_requests")
    return {name: getattr(arguments, name) for name in names}


def _objectives(texts: Sequence[str]) -> tuple[Objectives, ...]:
    found = tuple(Objectives.parse(text) for text in texts)
    return found or report.DEFAULT_OBJECTIVES


def _folder(path: Path | None) -> Folder:
    return Folder.make(path or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}"))


def _server(arguments: argparse.Namespace) -> Server:
    return probe(arguments.url, name=arguments.name, model=arguments.model, num_gpus=arguments.gpus)


def _serve(arguments: argparse.Namespace) -> int:
    objectives = _objectives(arguments.slo)
    load = replace(
        _load(arguments, arguments.workload),
        rate=arguments.rate,
        concurrency=arguments.concurrency,
    )
    load.check()
    server = _server(arguments)
    folder = _folder(arguments.out)
    folder.agree_on({"slos": [str(one) for one in objectives]})
    run = measure(folder, server, load, Budget(), api_key=_api_key())
    _finish(folder)
    return 0 if run.fault is None else 1


def _goodput(arguments: argparse.Namespace) -> int:
    objectives, search = _objectives(arguments.slo), _search_plan(arguments)
    load = _load(arguments, arguments.workload)
    settings = Settings(start=arguments.start, **search)
    server = _server(arguments)
    folder = _folder(arguments.out)
    folder.agree_on(_plan(objectives, [Task(load, settings)], search))
    budget = Budget.of(arguments.budget)
    done = True
    try:
        search_of = Search(
            folder, server, objectives, budget, _api_key(), tell=not arguments.no_tell
        )
        search_of.run(load, settings)
    except OutOfTime:
        done = False
    _finish(folder)
    return _said(done, folder)


def _plan(
    objectives: Sequence[Objectives], tasks: Sequence[Task], search: dict[str, Any] | None
) -> dict[str, Any]:
    """What must stay the same for runs to belong together."""
    plan: dict[str, Any] = {
        "slos": [str(one) for one in objectives],
        "loads": [task.load.as_json() for task in tasks],
        "starts": {t.load.workload: t.settings.start for t in tasks if t.settings is not None},
    }
    return plan if search is None else plan | {"search": search}


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        folder = Folder.existing(arguments.resume)
        command = folder.plan().get("command")
        if command is None:
            raise ConfigError(f"{arguments.resume}: not a folder of pdserve bench compare")
        parser = argparse.ArgumentParser()
        _compare_options(parser)
        given = arguments
        arguments = parser.parse_args(command)
        for name in ("budget", "shares", "no_report"):
            setattr(arguments, name, getattr(given, name))
    else:
        folder = _folder(arguments.out)
    if not arguments.servers or not arguments.workload:
        raise ConfigError("give the servers to compare, and --workload; or --resume DIR")
    search = _search_plan(arguments)
    tasks = [_task(arguments, text, search) for text in arguments.workload]
    objectives = _objectives(arguments.slo)
    entries = checked([Entry.parse(text) for text in arguments.servers])
    searches = any(task.settings is not None for task in tasks)
    plan = _plan(objectives, tasks, search if searches else None)
    if arguments.staircase:
        plan["staircase"] = {"target": arguments.target, "min_requests": arguments.min_requests}
        plan["levels"] = {task.load.workload: list(task.rates) for task in tasks}
    folder.agree_on(plan | {"command": _command(arguments)})
    comparison = Comparison(
        folder=folder,
        entries=entries,
        tasks=tuple(tasks),
        objectives=objectives,
        budget=Budget.of(arguments.budget),
        rounds=_positive("--rounds", arguments.rounds),
        num_gpus=arguments.gpus,
        start_limit_s=arguments.start_limit,
        accept_divergence=arguments.accept_divergence,
        tell=not arguments.no_tell,
        api_key=_api_key(),
        shares=_shares(arguments.shares, len(entries)),
    )
    try:
        done = comparison.run()
    finally:
        if not arguments.no_report:
            _finish(folder)
    return _said(done, folder)


def _command(arguments: argparse.Namespace) -> list[str]:
    """The options again, all of them, for ``--resume``; but for what may change."""
    words = [str(Path(s).absolute()) if Path(s).exists() else s for s in arguments.servers]
    for key, value in sorted(vars(arguments).items()):
        if (
            key in ("servers", "out", "resume", "budget", "shares")
            or value is None
            or value is False
        ):
            continue
        flag = "--" + key.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            for one in value if isinstance(value, list) else [value]:
                words.append(f"{flag}={one}")
    return words


def _task(arguments: argparse.Namespace, text: str, search: dict[str, Any]) -> Task:
    """``W``, ``W@START`` for a search, ``W@R1,R2`` for these rates."""
    workload, _, tail = text.rpartition("@") if "@" in text else (text, "", "1")
    try:
        rates = tuple(float(rate) for rate in tail.split(","))
    except ValueError:
        raise ConfigError(f"--workload: found '{text}'; allowed: W@RATE or W@RATE,RATE") from None
    if not all(rate > 0 for rate in rates):
        raise ConfigError(f"--workload: found '{text}'; allowed: rates above 0")
    load = _load(arguments, workload)
    if arguments.staircase:
        levels = tuple(sorted(set(rates)))
        flight = Flight(load, levels, rates[0], arguments.target, arguments.min_requests)
        return Task(load, None, levels, flight)
    if len(rates) > 1:
        return Task(load, None, rates)
    return Task(load, Settings(start=rates[0], **search))


def _shares(text: str | None, servers: int) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != servers or not all(part > 0 for part in found):
        raise ConfigError(f"--shares: found '{text}'; allowed: {servers} numbers above 0")
    return found


def _report(arguments: argparse.Namespace) -> int:
    peer = read_peer(arguments.peer) if arguments.peer is not None else None
    _finish(Folder.existing(arguments.folder), peer)
    return 0


def _finish(folder: Folder, peer: dict[str, Any] | None = None) -> None:
    """Draws what the folder holds."""
    if not folder.runs():
        return
    found = report.write(folder, peer)
    try:
        from . import page
    except ImportError as error:
        live.tell(f"no plots: {error.name} is not installed (pip install 'pdserve[bench]')")
    else:
        page.write(folder, found)
    shown = "## A closer look" if len(found["cells"]) > 1 else "## Definitions"
    print(report.markdown(found, peer).split("## Definitions")[0].split(shown)[0].rstrip())
    live.tell(f"in {folder.path}: report.md, report.html, report.json, and every run")


def _said(done: bool, folder: Folder) -> int:
    if done:
        return 0
    live.tell(f"the budget is used up and not all is done; go on with --resume {folder.path}")
    return 3


def _api_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY")


Options = Callable[[argparse.ArgumentParser], None]
_COMMANDS: dict[str, tuple[Options, Callable[[argparse.Namespace], int]]] = {
    "serve": (_serve_options, _serve),
    "goodput": (_goodput_options, _goodput),
    "compare": (_compare_options, _compare),
    "report": (_report_options, _report),
}
