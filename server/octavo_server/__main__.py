"""`python -m octavo_server`: the command `octavo-server` of this interpreter."""

from __future__ import annotations

import sys

from octavo_server.cli import main

sys.exit(main())
