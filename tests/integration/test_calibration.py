"""A calibration goes with the namespace: the service packs as a worker with it would."""

import dataclasses
from typing import Any

import pytest
import torch

from polarcache.client import NamespaceSpec, chain_keys
from polarcache.client.codec import pack_blocks
from polarcache.kernels.calibration import Calibration
from polarcache.proto.errors import InvalidRequestError

KEYS = chain_keys(range(3 * 128), 128)


@pytest.fixture
def calibration() -> Calibration:
    energies = torch.rand(3, 2, 32, generator=torch.Generator().manual_seed(5)) ** 4
    return Calibration.measured(energies, "half", 64, "a test")


def test_a_calibrated_namespace_packs_by_its_calibration(
    service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any, calibration: Calibration
) -> None:
    plain = "k=pair:tiers7,v=int4"
    profile = f"k=pair:tiers7:cal{calibration.name},v=int4"
    layers = make_layers(spec.layout, 3)
    with service.client() as client:
        calibrated = client.open_namespace(
            dataclasses.replace(spec, profile=profile, calibration=calibration.text())
        )
        client.store(calibrated, KEYS, layers)
        match = client.lookup(calibrated, KEYS)
        blocks = [bytes(block) for block in client.retrieve_packed(match).blocks]
        assert blocks == [bytes(block) for block in pack_blocks(calibrated, layers)]
        worker = client.retrieve(match, pack="worker")
        assert are_same(worker.layers, client.retrieve(match).layers)
        uncalibrated = client.open_namespace(dataclasses.replace(spec, profile=plain))
        assert uncalibrated.namespace_id != calibrated.namespace_id
        assert blocks != [bytes(block) for block in pack_blocks(uncalibrated, layers)]


def test_another_or_no_calibration_is_refused(
    service: Any, spec: NamespaceSpec, calibration: Calibration
) -> None:
    profile = f"k=pair:tiers7:cal{calibration.name},v=int4"
    other = Calibration.measured(torch.ones(3, 2, 32), "half", 64)
    narrow = Calibration.measured(torch.ones(3, 2, 16), "half", 32)
    with service.client() as client:
        for text, named in (
            ("", profile),
            (calibration.text(), "k=pair:r4t4,v=int4"),
            (other.text(), profile),
            (narrow.text(), f"k=pair:tiers7:cal{narrow.name},v=int4"),
            ("{}", profile),
            (calibration.text().replace("half", "interleaved"), profile),
        ):
            with pytest.raises(InvalidRequestError, match=r"calibration|expected"):
                client.open_namespace(dataclasses.replace(spec, profile=named, calibration=text))
