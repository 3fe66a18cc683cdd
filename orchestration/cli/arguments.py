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
        prog="refinery", description="Take a Hugging Face checkpoint to the fastest accurate engine, served by Triton."
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
        help="a name of the catalog, else a folder, else a Hub id ([hub:][org/]name[@revision]), or another source",
    )
    new = command.add_argument_group("for a source, which becomes a catalog entry of its own")
    new.add_argument("--name", help="its name in the catalog (default: the last part of MODEL)")
    new.add_argument("--task", help="what it is for (default: told from the checkpoint)")
    new.add_argument("--seq-len", metavar="N[,N]", help="tokens to optimize for")
    new.add_argument("--batch-size", metavar="N[,N]", help="batch sizes to optimize for, each with each --seq-len")
    new.add_argument("--engines", metavar="E[,E]", help="only these engines compete")
    new.add_argument("--seconds", type=_positive, metavar="N", help="bound for one engine's benchmark")
    new.add_argument(
        "--serving-seconds",
        type=_not_negative,
        metavar="N",
        help="bound for finding how it is served, and for measuring that; 0: neither",
    )
    _add_allow_pickle(new)
    command.add_argument("--target", type=_target, help="only this target (default: all of REFINERY_TARGETS)")
    command.add_argument("--output", metavar="DIR", help="Triton repositories go to DIR/<target>; s3://... too")
    command.set_defaults(command="orchestration.cli.optimize:optimize")


def _plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("plan", help="show what optimizing would do, and why, without doing it")
    command.add_argument("models", metavar="MODEL", nargs="*", help="names of the catalog (default: all)")
    command.add_argument("--target", type=_target, help="only this target (default: all of REFINERY_TARGETS)")
    command.add_argument("--json", action="store_true", help="one JSON document a model, each on a line")
    command.set_defaults(command="orchestration.cli.plan:plan")


def _gc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("gc", help="remove what no release, run or recent step needs from the artifact store")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    command.add_argument(
        "--keep-days",
        type=_days,
        default=7.0,
        metavar="N",
        help="what was used within N days stays, one at least (default: %(default)g)",
    )
    command.set_defaults(command="orchestration.cli.gc:collect_garbage")


def _bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("bench", help="compare a model's engines with each other, outside the pipeline")
    command.add_argument("model", metavar="MODEL", help="as for optimize: a name, or a source")
    command.add_argument("--name", help="for a source: its name in the catalog")
    command.add_argument("--task", help="for a source: what it is for")
    _add_allow_pickle(command)
    command.add_argument(
        "--engines", metavar="E[,E]", help="only these, beside PyTorch (default: all that can compete)"
    )
    command.add_argument("--target", type=_target, help="default: the first of REFINERY_TARGETS")
    command.add_argument("--shapes", metavar="S[,S]", help="batch x tokens, as 1x16,8x128 (default: the model's)")
    command.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help="bound for measuring, and a quarter of it at least for timing (default: the model's, for each engine)",
    )
    command.add_argument(
        "--threads", type=_count, metavar="N", help="of PyTorch and every engine (default: the model's)"
    )
    command.add_argument(
        "--accuracy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether answers are compared with PyTorch's too (default: they are)",
    )
    command.add_argument("--output", metavar="DIR", help="default: REFINERY_HOME/bench/<model>-<target>")
    command.set_defaults(command="orchestration.cli.bench:bench")


def _query(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("query", help="ask a served model")
    command.add_argument("model", metavar="MODEL", help="the name it is served under")
    command.add_argument("text", metavar="TEXT", nargs="+", help="texts, or contexts, one answer each")
    command.add_argument("--query", metavar="TEXT", help="what the texts are ranked for (reranking)")
    command.add_argument("--question", metavar="TEXT", help="what the contexts are asked (question-answering)")
    command.add_argument("--labels", metavar="L[,L]", help="what the texts may be (zero-shot-classification)")
    command.add_argument(
        "--url",
        help="gRPC address of a Triton server (default: the first of REFINERY_TRITON_GRPC that has the model; "
        "without that variable 127.0.0.1:8001, or one started for the question)",
    )
    command.add_argument(
        "--target", type=_target, default="cpu", help="whose repository to serve where a server is started"
    )
    command.add_argument("--json", action="store_true", help="print the whole answers, one JSON document a line")
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
        help="how new releases are taken up: at once (default), when Triton looks by itself, or not",
    )
    command.add_argument("--cache-mb", type=_megabytes, default=0, metavar="N", help="for models with response_cache")
    command.add_argument(
        "--resource",
        type=_resource,
        action="append",
        default=[],
        metavar="NAME=N",
        help="how many there are of what rate limiters name (default: as many as the largest need of one instance)",
    )
    command.set_defaults(command="orchestration.cli.serving:serve")


def _load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("load", help="put load on a served model, and measure what it does")
    command.add_argument("model", metavar="MODEL", help="the name it is served under")
    command.add_argument(
        "--url", help="gRPC address of a Triton server (default: one started for this, never one of users)"
    )
    command.add_argument(
        "--clients", type=_counts, default=(1, 4, 16), metavar="N[,N]", help="how many at once (default: 1,4,16)"
    )
    command.add_argument("--seconds", type=_positive, default=15.0, metavar="N", help="in all (default: %(default)g)")
    command.add_argument("--tokens", type=_release, metavar="N", help="only texts of up to so many tokens")
    command.add_argument("--target", type=_target, default="cpu", help="whose repository")
    command.set_defaults(command="orchestration.cli.load:load")


def _models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("models", help="list the catalog")
    command.set_defaults(command="orchestration.cli.listing:models")


def _releases(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("releases", help="list a model's releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.listing:releases")


def _rollback(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("rollback", help="serve an older release again, once a server has answered with it")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--to", type=_release, metavar="N", help="any release (default: the one before)")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:rollback")


def _promote(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("promote", help="serve the newest release: one that waits, or was rolled back")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:promote")


def _retain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("retain", help="remove old releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--keep", type=_release, default=3, metavar="N", help="the newest N (default: %(default)s)")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:retain")


def _verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("verify", help="compare a release with what was published, and ask it a question")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--release", type=_release, metavar="N", help="default: the one that serves")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command="orchestration.cli.releases:verify")


def _lint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("lint", help="find what is wrong with a Triton model repository, without a server")
    command.add_argument("path", metavar="PATH", help="what holds the models' folders, ours or anybody's; s3://... too")
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
        help="for a source: load weights stored as a pickle, which run their author's code as you",
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 512")
    return int(text)


def _megabytes(text: str) -> int:
    if not text.isdigit() or int(text) > 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megabytes")
    return int(text)


def _resource(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not count.isdigit() or not 1 <= int(count) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N, such as cores=4")
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
        raise argparse.ArgumentTypeError(f"{text!r} is less than a day, and a step may take one")
    return number
