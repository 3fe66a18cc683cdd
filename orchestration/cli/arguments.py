"""The grammar of the command line: one function for each command, and the types of the arguments.

The parser names a command's module and function, and the module is imported when the command runs. `refinery query`
thus does not wait for the import of Dagster.
"""

from __future__ import annotations

import argparse
import re

from resources.machine.targets import check_target


def parser() -> argparse.ArgumentParser:
    """Return the parser. The attribute `command` of its result has the form `module:function`."""
    parser = argparse.ArgumentParser(
        prog="refinery",
        description="Find the fastest accurate engine for a Hugging Face checkpoint, and serve it with Triton.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _optimize,
        _plan,
        _gc,
        _bench,
        _query,
        _serve,
        _load,
        _models,
        _releases,
        _rollback,
        _promote,
        _retain,
        _verify,
        _lint,
        _ui,
        _setup,
    ):
        add(commands)
    return parser


def _optimize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("optimize", help="optimize a model and publish the result")
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a name in the catalog, or a source: a folder, a Hub id ([hub:][org/]name[@revision]), object storage or "
        "a registry",
    )
    new = command.add_argument_group("options for a source, which becomes a catalog entry")
    new.add_argument("--name", help="name in the catalog (default: the last part of MODEL)")
    new.add_argument("--task", help="task of the model (default: found from the checkpoint)")
    new.add_argument("--seq-len", metavar="N[,N]", help="sequence lengths in tokens to optimize for")
    new.add_argument(
        "--batch-size", metavar="N[,N]", help="batch sizes to optimize for, each combined with each --seq-len"
    )
    new.add_argument("--engines", metavar="E[,E]", help="build and compare only these engines")
    new.add_argument("--seconds", type=_positive, metavar="N", help="time limit of one engine's benchmark")
    new.add_argument(
        "--serving-seconds",
        type=_not_negative,
        metavar="N",
        help="time limit of the serving search and of the release's load benchmark; 0 skips both",
    )
    _add_allow_pickle(new)
    command.add_argument("--target", type=_target, help="use only this target (default: all of REFINERY_TARGETS)")
    command.add_argument(
        "--output", metavar="DIR", help="write the Triton repositories to DIR/<target>; DIR may be s3://..."
    )
    command.set_defaults(command="orchestration.cli.optimize:optimize")


def _plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("plan", help="show what a run would do, and why")
    command.add_argument("models", metavar="MODEL", nargs="*", help="names in the catalog (default: all)")
    command.add_argument("--target", type=_target, help="use only this target (default: all of REFINERY_TARGETS)")
    command.add_argument("--json", action="store_true", help="print one JSON document per model, one per line")
    command.set_defaults(command="orchestration.cli.plan:plan")


def _gc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("gc", help="remove artifacts that no release, run or recent step needs")
    command.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    command.add_argument(
        "--keep-days",
        type=_days,
        default=7.0,
        metavar="N",
        help="keep artifacts that were used within N days, at least 1 (default: %(default)g)",
    )
    command.set_defaults(command="orchestration.cli.gc:collect_garbage")


def _bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("bench", help="compare a model's engines without publishing a release")
    command.add_argument("model", metavar="MODEL", help="a name in the catalog, or a source, as for optimize")
    command.add_argument("--name", help="for a source: name in the catalog")
    command.add_argument("--task", help="for a source: task of the model")
    _add_allow_pickle(command)
    command.add_argument(
        "--engines",
        metavar="E[,E]",
        help="compare only these engines with PyTorch (default: all that the target supports)",
    )
    command.add_argument("--target", type=_target, help="target to compare on (default: the first of REFINERY_TARGETS)")
    command.add_argument(
        "--shapes",
        metavar="S[,S]",
        help="shapes to measure, as batch x tokens, such as 1x16,8x128 (default: the model's shapes)",
    )
    command.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help="time limit of the comparison, at least a quarter of it for timing "
        "(default: the model's limit per engine)",
    )
    command.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="number of threads for PyTorch and for every engine (default: the model's setting)",
    )
    command.add_argument(
        "--accuracy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compare the answers with PyTorch's (the default)",
    )
    command.add_argument(
        "--output", metavar="DIR", help="folder for the results (default: REFINERY_HOME/bench/<model>-<target>)"
    )
    command.set_defaults(command="orchestration.cli.bench:bench")


def _query(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("query", help="send texts to a served model and print the answers")
    command.add_argument("model", metavar="MODEL", help="name of the served model")
    command.add_argument(
        "text", metavar="TEXT", nargs="+", help="texts, or contexts for question-answering; each gets one answer"
    )
    command.add_argument("--query", metavar="TEXT", help="the query that the texts are ranked for (reranking)")
    command.add_argument(
        "--question", metavar="TEXT", help="the question to answer from the contexts (question-answering)"
    )
    command.add_argument("--labels", metavar="L[,L]", help="the candidate labels (zero-shot-classification)")
    command.add_argument(
        "--url",
        help="gRPC address of a Triton server (default: the first of REFINERY_TRITON_GRPC that has the model; "
        "without that variable, 127.0.0.1:8001 or, if it does not have the model, a server that this command starts)",
    )
    command.add_argument(
        "--target",
        type=_target,
        default="cpu",
        help="target whose repository is served if this command starts a server",
    )
    command.add_argument("--json", action="store_true", help="print the complete answers, one JSON document per line")
    command.set_defaults(command="orchestration.cli.serving:query")


def _serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("serve", help="serve the repository with the embedded Triton until Ctrl-C")
    command.add_argument("--target", type=_target, default="cpu")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002), ("health", 8003)):
        command.add_argument(f"--{name}-port", type=_port, default=port, metavar="PORT", help="default: %(default)s")
    command.add_argument(
        "--control",
        choices=("explicit", "poll", "none"),
        default="explicit",
        help="when new releases are loaded: at once (explicit, the default), when Triton polls (poll), or never (none)",
    )
    command.add_argument(
        "--cache-mb",
        type=_megabytes,
        default=0,
        metavar="N",
        help="size of the response cache in MB, for models with response_cache",
    )
    command.add_argument(
        "--resource",
        type=_resource,
        action="append",
        default=[],
        metavar="NAME=N",
        help="number of copies of a rate limiter's resource (default: the largest number that one instance needs)",
    )
    command.set_defaults(command="orchestration.cli.serving:serve")


def _load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("load", help="put load on a served model, and measure throughput and latency")
    command.add_argument("model", metavar="MODEL", help="name of the served model")
    command.add_argument(
        "--url",
        help="gRPC address of a Triton server (default: a server that this command starts)",
    )
    command.add_argument(
        "--clients",
        type=_counts,
        default=(1, 4, 16),
        metavar="N[,N]",
        help="numbers of concurrent clients (default: 1,4,16)",
    )
    command.add_argument(
        "--seconds", type=_positive, default=15.0, metavar="N", help="total duration in seconds (default: %(default)g)"
    )
    command.add_argument("--tokens", type=_release, metavar="N", help="send only texts of at most N tokens")
    command.add_argument("--target", type=_target, default="cpu", help="target whose repository is served")
    command.set_defaults(command="orchestration.cli.load:load")


def _models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("models", help="list the models of the catalog")
    command.set_defaults(command="orchestration.cli.listing:models")


def _releases(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("releases", help="list a model's releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.listing:releases")


def _rollback(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("rollback", help="serve an older release again after a server has answered with it")
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--to", type=_release, metavar="N", help="number of the release (default: the release before the current one)"
    )
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:rollback")


def _promote(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "promote", help="serve the newest release, even if it waits for its proof or was rolled back"
    )
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:promote")


def _retain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("retain", help="remove old releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--keep", type=_release, default=3, metavar="N", help="number of newest releases to keep (default: %(default)s)"
    )
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:retain")


def _verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "verify", help="check that a release is as it was published, and that a server answers with it"
    )
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--release", type=_release, metavar="N", help="number of the release (default: the release that serves)"
    )
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:verify")


def _lint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("lint", help="check a Triton model repository for mistakes, without a server")
    command.add_argument("path", metavar="PATH", help="the repository: any folder with model folders, or s3://...")
    command.add_argument("--format", choices=("text", "json", "sarif"), default="text", help="default: %(default)s")
    command.set_defaults(command="orchestration.cli.lint:lint")


def _ui(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("ui", help="start Dagster and MLflow on this machine until Ctrl-C")
    for name, port in (("dagster", 3000), ("mlflow", 5000)):
        command.add_argument(f"--{name}-port", type=_port, default=port, metavar="PORT", help="default: %(default)s")
    command.set_defaults(command="orchestration.ui.ui:serve_pages")


def _setup(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("setup", help="install the embedded Triton's environment")
    command.set_defaults(command="orchestration.cli.serving:setup")


def _add_allow_pickle(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        default=None,
        help="for a source: load pickled weights, which can run their author's code as your user",
    )


def _target(text: str) -> str:
    try:
        return check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _release(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 512")
    return int(text)


def _megabytes(text: str) -> int:
    if not text.isdigit() or int(text) > 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of megabytes up to 1000000")
    return int(text)


def _resource(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not count.isdigit() or not 1 <= int(count) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} does not have the form NAME=N, for example cores=4")
    return name, int(count)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _not_negative(text: str) -> float:
    return 0.0 if text == "0" else _positive(text)


def _days(text: str) -> float:
    number = _positive(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1, but a step may take a day")
    return number
