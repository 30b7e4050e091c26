"""Rows of heads times an orthogonal matrix on the tensor cores: device functions.

fp16 products are exact and summed in fp32. A number that fp16 cannot hold is split in two, high and
low; a row that fp16 cannot hold is scaled by a power of two first. The matrix comes in one part
where its entries are whole (Hadamard), else in two, scaled by MATRIX_SCALE, so that the low part
stays above the smallest fp16 numbers: 22 bits of each entry.
"""

import triton
import triton.language as tl

from polarcache.kernels.polar.pair import FP16_MAX as _FP16_MAX

FP16_MAX = tl.constexpr(_FP16_MAX)
# Exponents of fp32 as they are stored: scaled rows have their largest number in [2^14, 2^15).
_TOP = tl.constexpr(127 + 14)
_LEAST = tl.constexpr(18)


@triton.jit
def powers(largest):
    """Returns powers of two, fp32: what scales `largest` to [2^14, 2^15), and its inverse."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, _LEAST)
    factor = (_TOP + 127 - exponent) << 23
    inverse = (exponent - _TOP + 127) << 23
    return factor.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def split_scaled(numbers, LOW: tl.constexpr):
    """Returns fp16 numbers nearest to fp32 ones below 65504, and with LOW what is left."""
    high = numbers.to(tl.float16)
    low = high
    if LOW:
        low = (numbers - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def split_rows(x):
    """Returns fp16 parts of rows [M, K] and fp32 [M, 1], what to multiply products with.

    fp16 numbers are taken as they are; fp32 ones have a low part.
    """
    if x.dtype == tl.float16:
        return x, x, tl.full([x.shape[0], 1], 1.0, tl.float32)
    else:
        wide = x.to(tl.float32)
        factor, inverse = powers(tl.max(tl.abs(wide), 1, keep_dims=True))
        high, low = split_scaled(wide * factor, x.dtype == tl.float32)
        return high, low, inverse


@triton.jit
def product(high, low, matrix_high, matrix_low, LOW: tl.constexpr, PARTS: tl.constexpr):
    """Returns [M, K] times [K, N] in fp32.

    The low part of rows counts with LOW, that of the matrix where PARTS is 2; low times low is
    left out.
    """
    numbers = tl.zeros([high.shape[0], matrix_high.shape[1]], tl.float32)
    return add_product(numbers, high, low, matrix_high, matrix_low, LOW, PARTS)


@triton.jit
def add_product(
    numbers, high, low, matrix_high, matrix_low, LOW: tl.constexpr, PARTS: tl.constexpr
):
    """Adds such a product to fp32 numbers [M, N]."""
    numbers = tl.dot(high, matrix_high, numbers)
    if PARTS == 2:
        numbers = tl.dot(high, matrix_low, numbers)
    if LOW:
        numbers = tl.dot(low, matrix_high, numbers)
    return numbers


@triton.jit
def load_matrix(matrix_ptr, K: tl.constexpr, N: tl.constexpr):
    """Loads fp16 [K, N], dense."""
    return tl.load(matrix_ptr + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])


@triton.jit
def load_matrices(matrix_ptr, K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """Loads the high and, where PARTS is 2, the low part of a matrix [PARTS, K, N]."""
    high = load_matrix(matrix_ptr, K, N)
    low = high
    if PARTS == 2:
        low = load_matrix(matrix_ptr + K * N, K, N)
    return high, low


@triton.jit
def look_up(table, codes):
    """Returns entries of a table [S] for int32 codes of any shape, by shared memory."""
    flat = tl.gather(table, tl.reshape(codes, [codes.numel]), 0)
    return tl.reshape(flat, codes.shape)


@triton.jit
def spread_columns(numbers):
    """Returns [1, N] by shared memory, so that no thread computes all the columns it uses."""
    N: tl.constexpr = numbers.shape[1]
    return look_up(tl.reshape(numbers, [N]), tl.arange(0, N))[None, :]


@triton.jit
def load_table(table_ptr, SIZE: tl.constexpr):
    """Loads [SIZE], a power of two."""
    return tl.load(table_ptr + tl.arange(0, SIZE))


@triton.jit
def turns(num_items):
    """Returns how many of num_items this program takes, one of every num_programs."""
    return tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))


@triton.jit
def halves(numbers):
    """Splits [M, N] into its first and its last N / 2 columns."""
    M: tl.constexpr = numbers.shape[0]
    N: tl.constexpr = numbers.shape[1]
    return tl.split(tl.permute(tl.reshape(numbers, [M, 2, N // 2]), (0, 2, 1)))


@triton.jit
def head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T: tl.constexpr):
    """Returns element offsets, int64, of rows T head + token of one slice; slots as token_rows."""
    token = row % T
    offset = (row // T).to(tl.int64) * stride_h
    if slots_ptr is None:
        return offset + slice_index * stride_n + token.to(tl.int64) * stride_t
    else:
        return offset + tl.load(slots_ptr + slice_index * T + token) * stride_t


@triton.jit
def store_rows(out_ptr, rows, numbers, bound, ok):
    """Stores fp32 [M, N] in the dtype of out_ptr, saturating to fp16, where ok, bool [1, N].

    No number is larger than the largest of bound, fp32 of any shape.
    """
    dtype = out_ptr.dtype.element_ty
    at = out_ptr + rows[:, None] + tl.arange(0, numbers.shape[1])[None, :]
    if dtype == tl.float16:  # noqa: SIM102, a condition of the compiler
        # Two instructions a number, rarely needed.
        if tl.max(tl.reshape(bound, [bound.numel]), 0) > FP16_MAX:
            numbers = tl.clamp(numbers, -FP16_MAX, FP16_MAX)
    tl.store(at, numbers.to(dtype), mask=ok)


@triton.jit
def refuse(flag_ptr, fine):
    """Sets a flag where one of the numbers of a program, of any shape, is not fine."""
    bad = tl.max(tl.reshape(tl.where(fine, 0, 1), [fine.numel]), 0)
    if bad > 0:
        tl.store(flag_ptr, 1)
