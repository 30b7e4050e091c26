"""Triton forms of the codecs: whole slices in one launch. Plain torch is the reference."""
