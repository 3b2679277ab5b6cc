"""A calibration file as the commands read it: one of another device is refused."""

from __future__ import annotations

from pathlib import Path

from shoal.cli.errors import CommandError
from shoal.core.cost.calibration import Calibration, decode
from shoal.core.hardware import DeviceSpec


def read_calibration(file: Path | None, device: DeviceSpec) -> Calibration | None:
    """Of `shoal calibrate`, for plans on `device`. Its fractions are of the figures that were measured with them, and
    say nothing of another device. Raises CommandError."""
    if file is None:
        return None
    try:
        found = decode(file.read_bytes())
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{file}: {error}") from None
    # A part of a machine, `NAME-1of2`, is calibrated with it.
    if found.device and device.name != found.device and not device.name.startswith(f"{found.device}-"):
        raise CommandError(
            f"{file}: was measured on {found.device}, and --on has {device.name}; what --on takes for the machine that "
            "was measured is written by `shoal calibrate --hardware FILE.yaml`"
        )
    return found
