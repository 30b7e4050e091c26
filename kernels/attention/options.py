"""What attention over a stored prefix can be told."""

from dataclasses import dataclass

from polarcache.kernels.errors import ShapeError


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How scores become weights. Every stored token precedes every query: there is no causal mask.

    Attributes:
        scale: factor on q.k before the softmax; 0 means 1 / sqrt(head_dim).
        soft_cap: scores become cap * tanh(score / cap); 0 means no cap.
        window: a query at position p sees stored tokens after p - window alone; 0 means all.
        sink_tokens: first stored tokens that stay visible outside the window (arXiv 2309.17453);
            0 without a window. A learned sink logit per head is no stored token: merge it with
            the result as a state of zero `out` and the logit as `lse`.

    Raises:
        ShapeError: a value is negative or not finite, or sink_tokens without a window.
    """

    scale: float = 0.0
    soft_cap: float = 0.0
    window: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        """Checks every attribute."""
        for name in ("scale", "soft_cap", "window", "sink_tokens"):
            value = getattr(self, name)
            if not 0 <= value < 2**31:
                raise ShapeError(f"{name} {value}: expected a finite number of at least 0")
        if self.sink_tokens and not self.window:
            raise ShapeError("sink_tokens without a window: expected a window")
