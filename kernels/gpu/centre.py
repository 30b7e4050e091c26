"""What keys lose before a rotation: device functions. Reference: kernels/polar/centre.py."""

import math

import triton
import triton.language as tl

from polarcache.kernels.gpu.words import whole
from polarcache.kernels.polar import centre as _centre

MEAN_STEPS = tl.constexpr(float(_centre.MEAN_STEPS))
MEAN_ZERO = tl.constexpr(_centre.MEAN_ZERO)
BALANCE_STEPS = tl.constexpr(_centre.BALANCE_STEPS)
BALANCE_ONE = tl.constexpr(_centre.BALANCE_ONE)
GAIN_STEPS = tl.constexpr(_centre.GAIN_STEPS)
GAIN_ZERO = tl.constexpr(_centre.GAIN_ZERO)
LEAST_ENERGY = tl.constexpr(_centre.LEAST_ENERGY)
LEAST_LOG = tl.constexpr(math.log2(_centre.LEAST_ENERGY))
QUERY_POWER = tl.constexpr(_centre.QUERY_POWER)


@triton.jit
def mean_rows(x, COUNT: tl.constexpr):
    """Returns the sum of rows, fp32 [M, K], over COUNT, a power of two: [1, K]."""
    return tl.sum(x, 0, keep_dims=True) * (1.0 / COUNT)


@triton.jit
def largest(numbers, AXIS: tl.constexpr):
    """Returns the largest magnitude of fp32 along an axis, NaN where one is not finite."""
    poison = tl.sum(numbers * 0.0, AXIS, keep_dims=True)
    return tl.max(tl.abs(numbers), AXIS, keep_dims=True) + poison


@triton.jit
def larger(a, b):
    """Returns the maximum of fp32 numbers of one shape; NaN survives."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def take_mean(x, mean, scale, at, known):
    """Takes coded means off rows.

    Args:
        x: fp32 [M, K].
        mean: fp32 [1, K].
        scale: fp16 [1, 1], the largest mean.
        at: uint8 pointers [1, K] where codes go.
        known: channels that there are, bool [1, K].

    Returns:
        fp32 [M, K], 0 where not known.
    """
    wide = scale.to(tl.float32)
    step = tl.div_rn(tl.full(wide.shape, MEAN_STEPS, tl.float32), tl.where(wide > 0, wide, 1.0))
    code = tl.clamp(whole(tl.where(wide > 0, mean * step, 0.0)), -MEAN_STEPS, MEAN_STEPS)
    tl.store(at, (code.to(tl.int32) + MEAN_ZERO).to(tl.uint8), mask=known)
    return tl.where(known, x - code * mean_step(wide), 0.0)


@triton.jit
def mean_step(scale):
    """Returns the step of mean codes, of any shape, fp32."""
    return tl.div_rn(scale, tl.full(scale.shape, MEAN_STEPS, tl.float32))


@triton.jit
def load_mean(at, known, scale):
    """Returns means fp32 of codes at uint8 pointers [1, K]; scale is one fp32 number."""
    code = tl.load(at, mask=known, other=0).to(tl.int32) - MEAN_ZERO
    return code.to(tl.float32) * mean_step(tl.broadcast_to(scale, [1, 1]))


@triton.jit
def balance_codes(energy, query_at, known, PAIRS: tl.constexpr):
    """Returns codes, int32 [1, P], that scale pairs by the fourth root of query over key energy.

    Args:
        energy: of keys, fp32 [1, P].
        query_at: fp32 pointers [1, P] to energies of queries, or None.
        known: pairs that there are, bool [1, P].
        PAIRS: their number.
    """
    most = tl.max(energy, 1, keep_dims=True)
    logs = tl.log2(energy) - tl.log2(tl.where(most > 0, most, 1.0))
    logs = tl.maximum(logs, LEAST_LOG)
    if query_at is None:
        logs = logs * (-0.25 * (1 - QUERY_POWER))
    else:
        query = tl.load(query_at, mask=known, other=1.0)
        logs = 0.25 * (tl.log2(tl.maximum(query, LEAST_ENERGY)) - logs)
    logs = tl.where(known, logs, 0.0)
    total = tl.sum(logs, 1, keep_dims=True)
    logs -= tl.div_rn(total, tl.full(total.shape, PAIRS, tl.float32))
    code = whole(tl.clamp(logs * BALANCE_STEPS, -BALANCE_ONE, 255 - BALANCE_ONE))
    # The conversion of NaN is undefined; such keys are refused.
    return tl.where(code == code, code, 0.0).to(tl.int32) + BALANCE_ONE


@triton.jit
def balance(code, SIGN: tl.constexpr):
    """Returns what balance codes scale pairs by, fp32; its inverse with SIGN -1."""
    return tl.exp2((code - BALANCE_ONE).to(tl.float32) * (SIGN / BALANCE_STEPS))


@triton.jit
def gain_codes(gains, most):
    """Returns codes of gains, fp32 [M, 1], below `most`, fp32 [1, 1]; int32 [M, 1]."""
    some = (gains > 0) & (most > 0)
    below = tl.log2(tl.where(some, most, 1.0)) - tl.log2(tl.where(some, gains, 1.0))
    code = tl.clamp(whole(below * GAIN_STEPS), 0.0, GAIN_ZERO)
    return tl.where(some & (code == code), code.to(tl.int32), GAIN_ZERO)


@triton.jit
def decoded_gains(code, most):
    """Returns gains fp32 of codes, int32."""
    gains = tl.exp2(code.to(tl.float32) * (-1.0 / GAIN_STEPS)) * most
    return tl.where(code < GAIN_ZERO, gains, 0.0)
