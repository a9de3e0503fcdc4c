"""Kernels on their own: one graph for each, in one module that test_kernels.py has compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, Module, TensorType, TensorValue, ops

from whisper_max.graphs.build import vector_width
from whisper_max.graphs.layers import KERNELS, Layers
from whisper_max.graphs.pack import pack
from whisper_max.graphs.specification import Parameter, Storage, inputs, threads_type

CPU = DeviceRef.CPU()


def build(*, device: str, cpu_level: str, source: str, products: str) -> Graph:
    """All graphs in one module; returns the last, which stands for the module.

    device : "cpu"
    cpu_level : as for `whisper_max.graphs.build.build`
    source : digest of this file: what another source builds is another artifact
    products : of linear, "weight*product", with commas between; "weight*product*tiles" in tiles
    """
    library = KernelLibrary()
    library.load_paths([KERNELS])
    builder = _Builder(Module(), library, vector_width(cpu_level))
    for way in products.split(","):
        builder.linear(*way.split("*"))
    for weight in ("float16", "float32", "int8"):
        builder.pack(weight)
    builder.layer_norm()
    builder.conv_patches("patches_of_mel", channels_first=True, stride=1)
    builder.conv_patches("patches", channels_first=False, stride=2)
    return builder.embed()


class _Builder:
    def __init__(self, module: Module, library: KernelLibrary, width: int) -> None:
        self.module = module
        self.library = library
        self.width = width

    def linear(self, weight: str, product: str, *tiles: str) -> None:
        """The op itself, so that norm, GELU and residual are chosen by its operands."""
        types = [
            _floats("batch", "length", "in"),
            _floats("normed"),
            _floats("normed"),
            TensorType(DType[weight], ("panels", "in", "lanes"), CPU),
            _floats("scaled"),
            _floats("out"),
            _floats("residual_length", "residual_out"),
            threads_type(CPU),
            TensorType(DType.int32, (), CPU),
        ]
        with self._graph("_".join(("linear", weight, product, *tiles)), types) as graph:
            operands = [value.tensor for value in graph.inputs]
            shape = (*operands[0].shape[:2], operands[5].shape[0])
            result = ops.custom(
                "whisper_linear",
                CPU,
                operands,
                [TensorType(DType.float32, shape, CPU)],
                parameters={
                    "width": self.width,
                    "product": DType[product],
                    "tiles": bool(tiles),
                },
            )
            graph.output(result[0].tensor)

    def pack(self, weight: str) -> None:
        storage = replace(self._storage(), weight=DType[weight])
        pack(self.module, self.library, storage, CPU, name=f"pack_{weight}")

    def layer_norm(self) -> None:
        names, types = zip(*inputs((Parameter("norm", "norm"),), self._storage(), CPU))
        operands = [_floats("batch", "length", "columns"), threads_type(CPU)]
        with self._graph("layer_norm", [*operands, *types]) as graph:
            x, threads, *weights = (value.tensor for value in graph.inputs)
            graph.output(self._layers(names, weights, threads).layer_norm(x, "norm"))

    def conv_patches(self, name: str, *, channels_first: bool, stride: int) -> None:
        types = [_floats("a", "b", "c"), _floats("frames"), threads_type(CPU)]
        with self._graph(name, types) as graph:
            x, frames, threads = (value.tensor for value in graph.inputs)
            y = self._layers((), (), threads).conv_patches(
                x, frames.shape[0], channels_first=channels_first, stride=stride
            )
            graph.output(y)

    def embed(self) -> Graph:
        parameters = (
            Parameter("decoder.token_embedding", "linear"),
            Parameter("decoder.positional_embedding", "table"),
        )
        names, types = zip(*inputs(parameters, self._storage(), CPU))
        with self._graph("embed", [_ints("rows", "tokens"), _ints("two"), *types]) as graph:
            tokens, position, *weights = (value.tensor for value in graph.inputs)
            graph.output(self._layers(names, weights).embed(tokens, position))
        return graph

    def _graph(self, name: str, types: Sequence[TensorType]) -> Graph:
        return Graph(
            name, input_types=types, kernel_library=self.library, module=self.module
        )

    def _layers(
        self,
        names: Sequence[str],
        weights: Sequence[TensorValue],
        threads: TensorValue | None = None,
    ) -> Layers:
        return Layers(dict(zip(names, weights)), threads, self._storage(), CPU)

    def _storage(self) -> Storage:
        return Storage(
            DType.float16,
            DType.float32,
            self.width,
            product=DType.float32,
            attention=DType.float32,
            tiles=False,
        )


def _floats(*shape: str) -> TensorType:
    return TensorType(DType.float32, shape, CPU)


def _ints(*shape: str) -> TensorType:
    return TensorType(DType.int32, shape, CPU)
