"""The FSDP example: on virtual devices, and over two processes."""

import re

import pytest

from tests import processes

SMALL = "--steps 3 --log-every 1 --depth 1 --width 64 --seq-len 32".split()
EXAMPLE = ["-m", "examples.fsdp.train"]


def command(devices, *args):
    return [*EXAMPLE, *SMALL, "--virtual-devices", devices, *args]


@pytest.mark.full
def test_eight_virtual_devices():
    (printed,) = processes.run(command(8, "--mesh", "fsdp=4,tp=2"))
    assert "8 devices of 1 processes: {'fsdp': 4, 'tp': 2}" in printed
    count, held = re.search(
        r"([\d,]+) params; a device holds ([\d,]+)", printed
    ).groups()
    count, held = (int(x.replace(",", "")) for x in (count, held))
    # About 5 bytes a param, over 8 devices, and what is too small to be in codes.
    assert held < 0.85 * count
    losses = [float(x) for x in re.findall(r"step \d+: ([\d.]+) nats", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 1


@pytest.mark.full
def test_two_processes_repeat_one_bit_for_bit():
    # Over two devices: a sum of two numbers has only one order.
    (alone,) = processes.run(command(2))
    several = ["--coordinator", processes.address(), "--processes", 2]
    first, second = processes.run(
        *(command(1, *several, "--process-id", i) for i in range(2))
    )
    lines = alone.splitlines()
    assert lines[-1].startswith("checksum of the state") and len(lines) == 6
    for line in lines[1:]:
        assert line in first
    assert "checksum" not in second
