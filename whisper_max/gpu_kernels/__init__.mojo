"""Mojo kernels of the graphs for GPUs: what MAX's own operations would do by copying.

They are written with `elementwise`, which makes threads of a GPU or a loop on a CPU of them.

    cache   self-attention caches: new tokens get their places, beams go on as copies of others
"""

from .cache import *
