"""The command `octavo-load`, also as `python -m octavo_client.load`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command; say which package is missing where the load test's are not installed."""
    try:
        from octavo_client.load.cli import main as run  # noqa: PLC0415

        return run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("octavo"):
            raise
        text = f'the package {package} is not installed; pip install "octavo[load]"'
        print(f"octavo-load: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
