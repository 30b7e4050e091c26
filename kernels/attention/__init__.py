"""Attention of queries over packed pages: `PrefixAttention`, and `merge_states` for the suffix."""
