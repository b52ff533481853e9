"""The command `octavo-server`: serve, build the kernels ahead, show a server's status, draw a token, and more."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from octavo_server.backends.base import UnsupportedError
from octavo_server.config import ConfigError, load_config
from octavo_server.config_keys import ModelKeys, ServerConfig
from octavo_server.config_schema import Key, keys_of
from octavo_server.logs import setup_logs
from octavo_server.status_command import add_status
from octavo_server.tokens import draw_token, hash_token
from octavo_server.version import software_version

EXAMPLE_CONFIG = "octavo.example.yaml"
EXIT_UNSUPPORTED = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 on success, 1 when this machine cannot do what was asked or a server is not healthy, 2 for mistakes in the
        arguments or the configuration, 3 when the device failed while serving.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except ConfigError as error:
        num_mistakes = len(error.mistakes)
        count = "one mistake" if num_mistakes == 1 else f"{num_mistakes} mistakes"
        print(f"octavo-server: {count} in the configuration:\n{error}", file=sys.stderr)
        return EXIT_USAGE
    except UnsupportedError as error:
        print(f"octavo-server: {error}", file=sys.stderr)
        return EXIT_UNSUPPORTED
    return code


def example_config() -> str:
    """Return the commented example configuration that is shipped with the package."""
    return files("octavo_server").joinpath(EXAMPLE_CONFIG).read_text(encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo-server",
        description="INT8 paged KV-cached decoding as a service.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"octavo {software_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_build(commands)
    add_status(commands)
    _add_health(commands)
    example = commands.add_parser("example-config", help="print a commented configuration")
    example.set_defaults(run=_print_example)
    token = commands.add_parser(
        "token", help="draw a tenant's token, and print it with its line for the tenants file"
    )
    token.set_defaults(run=_print_token)
    return parser


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = commands.add_parser("build", help="compile the kernels now rather than on first use")
    build.add_argument("--verbose", action="store_true", help="show the compiler's output")
    build.add_argument(
        "--cuda-arch",
        metavar="ARCHS",
        help="also compile the cuda kernels, which takes nvcc but no GPU, for these compute capabilities times "
        'ten, such as 80,90; "all" = 80,86,89,90,100,120',
    )
    build.set_defaults(run=_build)


def _add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    health = commands.add_parser(
        "health", help="ask a server whether it serves; exit code 0 when it does, else 1"
    )
    health.add_argument("--target", required=True, metavar="HOST:PORT", help="or unix:PATH")
    health.add_argument(
        "--service",
        default="ready",
        metavar="NAME",
        help="ready (takes new work) or live (runs); default ready",
    )
    health.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="speak TLS, and trust this PEM file's authorities",
    )
    health.add_argument(
        "--timeout", type=float, default=5.0, metavar="S", help="seconds to wait; default 5"
    )
    health.set_defaults(run=_health)


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve until SIGTERM or SIGINT",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_model_help(),
    )
    serve.set_defaults(run=_serve)
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags override it")
    serve.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a model to serve, keys below; repeat it for more. The models of the file are then ignored",
    )
    for key in keys_of(ServerConfig):
        serve.add_argument(key.flag, dest=key.name, metavar="VALUE", help=_key_help(key))


def _key_help(key: Key) -> str:
    fallback = "" if key.default in (None, "") else f"; default {key.kind.show(key.default)}"
    if key.is_required:
        fallback = "; required"
    return f"{key.help} Accepts {key.kind.expected}{fallback}."


def _model_help() -> str:
    lines = [
        "keys of a model, in the file or as --model name=tiny,num_layers=4,window=[0,128,0,128]:"
    ]
    for key in keys_of(ModelKeys):
        lines += textwrap.wrap(
            f"{key.name:<14} {_key_help(key)}",
            width=100,
            initial_indent="  ",
            subsequent_indent=" " * 17,
        )
    return "\n".join(lines)


def _serve(args: argparse.Namespace) -> int:
    given = {key.name: getattr(args, key.name) for key in keys_of(ServerConfig)}
    flags = {name: text for name, text in given.items() if text is not None}
    config = load_config(args.config, flags, args.models)
    setup_logs(config.log_level, config.log_format)
    # Imported late: it brings torch and gRPC, and mistakes in the configuration are told without them.
    from octavo_server.server import EXIT_DEVICE_FAILURE, run  # noqa: PLC0415

    code = run(config)
    if code == EXIT_DEVICE_FAILURE:
        # At once: the libraries' own ends may wait for a device that never answers.
        logging.shutdown()
        os._exit(code)
    return code


def _build(args: argparse.Namespace) -> int:
    setup_logs("info")
    from octavo_server.cuda_build import build_cuda_kernels, parse_archs  # noqa: PLC0415
    from octavo_server.kernel_build import build_cpu_kernels  # noqa: PLC0415

    archs = None if args.cuda_arch is None else parse_archs(args.cuda_arch)
    print(build_cpu_kernels(verbose=args.verbose))
    if archs is not None:
        print(build_cuda_kernels(archs, verbose=args.verbose))
    return 0


def _health(args: argparse.Namespace) -> int:
    # Imported late: it brings gRPC.
    from octavo_server.health_check import check_health  # noqa: PLC0415

    health = check_health(args.target, args.service, args.tls_ca, args.timeout)
    print(health.text, file=sys.stdout if health.is_serving else sys.stderr)
    return 0 if health.is_serving else EXIT_UNSUPPORTED


def _print_example(_args: argparse.Namespace) -> int:
    print(example_config(), end="")
    return 0


def _print_token(_args: argparse.Namespace) -> int:
    token = draw_token()
    print(f"token: {token}")
    print(f"token_sha256: [{hash_token(token).hex()}]")
    return 0
