"""The servers by name."""

from __future__ import annotations

from typing import Literal

Kind = Literal["echo", "echo-asyncio", "octavo-null", "octavo-cpu"]
