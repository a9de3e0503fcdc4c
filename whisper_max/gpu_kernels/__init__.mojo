"""Mojo kernels of the graphs for GPUs.

    attention       softmax of scores, times values, without a matrix of scores: by one of the two
                    attention_by_tiles    many queries, on tensor cores
                    attention_by_lanes    few queries, and float32
    extent          what both know of their operands
    few_rows        linear layers of a decoding step
    tensor_cores    the instructions that tiles are fetched and multiplied with
    cache           self-attention caches: new tokens get their places, beams are copied
"""

from .attention import *
from .cache import *
from .few_rows import *
