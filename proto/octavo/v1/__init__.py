"""Messages and stubs generated from octavo.proto; `make proto` regenerates them."""

from octavo.v1.octavo_pb2 import *  # noqa: F403
