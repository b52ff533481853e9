"""What a step costs on the wire: `python -m tests.bench.rpc`."""
