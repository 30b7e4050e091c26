"""The two kernels: one launch encodes, one decodes, keys and values of all slices and heads."""

import triton
import triton.language as tl

from polarcache.kernels.gpu.integer import decode_integers, encode_integers
from polarcache.kernels.gpu.pair import decode_pairs, encode_pairs


@triton.jit
def _place(index, H: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr):
    """Splits a program's index into slice and head, int64, and first token."""
    parts: tl.constexpr = T // TOKENS
    head = (index // parts % H).to(tl.int64)
    return (index // (parts * H)).to(tl.int64), head, index % parts * TOKENS


@triton.jit
def encode_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    out_ptr,
    flags_ptr,
    num_slices,
    stride_k_n,
    stride_k_t,
    stride_k_h,
    stride_v_n,
    stride_v_t,
    stride_v_h,
    stride_out_n,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Encodes TOKENS tokens of one head and side.

    Grid: (sides * slices * heads * T / TOKENS); programs of keys and values take turns, so that
    the arithmetic of the ones hides the loads of the others.
    Reads: k, v fp16, bf16 or fp32 [N, T, Hkv, D], last dim contiguous; or, where slots_ptr int64
    [N, T] names the rows, [rows, Hkv, D].
    Writes: out uint8 [N, slice_bytes], every byte of the coded sides; flags int32 [2, N], 1 where
    keys or values of a slice are refused, else left alone.
    Math, precision: encode_pairs, encode_integers. Reference: polarcache.kernels.codec.
    """
    index = tl.program_id(0)
    is_key = KEY is not None
    if KEY is not None and VALUE is not None:
        is_key = index % 2 == 0
        index = index // 2
    slice_index, head, first_token = _place(index, H, T, TOKENS)
    slice_ptr = out_ptr + slice_index * stride_out_n
    if KEY is not None and is_key:
        R_BITS: tl.constexpr = KEY[0]
        T_BITS: tl.constexpr = KEY[1]
        GROUP: tl.constexpr = KEY[3]
        PAIR_BYTES: tl.constexpr = D // 16 * (R_BITS + T_BITS)
        codes_ptr = slice_ptr + KEY[5] + (head * T + first_token) * PAIR_BYTES
        group = head * (T // GROUP) + first_token // GROUP
        parameters_ptr = slice_ptr + KEY[6] + group * (4 * D)
        encode_pairs(
            k_ptr + head * stride_k_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            flags_ptr + slice_index,
            slice_index,
            stride_k_n,
            stride_k_t,
            first_token,
            T,
            D,
            ROTARY,
            INTERLEAVED,
            R_BITS,
            T_BITS,
            KEY[2],
            GROUP,
            KEY[4],
            TOKENS,
        )
    if VALUE is not None and not is_key:
        BITS: tl.constexpr = VALUE[0]
        CHANNELS: tl.constexpr = VALUE[1]
        codes_ptr = slice_ptr + VALUE[3] + (head * T + first_token) * (DV * BITS // 8)
        parameters_ptr = slice_ptr + VALUE[4] + (head * T + first_token) * (DV // CHANNELS * 4)
        encode_integers(
            v_ptr + head * stride_v_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            flags_ptr + num_slices + slice_index,
            slice_index,
            stride_v_n,
            stride_v_t,
            first_token,
            T,
            DV,
            BITS,
            CHANNELS,
            VALUE[2],
            TOKENS,
        )


@triton.jit
def decode_kernel(
    packed_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    stride_packed_n,
    stride_k_n,
    stride_k_t,
    stride_k_h,
    stride_v_n,
    stride_v_t,
    stride_v_h,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Decodes TOKENS tokens of one head and side.

    Grid: as encode_kernel.
    Reads: packed uint8 [N, slice_bytes].
    Writes: k, v as encode_kernel reads them, every element once.
    Math, precision: decode_pairs, decode_integers. Reference: polarcache.kernels.codec.
    """
    index = tl.program_id(0)
    is_key = KEY is not None
    if KEY is not None and VALUE is not None:
        is_key = index % 2 == 0
        index = index // 2
    slice_index, head, first_token = _place(index, H, T, TOKENS)
    slice_ptr = packed_ptr + slice_index * stride_packed_n
    if KEY is not None and is_key:
        R_BITS: tl.constexpr = KEY[0]
        T_BITS: tl.constexpr = KEY[1]
        GROUP: tl.constexpr = KEY[3]
        PAIR_BYTES: tl.constexpr = D // 16 * (R_BITS + T_BITS)
        codes_ptr = slice_ptr + KEY[5] + (head * T + first_token) * PAIR_BYTES
        group = head * (T // GROUP) + first_token // GROUP
        parameters_ptr = slice_ptr + KEY[6] + group * (4 * D)
        decode_pairs(
            k_ptr + head * stride_k_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            slice_index,
            stride_k_n,
            stride_k_t,
            first_token,
            T,
            D,
            ROTARY,
            INTERLEAVED,
            R_BITS,
            T_BITS,
            GROUP,
            KEY[4],
            TOKENS,
        )
    if VALUE is not None and not is_key:
        BITS: tl.constexpr = VALUE[0]
        CHANNELS: tl.constexpr = VALUE[1]
        codes_ptr = slice_ptr + VALUE[3] + (head * T + first_token) * (DV * BITS // 8)
        parameters_ptr = slice_ptr + VALUE[4] + (head * T + first_token) * (DV // CHANNELS * 4)
        decode_integers(
            v_ptr + head * stride_v_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            slice_index,
            stride_v_n,
            stride_v_t,
            first_token,
            T,
            DV,
            BITS,
            CHANNELS,
            VALUE[2],
            TOKENS,
        )
