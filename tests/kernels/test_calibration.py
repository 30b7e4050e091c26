import json
from pathlib import Path

import pytest
import torch

from polarcache.kernels import BlockShape, CalibrationError, Profile, ShapeError
from polarcache.kernels.calibration import Calibration
from polarcache.kernels.codec import Codec

SHAPE = BlockShape(128, 2, 64, 64, "half", 64)


def calibration_of(seed: int = 0, layers: int = 3) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    energies = torch.rand((layers, 2, 32), generator=generator) ** 8
    return Calibration.measured(energies, "half", 64, "a test")


def keys_of(slices: int = 3) -> torch.Tensor:
    return torch.randn((slices, 128, 2, 64), generator=torch.Generator().manual_seed(5)).half()


def packed_of(codec: Codec, keys: torch.Tensor, layers: list[int] | None) -> torch.Tensor:
    out = torch.empty((keys.shape[0], codec.layout.slice_bytes), dtype=torch.uint8)
    codec.encode(keys, keys, out, layers)
    return out


def test_file_reads_back_with_its_digest(tmp_path: Path) -> None:
    calibration = calibration_of()
    calibration.save(tmp_path / "model.json")
    loaded = Calibration.load(tmp_path / "model.json")
    assert torch.equal(loaded.query, calibration.query)
    assert loaded.digest == calibration.digest
    assert loaded.name == calibration.digest[:8]
    assert calibration_of(1).digest != calibration.digest
    other = Calibration(calibration.query, "interleaved", 64)
    assert other.digest != calibration.digest


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"digest": "0" * 64},
        {"query": "not base64!"},
        {"query": "AAAA"},
        {"shape": [3, 2, 31]},
        {"shape": [3, 2, -32]},
        {"shape": "many"},
        {"pairing": None},
        {"rotary_dim": "x"},
    ],
)
def test_damaged_files_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    document = json.loads(calibration_of().text()) | change
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"format": 1}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError):
        Calibration.parse(text)


def test_energies_that_are_not_positive_are_refused() -> None:
    for number in (0.0, -1.0, float("nan"), float("inf")):
        query = torch.ones((1, 1, 8), dtype=torch.float16)
        query[0, 0, 3] = number
        with pytest.raises(CalibrationError, match="positive"):
            Calibration(query, "half", 16)


@pytest.mark.parametrize("key", ["pair:tiers6", "polar:b6"])
def test_a_calibrated_slice_decodes_without_its_calibration(key: str) -> None:
    calibration = calibration_of()
    plain = Codec(Profile.parse(f"k={key},v=exact"), SHAPE, torch.float16)
    profile = Profile.parse(f"k={key}:cal{calibration.name},v=exact")
    codec = Codec(profile, SHAPE, torch.float16, calibration)
    keys = keys_of()
    packed = packed_of(codec, keys, [0, 1, 2])
    assert not torch.equal(packed, packed_of(plain, keys, None))
    assert not torch.equal(packed, packed_of(codec, keys, [2, 1, 0]))
    outs = []
    for reader in (codec, Codec(profile, SHAPE, torch.float16), plain):
        out, values = torch.empty_like(keys), torch.empty_like(keys)
        reader.decode(packed, out, values)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    # Errors now lie where queries do not look.
    weight = calibration.query.float().repeat(1, 1, 2).unsqueeze(1)
    plain_out = torch.empty_like(keys)
    plain.decode(packed_of(plain, keys, None), plain_out, torch.empty_like(keys))
    own = float(((outs[0] - keys).float().square() * weight).sum())
    assert own < 0.8 * float(((plain_out - keys).float().square() * weight).sum())


def test_the_wrong_or_no_calibration_is_refused() -> None:
    calibration, other = calibration_of(), calibration_of(1)
    profile = Profile.parse(f"k=polar:cal{calibration.name},v=exact")
    with pytest.raises(CalibrationError, match="expected"):
        Codec(profile, SHAPE, torch.float16, other)
    with pytest.raises(ShapeError, match="calibration"):
        Codec(profile, BlockShape(128, 4, 64, 64, "half", 64), torch.float16, calibration)
    with pytest.raises(CalibrationError, match="layer"):
        packed_of(Codec(profile, SHAPE, torch.float16), keys_of(), [0, 1, 2])
    codec = Codec(profile, SHAPE, torch.float16, calibration)
    for layers in (None, [0, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(CalibrationError, match="layer"):
            packed_of(codec, keys_of(), layers)
