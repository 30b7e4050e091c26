"""The fast form for Hopper: CUDA C++ compiled at run time."""
