"""The machine as the catalogue has it: what is written is what the catalogue reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bench.calibration.machine import catalogue_yaml, slug
from shoal.plan.catalogue import cluster
from tests.bench.calibration.subjects import FIGURES, machine


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor"),
        ("AMD EPYC 7B13", "amd-epyc-7b13"),
        ("Intel(R) Core(TM) i7-8565U CPU @ 1.80GHz", "intel-core-i7-8565u-cpu"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("@", "device"),
    ],
)
def test_names_are_short_and_plain(name: str, short: str) -> None:
    assert slug(name) == short


def test_the_catalogue_reads_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(catalogue_yaml(machine(), (1, 2), {"stream.float32": 1.05, "attention.decode": 0.5}))
    whole = cluster("example-cpu-2c", files=[file])
    assert (whole.num_devices, whole.device.memory_bandwidth) == (1, FIGURES.read_bandwidth)
    assert whole.device.provenance == "measured"
    assert whole.device.fractions["attention.decode"] == 0.5
    assert whole.device.fractions["stream.float32"] == 1.0, "no fraction is of more than all there is"
    halves = cluster("example-cpu-2c-x2", files=[file])
    assert halves.num_devices == 2 and halves.scale_up.all_reduce == FIGURES.all_reduce
    assert 2 * halves.device.memory_bandwidth == whole.device.memory_bandwidth
    assert 2 * halves.device.rates["float32"] == whole.device.rates["float32"]


def test_ranks_share_a_cpu_and_have_an_accelerator_each() -> None:
    shared = machine()
    assert shared.cluster(2).device.memory_bytes == shared.device.memory_bytes // 2
    own = type(shared)(device=shared.device, link=shared.link, is_shared=False, description="")
    assert own.cluster(2).device == shared.device and own.cluster(2).num_devices == 2
