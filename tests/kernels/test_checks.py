import pytest
import torch

from polarcache.kernels import BlockShape, NonFiniteError, PackedLayout, Profile
from polarcache.kernels.checks import check_packed

SHAPE = BlockShape(128, 2, 64, 64, "half", 64)
EXACT = Profile.parse("exact")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "max", "-max", "-0"])
def test_only_numbers_that_are_not_finite_are_refused(dtype: torch.dtype, value: str) -> None:
    layout = PackedLayout.of(EXACT, SHAPE, dtype.itemsize)
    numbers = torch.randn(3, layout.slice_bytes // dtype.itemsize).to(dtype)
    largest = torch.finfo(dtype).max
    numbers[1, 777] = {"max": largest, "-max": -largest, "-0": -0.0}.get(value, 0.0)
    if "nan" in value or "inf" in value:
        numbers[1, 777] = float(value.removeprefix("-"))
        if value.startswith("-"):
            bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            numbers.view(bits)[1, 777] |= -(1 << (8 * dtype.itemsize - 1))
        with pytest.raises(NonFiniteError, match="of slice 1"):
            check_packed(layout, dtype, numbers.view(torch.uint8))
    else:
        check_packed(layout, dtype, numbers.view(torch.uint8))


def test_parameters_of_a_codec_are_checked_and_codes_are_not() -> None:
    layout = PackedLayout.of(Profile.parse("k=pair:r4t4,v=int4"), SHAPE, 2)
    for field in layout.fields:
        packed = torch.zeros(2, layout.slice_bytes, dtype=torch.uint8)
        packed[1, field.offset : field.offset + field.num_bytes] = 0xFF
        if field.dtype == "code":
            check_packed(layout, torch.float16, packed)
        else:
            with pytest.raises(NonFiniteError, match=field.name):
                check_packed(layout, torch.float16, packed)


def test_no_slices_are_fine() -> None:
    layout = PackedLayout.of(EXACT, SHAPE, 2)
    check_packed(layout, torch.float16, torch.empty(0, layout.slice_bytes, dtype=torch.uint8))
