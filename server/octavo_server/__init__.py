"""The service: INT8 paged KV-cached decoding over gRPC."""
