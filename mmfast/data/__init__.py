"""Data sets: arrays in memory, `.npz` files, media folders, the default, synthetic; padding, processors."""

from mmfast.data.arrays import ArrayDataset
from mmfast.data.folder import load_folder
from mmfast.data.load import load
from mmfast.data.npz import load_npz
from mmfast.data.overview import overview
from mmfast.data.pad import pad
from mmfast.data.processors import with_processors
from mmfast.data.splits import Splits
from mmfast.data.synthetic import synthetic

__all__ = [
    "ArrayDataset",
    "Splits",
    "load",
    "load_folder",
    "load_npz",
    "overview",
    "pad",
    "synthetic",
    "with_processors",
]
