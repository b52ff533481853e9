"""A real model whose KV cache and attention live on an Octavo server.

Copy `orchestrator.py` to begin an orchestrator of your own; the rest is the command `octavo-demo`.
"""
