"""The load test: `octavo-load`, also as `python -m octavo_client.load`."""
