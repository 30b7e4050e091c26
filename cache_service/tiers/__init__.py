"""Where blocks are kept: the memory tier's page pool, and Redis."""
