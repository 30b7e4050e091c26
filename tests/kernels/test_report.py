import pytest
import torch

from polarcache.kernels import NonFiniteError, Profile, ShapeError
from polarcache.kernels.report import Report, codec_report


def report_of(text: str, tokens: int, dtype: torch.dtype = torch.float16) -> Report:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn((tokens, 2, 64), generator=generator).to(dtype)
    values = torch.randn((tokens, 2, 32), generator=generator).to(dtype)
    return codec_report(
        Profile.parse(text), keys, values, pairing="half", rotary_dim=64, block_tokens=128
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_report_leaves_the_tail_exact_and_out_of_the_errors(dtype: torch.dtype) -> None:
    whole, ragged = report_of("k=pair,v=int4", 256, dtype), report_of("k=pair,v=int4", 300, dtype)
    assert (whole.num_tokens, whole.num_tokens_coded) == (256, 256)
    assert (ragged.num_tokens, ragged.num_tokens_coded) == (300, 256)
    assert ragged.keys.shape == (300, 2, 64)
    assert ragged.keys.dtype == ragged.values.dtype == dtype
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn((300, 2, 64), generator=generator).to(dtype)
    assert torch.equal(ragged.keys[256:], keys[256:])
    error = (ragged.keys[:256].double() - keys[:256].double()).norm() / keys[:256].double().norm()
    assert ragged.key_relative_l2 == pytest.approx(float(error))
    assert 0.05 < ragged.key_relative_l2 < 0.12
    assert 0 < ragged.value_relative_l2 < 0.12
    assert ragged.key_max_error > ragged.key_relative_l2


def test_report_counts_bits_and_bytes() -> None:
    report = report_of("k=pair,v=int4", 256)
    assert (report.key_bits, report.value_bits) == (4.25, 5.0)
    assert report.bits == pytest.approx((4.25 * 64 + 5.0 * 32) / 96)
    assert report.raw_bytes == 256 * 2 * 96 * 2
    assert report.packed_bytes * 8 == report.raw_bytes // 2 * report.bits
    assert report.ratio == pytest.approx(16 / report.bits)
    assert report.profile == "k=pair:r4t4,v=int4"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_report_of_exact_has_no_error(dtype: torch.dtype) -> None:
    report = report_of("exact", 130, dtype)
    assert report.key_relative_l2 == report.value_max_error == 0.0
    assert report.ratio == 1.0
    assert report.bits == 8 * dtype.itemsize


def test_report_of_what_does_not_fit_is_refused() -> None:
    profile = Profile.parse("k=pair,v=int4")
    keys = torch.zeros((128, 2, 64))
    arguments = {"pairing": "half", "rotary_dim": 64, "block_tokens": 128}
    for bad_keys, bad_values in (
        (keys[:127], keys[:127]),
        (keys, keys[:, :1]),
        (keys, keys.half()),
        (keys[0], keys[0]),
        (keys.int(), keys.int()),
    ):
        with pytest.raises(ShapeError, match="expected"):
            codec_report(profile, bad_keys, bad_values, **arguments)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="values of slice 0"):
        codec_report(profile, keys, keys + torch.inf, **arguments)  # type: ignore[arg-type]
