"""Data sets as loaders whose batches are pure functions of (seed, epoch, batch number)."""

from gac.data.build import build_data
from gac.data.interface import Data, DataInfo, Loader

__all__ = ["Data", "DataInfo", "Loader", "build_data"]
