"""The command line: thin over the same Dagster job and instance that the web page shows.

Each command imports what it needs when it runs, so that `refinery query` does not wait for Dagster.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from orchestration.terminal import printable_output
from resources.errors import RefineryError, disk_trouble
from resources.machine.targets import check_target

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 1 for failure, 2 for a wrong command line, 130 for Ctrl-C."""
    with printable_output():
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        try:
            from orchestration.settings import complete_environment

            complete_environment(os.environ)
            code = command(options)
            sys.stdout.flush()
            return code
        except RefineryError as error:
            print(f"refinery: {error}", file=sys.stderr)
            return FAILURE
        except KeyboardInterrupt:
            print("refinery: interrupted; nothing half-made was left.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `refinery models | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SUCCESS
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble:
                print(f"refinery: {trouble}", file=sys.stderr)
            else:  # a defect; printed here, so that control characters in its text are escaped as well
                traceback.print_exc()
            return FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refinery", description="Take a Hugging Face checkpoint to the fastest accurate engine, served by Triton."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

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
    command.set_defaults(command=_optimize)

    command = commands.add_parser("plan", help="show what optimizing would do, and why, without doing it")
    command.add_argument("models", metavar="MODEL", nargs="*", help="names of the catalog (default: all)")
    command.add_argument("--target", type=_target, help="only this target (default: all of REFINERY_TARGETS)")
    command.add_argument("--json", action="store_true", help="one JSON document a model, each on a line")
    command.set_defaults(command=_plan)

    command = commands.add_parser("gc", help="remove what no release, run or recent step needs from the artifact store")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    command.add_argument(
        "--keep-days",
        type=_days,
        default=7.0,
        metavar="N",
        help="what was used within N days stays, one at least (default: %(default)g)",
    )
    command.set_defaults(command=_gc)

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
    command.set_defaults(command=_bench)

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
    command.set_defaults(command=_query)

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
    command.set_defaults(command=_serve)

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
    command.set_defaults(command=_load)

    command = commands.add_parser("models", help="list the catalog")
    command.set_defaults(command=_models)

    command = commands.add_parser("releases", help="list a model's releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command=_releases)

    command = commands.add_parser("rollback", help="serve an older release again, once a server has answered with it")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--to", type=_release, metavar="N", help="any release (default: the one before)")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command=_rollback)

    command = commands.add_parser("promote", help="serve the newest release: one that waits, or was rolled back")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command=_promote)

    command = commands.add_parser("retain", help="remove old releases")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--keep", type=_release, default=3, metavar="N", help="the newest N (default: %(default)s)")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command=_retain)

    command = commands.add_parser("verify", help="compare a release with what was published, and ask it a question")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--release", type=_release, metavar="N", help="default: the one that serves")
    command.add_argument("--target", type=_target, default="cpu")
    command.set_defaults(command=_verify)

    command = commands.add_parser("lint", help="find what is wrong with a Triton model repository, without a server")
    command.add_argument("path", metavar="PATH", help="what holds the models' folders, ours or anybody's; s3://... too")
    command.add_argument("--format", choices=("text", "json", "sarif"), default="text", help="default: %(default)s")
    command.set_defaults(command=_lint)

    command = commands.add_parser("ui", help="start Dagster and MLflow on this machine until Ctrl-C")
    for name, port in (("dagster", 3000), ("mlflow", 5000)):
        command.add_argument(f"--{name}-port", type=_port, default=port, metavar="PORT", help="default: %(default)s")
    command.set_defaults(command=_ui)

    command = commands.add_parser("setup", help="install the embedded Triton's environment")
    command.set_defaults(command=_setup)
    return parser


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


def _optimize(options: argparse.Namespace) -> int:
    from orchestration.optimize import optimize

    return optimize(options)


def _plan(options: argparse.Namespace) -> int:
    from orchestration.plan import plan

    return plan(options)


def _gc(options: argparse.Namespace) -> int:
    from orchestration.gc import collect_garbage

    return collect_garbage(options)


def _bench(options: argparse.Namespace) -> int:
    from orchestration.bench import bench

    return bench(options)


def _query(options: argparse.Namespace) -> int:
    from orchestration.serving import query

    return query(options)


def _serve(options: argparse.Namespace) -> int:
    from orchestration.serving import serve

    return serve(options)


def _load(options: argparse.Namespace) -> int:
    from orchestration.load import load

    return load(options)


def _models(options: argparse.Namespace) -> int:
    from orchestration.listing import models

    return models(options)


def _releases(options: argparse.Namespace) -> int:
    from orchestration.listing import releases

    return releases(options)


def _rollback(options: argparse.Namespace) -> int:
    from orchestration.releases import rollback

    return rollback(options)


def _promote(options: argparse.Namespace) -> int:
    from orchestration.releases import promote

    return promote(options)


def _retain(options: argparse.Namespace) -> int:
    from orchestration.releases import retain

    return retain(options)


def _verify(options: argparse.Namespace) -> int:
    from orchestration.releases import verify

    return verify(options)


def _lint(options: argparse.Namespace) -> int:
    from orchestration.lint import lint

    return lint(options)


def _ui(options: argparse.Namespace) -> int:
    from orchestration.pages import serve_pages

    return serve_pages(options)


def _setup(options: argparse.Namespace) -> int:
    del options
    from orchestration.settings import read_workspace
    from resources.triton.environment import install

    install(read_workspace(os.environ).triton.environment, progress=lambda line: print(line, flush=True))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
