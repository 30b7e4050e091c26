"""Dense streams of numbers of few bits: device functions."""

import triton
import triton.language as tl


@triton.jit
def store_stream(at_ptr, numbers, BITS: tl.constexpr):
    """Stores numbers of 1 to 32 bits, int32 [L], as a dense stream at uint8 at_ptr.

    L is a power of two and at least 16, with 1 or 5 bits 32; at_ptr is a multiple of 4 bytes.
    Neighbours are joined to numbers of 32, 24 or 20 bits.
    """
    JOINS: tl.constexpr = (
        5
        if BITS == 1
        else 4
        if BITS == 2
        else 2
        if BITS == 5
        else 3
        if BITS <= 4
        else 2
        if BITS <= 8
        else 32 // BITS - 1
    )
    WIDE: tl.constexpr = BITS << JOINS
    L: tl.constexpr = numbers.shape[0] >> JOINS
    for index in tl.static_range(JOINS):
        low, high = tl.split(tl.reshape(numbers, [numbers.shape[0] // 2, 2]))
        numbers = low | (high << (BITS << index))
    if WIDE == 32:
        tl.store(at_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, L), numbers)
    elif WIDE == 20:
        # Eight numbers are five words.
        low, high = tl.split(tl.permute(tl.reshape(numbers, [L // 8, 2, 4]), (0, 2, 1)))
        number_0, number_1, number_2, number_3 = _four(low)
        number_4, number_5, number_6, number_7 = _four(high)
        at = at_ptr.to(tl.pointer_type(tl.int32)) + 5 * tl.arange(0, L // 8)
        tl.store(at, number_0 | (number_1 << 20))
        tl.store(at + 1, (number_1 >> 12) | (number_2 << 8) | (number_3 << 28))
        tl.store(at + 2, (number_3 >> 4) | (number_4 << 16))
        tl.store(at + 3, (number_4 >> 16) | (number_5 << 4) | (number_6 << 24))
        tl.store(at + 4, (number_6 >> 8) | (number_7 << 12))
    elif L < 4:
        for index in tl.static_range(3):
            at = at_ptr + 3 * tl.arange(0, L) + index
            tl.store(at, ((numbers >> (8 * index)) & 0xFF).to(tl.uint8))
    else:
        even, odd = tl.split(tl.reshape(numbers, [L // 4, 2, 2]))
        number_0, number_2 = tl.split(even)
        number_1, number_3 = tl.split(odd)
        at = at_ptr.to(tl.pointer_type(tl.int32)) + 3 * tl.arange(0, L // 4)
        tl.store(at, number_0 | (number_1 << 24))
        tl.store(at + 1, (number_1 >> 8) | (number_2 << 16))
        tl.store(at + 2, (number_2 >> 16) | (number_3 << 8))


@triton.jit
def load_stream(at_ptr, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Loads what store_stream stored: int32 [SIZE], bits above BITS not cleared."""
    JOINS: tl.constexpr = (
        5
        if BITS == 1
        else 4
        if BITS == 2
        else 2
        if BITS == 5
        else 3
        if BITS <= 4
        else 2
        if BITS <= 8
        else 32 // BITS - 1
    )
    WIDE: tl.constexpr = BITS << JOINS
    L: tl.constexpr = SIZE >> JOINS
    if WIDE == 32:
        numbers = tl.load(at_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, L))
    elif WIDE == 20:
        at = at_ptr.to(tl.pointer_type(tl.int32)) + 5 * tl.arange(0, L // 8)
        word_0, word_1, word_2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        word_3, word_4 = tl.load(at + 3), tl.load(at + 4)
        number_1 = ((word_0 >> 20) & 0xFFF) | (word_1 << 12)
        number_3 = ((word_1 >> 28) & 0xF) | (word_2 << 4)
        number_4 = ((word_2 >> 16) & 0xFFFF) | (word_3 << 16)
        number_6 = ((word_3 >> 24) & 0xFF) | (word_4 << 8)
        low = tl.join(tl.join(word_0, word_1 >> 8), tl.join(number_1, number_3))
        high = tl.join(tl.join(number_4, number_6), tl.join(word_3 >> 4, word_4 >> 12))
        low, high = tl.reshape(low, [L // 8, 4]), tl.reshape(high, [L // 8, 4])
        numbers = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [L])
    elif L < 4:
        numbers = tl.zeros([L], tl.int32)
        for index in tl.static_range(3):
            at = at_ptr + 3 * tl.arange(0, L) + index
            numbers |= tl.load(at).to(tl.int32) << (8 * index)
    else:
        at = at_ptr.to(tl.pointer_type(tl.int32)) + 3 * tl.arange(0, L // 4)
        word_0, word_1, word_2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        number_1 = ((word_0 >> 24) & 0xFF) | (word_1 << 8)
        number_2 = ((word_1 >> 16) & 0xFFFF) | (word_2 << 16)
        numbers = tl.join(tl.join(word_0, number_2), tl.join(number_1, word_2 >> 8))
        numbers = tl.reshape(numbers, [L])
    for index in tl.static_range(JOINS):
        joined = tl.join(numbers, numbers >> (WIDE >> (index + 1)))
        numbers = tl.reshape(joined, [2 * numbers.shape[0]])
    return numbers


@triton.jit
def _four(numbers):
    """Splits [L, 4] into its columns."""
    even, odd = tl.split(tl.reshape(numbers, [numbers.shape[0], 2, 2]))
    number_0, number_2 = tl.split(even)
    number_1, number_3 = tl.split(odd)
    return number_0, number_1, number_2, number_3
