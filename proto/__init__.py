"""The contract that workers and the service share: messages, errors, layouts, frames.

`CONTRACT` names the protobuf package; a change that breaks it gets a new one.
"""

CONTRACT = "polarcache.v1"

__all__ = ["CONTRACT"]
