"""Polar codecs: RoPE pairs (`pair`) and rotated 16-channel trees (`recursive`)."""
