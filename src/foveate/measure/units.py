"""Figures with units, as tables and pictures show them."""

from __future__ import annotations


def _scaled(value: float, units: tuple[str, ...], step: float) -> str:
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.3g} {units[power]}" if value < 999.5 else f"{value:.0f} {units[power]}"


def show_flops(value: float) -> str:
    """Return a number of operations, such as ``"3.82 T"``."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1000)


def show_bytes(value: float) -> str:
    """Return a size, such as ``"1.54 MiB"``."""
    return _scaled(value, ("B", "KiB", "MiB", "GiB"), 1024)


def show_time(seconds: float) -> str:
    """Return a duration, such as ``"35.3 ms"``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
