"""Vibration, speech and images: readers of the original formats, and data that need no files.

=================  =====================================================  ==================================
simulate_bearing   simulated vibration, 1 x 2048, eight states of health  nothing to download
load_cwru          Case Western Reserve University bearings, .mat         recordings split in time
load_speech        folders of LABEL_SPEAKER_TAKE.wav, log-mel images      takes or speakers held out
load_own           your own recordings in class folders, or a table       recordings split in time
load_idx           MNIST, Fashion-MNIST and their relatives, idx(.gz)     the official test files
load_digits        scikit-learn's 8 x 8 digits                            nothing to download
=================  =====================================================  ==================================

All of them return a :class:`Dataset`.
"""

from ._dataset import Dataset, Windows, standardise
from .bearing import simulate_bearing
from .cwru import load_cwru
from .images import load_digits, load_idx
from .own import load_own
from .speech import LogMel, load_speech

__all__ = [
    "Dataset",
    "LogMel",
    "Windows",
    "load_cwru",
    "load_digits",
    "load_idx",
    "load_own",
    "load_speech",
    "simulate_bearing",
    "standardise",
]
