"""Vibration data for the demo: a simulated bearing, and a reader for the CWRU recordings."""

from ._windows import Windows, standardise
from .bearing import simulate_bearing
from .cwru import load_cwru

__all__ = ["Windows", "load_cwru", "simulate_bearing", "standardise"]
