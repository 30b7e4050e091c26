"""The two kernels: one launch encodes, one decodes, keys and values of all slices and heads."""

import triton
import triton.language as tl

from polarcache.kernels.gpu.arc import WHOLE
from polarcache.kernels.gpu.integer import decode_integers, encode_integers
from polarcache.kernels.gpu.pair_decode import decode_pairs
from polarcache.kernels.gpu.pair_encode import encode_pairs


@triton.jit
def _share(num_slices, KEY_PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr):
    """Returns whether this program codes keys, its slice (int64) and its part of the slice."""
    index = tl.program_id(0)
    if KEY_PARTS == VALUE_PARTS:
        # Taking turns, the arithmetic of keys hides the loads of values.
        is_key = index % 2 == 0
        index = index // 2
        part = index % KEY_PARTS
        slice_index = index // KEY_PARTS
    else:
        is_key = index < num_slices * KEY_PARTS
        index = tl.where(is_key, index, index - num_slices * KEY_PARTS)
        parts = tl.where(is_key, KEY_PARTS, VALUE_PARTS)
        part = index % parts
        slice_index = index // parts
    return is_key, slice_index.to(tl.int64), part


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
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
):
    """Encodes a part of one head and side.

    Grid: (slices * (KEY_PARTS + VALUE_PARTS)).
    Reads: k, v fp16, bf16 or fp32 [N, T, Hkv, D], last dim contiguous; or, where slots_ptr int64
    [N, T] names the rows, [rows, Hkv, D].
    Writes: out uint8 [N, slice_bytes], every byte of the coded sides; flags int32 [2, N], 1 where
    keys or values of a slice are refused, else left alone.
    Math, precision: encode_pairs, encode_integers. Reference: polarcache.kernels.codec.
    """
    is_key, slice_index, part = _share(num_slices, KEY_PARTS, VALUE_PARTS)
    slice_ptr = out_ptr + slice_index * stride_out_n
    if KEY is not None and is_key:
        TOKENS: tl.constexpr = KEY[7]
        STEPS: tl.constexpr = KEY[8]
        SPLITS: tl.constexpr = D // 16 // STEPS
        first_step = part % SPLITS * STEPS
        first_token = part // SPLITS % (T // TOKENS) * TOKENS
        head = (part // (SPLITS * (T // TOKENS))).to(tl.int64)
        R_BITS: tl.constexpr = KEY[0]
        T_BITS: tl.constexpr = KEY[1]
        GROUP: tl.constexpr = KEY[3]
        PAIR_BYTES: tl.constexpr = D // 16 * (R_BITS + T_BITS)
        codes_ptr = slice_ptr + KEY[5] + (head * T + first_token) * PAIR_BYTES
        group = head * (T // GROUP) + first_token // GROUP
        # Four kinds a pair, or two and the arc.
        parameters_ptr = slice_ptr + KEY[6] + group * (2 * D if KEY[2] == WHOLE else 4 * D)
        arcs_ptr = slice_ptr + KEY[9] + group * D
        encode_pairs(
            k_ptr + head * stride_k_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            arcs_ptr,
            flags_ptr + slice_index,
            slice_index,
            stride_k_n,
            stride_k_t,
            first_token,
            first_step,
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
            STEPS,
        )
    if VALUE is not None and not is_key:
        VALUE_TOKENS: tl.constexpr = VALUE[5]
        first_token = part % (T // VALUE_TOKENS) * VALUE_TOKENS
        head = (part // (T // VALUE_TOKENS)).to(tl.int64)
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
            VALUE_TOKENS,
        )


@triton.jit
def decode_kernel(
    packed_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    num_slices,
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
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
):
    """Decodes a part of one head and side.

    Grid: as encode_kernel.
    Reads: packed uint8 [N, slice_bytes].
    Writes: k, v as encode_kernel reads them, every element once.
    Math, precision: decode_pairs, decode_integers. Reference: polarcache.kernels.codec.
    """
    is_key, slice_index, part = _share(num_slices, KEY_PARTS, VALUE_PARTS)
    slice_ptr = packed_ptr + slice_index * stride_packed_n
    if KEY is not None and is_key:
        TOKENS: tl.constexpr = KEY[7]
        STEPS: tl.constexpr = KEY[8]
        SPLITS: tl.constexpr = D // 16 // STEPS
        first_step = part % SPLITS * STEPS
        first_token = part // SPLITS % (T // TOKENS) * TOKENS
        head = (part // (SPLITS * (T // TOKENS))).to(tl.int64)
        R_BITS: tl.constexpr = KEY[0]
        T_BITS: tl.constexpr = KEY[1]
        GROUP: tl.constexpr = KEY[3]
        PAIR_BYTES: tl.constexpr = D // 16 * (R_BITS + T_BITS)
        codes_ptr = slice_ptr + KEY[5] + (head * T + first_token) * PAIR_BYTES
        group = head * (T // GROUP) + first_token // GROUP
        # Four kinds a pair, or two and the arc.
        parameters_ptr = slice_ptr + KEY[6] + group * (2 * D if KEY[2] == WHOLE else 4 * D)
        arcs_ptr = slice_ptr + KEY[9] + group * D
        decode_pairs(
            k_ptr + head * stride_k_h,
            slots_ptr,
            codes_ptr.to(tl.pointer_type(tl.int32)),
            parameters_ptr.to(tl.pointer_type(tl.float16)),
            arcs_ptr,
            slice_index,
            stride_k_n,
            stride_k_t,
            first_token,
            first_step,
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
            STEPS,
        )
    if VALUE is not None and not is_key:
        VALUE_TOKENS: tl.constexpr = VALUE[5]
        first_token = part % (T // VALUE_TOKENS) * VALUE_TOKENS
        head = (part // (T // VALUE_TOKENS)).to(tl.int64)
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
            VALUE_TOKENS,
        )
