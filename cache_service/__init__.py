"""The cache service: a memory tier of packed blocks over Redis, served over gRPC."""
