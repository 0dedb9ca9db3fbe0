"""row_distance: the squared distance of two tensors, row by row, as losses of aligned outputs need it."""

from radlads.kernels.row_distance.api import squared_distance

__all__ = ["squared_distance"]
