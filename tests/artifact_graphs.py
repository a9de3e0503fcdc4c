"""The smallest module that has what ours have: two graphs with external weights."""

from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType, Weight


def build(*, device, cpu_level, width):
    """Graphs "encoder" and "decoder": x * scale; x (rows, width), scale (width,), any rows.

    Both do the same: MAX takes its time for each kind of kernel.
    """
    assert (device, cpu_level) == ("cpu", "baseline")
    module = Module()
    cpu = DeviceRef.CPU()
    for name in ("encoder", "decoder"):
        rows = TensorType(DType.float32, ("rows", width), cpu)
        with Graph(name, input_types=[rows], module=module) as graph:
            scale = graph.add_weight(Weight(f"{name}.scale", DType.float32, (width,), cpu))
            graph.output(graph.inputs[0].tensor * scale)
    return module
