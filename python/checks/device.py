"""The end of a device that has failed."""

from __future__ import annotations


class DeviceLostError(RuntimeError):
    """The device answers a bare synchronisation with an error: nothing more can run in this process."""
