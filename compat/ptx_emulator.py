"""Runs kernels of PTX, the assembly of NVIDIA GPUs, on a CPU: as far as our own kernels use it.

Written from the PTX ISA manual (version 8.5). Lanes of a warp step together, the lowest place in
the code first where they part. Warps run one after the other from barrier to barrier, in an order
that is drawn: what lacks a barrier or a wait meets memory that is not there yet. Every address is
held against the memory that there is. Shared memory and the places that asynchronous copies are
under way to hold NaN.

Not as on a GPU: asynchronous copies are waited for by the warp, not by each lane; tensor cores add
up in float64, and powers of two and reciprocals are exact. Of speed this shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

LANES = 32
EVERY_LANE = np.ones(LANES, bool)
FIRST_ADDRESS = 1 << 32
APART = 1 << 28
"""Bytes from one array in global memory to the next: a wrong address hits none."""
SHARED_BASE = 1024
"""Where shared memory begins, as on sm_90."""

TYPES = {
    "pred": np.bool_,
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"{kind}x2": np.dtype("u4") for kind in ("f16", "bf16")},
    "bf16": np.dtype("u2"),
}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}
BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax, "div": np.divide,
    "copysign": lambda sign, value: np.copysign(value, sign),
}
UNARY = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2,
    "rcp": np.reciprocal,
}

MANNERS = {
    "add": {"rn"}, "mul": {"rn", "lo", "wide"}, "mad": {"lo", "wide"}, "fma": {"rn"},
    "div": {"rn"}, "rcp": {"rn"}, "ex2": {"approx", "ftz"}, "cvt": {"rn"},
}
"""What may stand between an operation and its types, here, without changing what is computed."""

Read = Callable[["Warp"], np.ndarray]
Run = Callable[["Warp", np.ndarray], None]


class Fault(Exception):
    """What a GPU would not do, or not the same way each time."""


class Kernel:
    """One kernel out of a module.

    text : the module's PTX
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        entry = re.search(r"\.entry\s+(\S+?)\s*\((.*?)\)[^{]*\{(.*)\}", text, re.DOTALL)
        if entry is None or text.count(".entry") != 1:
            raise ValueError("not one kernel")
        self.name, parameters, body = entry.groups()
        self.parameters: dict[str, int] = {}
        self.parameter_bytes = 0
        for parameter in filter(str.strip, parameters.split(",")):
            self._add_parameter(parameter)
        self.symbols: dict[str, int] = {}
        self.shared_bytes = SHARED_BASE
        self.register_types: dict[str, np.dtype] = {}
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        self._read_shared(text[: entry.start()])
        self._read_shared(body)
        for line in re.sub(r"\.shared\s+\.align[^;]*;", "", body).split(";"):
            self._add(line)
        for instruction in self.code:
            instruction.prepare(self)

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[np.ndarray | int],
        seed: int = 0,
    ) -> None:
        """Runs all blocks, each of `threads` along x.

        arguments : arrays in global memory, written in place; integers of 64 bits
        """
        order = np.random.default_rng(seed)
        memory = GlobalMemory([each for each in arguments if isinstance(each, np.ndarray)])
        addresses = iter(memory.addresses)
        given = np.array(
            [next(addresses) if isinstance(a, np.ndarray) else a for a in arguments], np.int64
        ).tobytes()
        if len(given) != self.parameter_bytes:
            raise ValueError(f"{self.parameter_bytes} bytes of parameters, not {len(given)}")
        given = np.frombuffer(given, np.uint8)
        with np.errstate(all="ignore"):
            for block in np.ndindex(*reversed(grid)):
                Block(self, block[::-1], grid, threads, memory, given).run(order)

    def _add_parameter(self, text: str) -> None:
        *words, name = text.split()
        array = re.fullmatch(r"(\S+)\[(\d+)\]", name)
        size = int(array[2]) if array else TYPES[words[1][1:]].itemsize
        self.parameters[array[1] if array else name] = self.parameter_bytes
        self.parameter_bytes += size

    def _read_shared(self, text: str) -> None:
        for align, name, size in re.findall(
            r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text
        ):
            at = -(-self.shared_bytes // int(align)) * int(align)
            self.symbols[name] = at
            self.shared_bytes = at + int(size)

    def _add(self, line: str) -> None:
        line = line.strip()
        while label := re.match(r"([$\w]+):\s*", line):
            self.labels[label[1]] = len(self.code)
            line = line[label.end() :]
        if registers := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", line):
            for number in range(int(registers[3])):
                self.register_types[f"{registers[2]}{number}"] = TYPES[registers[1]]
        elif line and not line.startswith((".pragma", ".loc")):
            self.code.append(Instruction(line))


class Instruction:
    """One line: a guard, an operation with its qualifiers, operands."""

    def __init__(self, line: str) -> None:
        self.text = " ".join(line.split())
        guard, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", self.text).groups()
        operation, _, operands = rest.partition(" ")
        self.operation, *self.qualifiers = re.split(r"\.|::", operation)
        self.operands = [
            part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()
        ]
        self.guard = guard
        self.target = -1
        self.run: Run | None = None
        self.passes: Read | None = None

    def prepare(self, kernel: Kernel) -> None:
        """Finds what carries it out."""
        reader = Reader(kernel)
        if self.guard:
            holds = reader.read(self.guard.lstrip("!"), TYPES["pred"])
            self.passes = (lambda warp: ~holds(warp)) if self.guard[0] == "!" else holds
        if self.operation == "bra":
            self.target = kernel.labels[self.operands[0]]
        elif self.operation not in ("ret", "exit", "bar", "barrier"):
            make = getattr(reader, f"make_{self.operation}", None)
            if make is None:
                make = reader.arithmetic(self)
            self.run = make(self)


class GlobalMemory:
    """Arrays at addresses of their own."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.bytes = [array.reshape(-1).view(np.uint8) for array in arrays]
        self.addresses = [FIRST_ADDRESS + i * APART for i in range(len(arrays))]

    def access(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The array that all these addresses are in, and the places there: (lanes, size)."""
        numbers = (addresses - FIRST_ADDRESS) // APART
        array = self.bytes[int(numbers[0])] if numbers[0] < len(self.bytes) else np.zeros(0)
        places = (addresses - FIRST_ADDRESS) % APART
        if (numbers != numbers[0]).any() or (places + size > len(array)).any():
            raise Fault("an address outside of global memory")
        return array, _places(places, size)


def _places(first: np.ndarray, size: int) -> np.ndarray:
    if (first % size).any():
        raise Fault(f"an address that is no multiple of {size}")
    return first.astype(np.int64)[:, None] + np.arange(size)


class Block:
    """The warps of a block, and their shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        place: Sequence[int],
        grid: Sequence[int],
        threads: int,
        memory: GlobalMemory,
        parameters: np.ndarray,
    ) -> None:
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.shared = np.full(kernel.shared_bytes, 0xFF, np.uint8)
        self.special = {f"%ctaid.{axis}": number for axis, number in zip("xyz", place)}
        self.special |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid)}
        self.special |= {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}
        self.warps = [Warp(self, first) for first in range(0, threads, LANES)]

    def run(self, order: np.random.Generator) -> None:
        """To the end of all warps."""
        running = self.warps
        while running:
            for i in order.permutation(len(running)):
                running[i].run()
            left = [warp for warp in running if not warp.ended]
            if left and len(left) != len(self.warps):
                raise Fault("a barrier that some warps never reach")
            running = left

    def access(
        self, addresses: np.ndarray, size: int, shared: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The memory that all these addresses are in, and the places there: (lanes, size)."""
        if shared:
            return self.shared, self.within_shared(addresses, size)
        return self.memory.access(addresses, size)

    def within_shared(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The places of these addresses, shape = (lanes, size)."""
        if (addresses < SHARED_BASE).any() or (addresses + size > len(self.shared)).any():
            raise Fault("an address outside of shared memory")
        return _places(addresses, size)


class Warp:
    """32 lanes. Registers are arrays of one number a lane."""

    def __init__(self, block: Block, first: int) -> None:
        self.block = block
        self.thread = np.arange(first, first + LANES, dtype=np.uint32)
        rubbish = np.random.default_rng(first)
        self.registers = {
            name: np.frombuffer(rubbish.bytes(LANES * dtype.itemsize), dtype).copy()
            if dtype != np.bool_ else rubbish.random(LANES) < 0.5
            for name, dtype in ((n, np.dtype(t)) for n, t in block.kernel.register_types.items())
        }
        self.ended = False
        self.groups: list[list] = [[]]  # of asynchronous copies; the last is still open
        self._at = {0: EVERY_LANE}  # the lanes that stand at each place in the code

    def run(self) -> None:
        """As far as the next barrier, or the end."""
        code = self.block.kernel.code
        while self._at:
            place = min(self._at)
            lanes = self._at.pop(place)
            instruction = code[place]
            active = lanes
            if instruction.passes is not None:
                active = lanes & instruction.passes(self)
            operation = instruction.operation
            if operation == "bra":
                self._go_to(instruction.target, active)
                self._go_to(place + 1, lanes & ~active)
            elif operation in ("ret", "exit"):
                self._go_to(place + 1, lanes & ~active)
            else:
                self._go_to(place + 1, lanes)
                if operation in ("bar", "barrier"):
                    if not active.all():
                        raise Fault("a barrier without some lanes")
                    return
                if active.any():
                    try:
                        instruction.run(self, active)
                    except Fault as fault:
                        raise Fault(f"{fault}: {instruction.text}") from None
        self.ended = True

    def _go_to(self, place: int, lanes: np.ndarray) -> None:
        if lanes.any():
            there = self._at.get(place)
            self._at[place] = lanes if there is None else there | lanes


class Reader:
    """Makes functions of the text of instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    # Operands

    def read(self, text: str, dtype: np.dtype) -> Read:
        """An operand as numbers of a type."""
        dtype = np.dtype(dtype)
        if text in self.kernel.register_types:
            if np.dtype(self.kernel.register_types[text]).itemsize < dtype.itemsize:
                raise ValueError(f"{text} is too small for {dtype}")
            return lambda warp: _as(warp.registers[text], dtype)
        if text == "%tid.x":
            return lambda warp: warp.thread.astype(dtype)
        if text == "%laneid":
            return lambda warp: (warp.thread % LANES).astype(dtype)
        if text.startswith("%"):
            return lambda warp: np.full(LANES, warp.block.special[text]).astype(dtype)
        constant = np.full(LANES, self._constant(text, dtype), dtype)
        return lambda warp: constant

    def _constant(self, text: str, dtype: np.dtype) -> np.generic:
        if text in self.kernel.symbols:
            return dtype.type(self.kernel.symbols[text])
        if bits := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            return np.array(int(bits[2], 16), f"u{dtype.itemsize}").view(dtype)[()]
        # An integer's bits, whatever the type.
        value = int(text.rstrip("U"), 0) % (1 << (8 * dtype.itemsize))
        return np.array(value, f"u{dtype.itemsize}").view(dtype)[()]

    def write(self, text: str) -> Callable[[Warp, np.ndarray, np.ndarray], None]:
        """Sets a register where lanes are active."""
        if text == "_":
            return lambda warp, value, lanes: None
        to = np.dtype(self.kernel.register_types[text])

        def set_register(warp: Warp, value: np.ndarray, lanes: np.ndarray) -> None:
            value = np.asarray(value)
            if value.dtype.itemsize != to.itemsize:
                value = value.astype(f"{value.dtype.kind}{to.itemsize}")
            warp.registers[text][lanes] = value.view(to)[lanes]

        return set_register

    def address(self, text: str, dtype: str) -> Read:
        """What stands in brackets: a register or a name, and perhaps a distance."""
        base, _, distance = text.strip("[]").partition("+")
        read = self.read(base, TYPES[dtype])
        return lambda warp: (read(warp).astype(np.int64) + int(distance or 0))

    # Operations on numbers

    def arithmetic(self, instruction: Instruction) -> Callable[[Instruction], Run]:
        """For operations that are functions of numbers of one type."""
        name = instruction.operation
        if name in BINARY:
            return partial(self._function, BINARY[name])
        if name in UNARY:
            return partial(self._function, UNARY[name])
        raise ValueError(f"not known: {instruction.text}")

    def _function(self, function: Callable, instruction: Instruction) -> Run:
        _check_manner(instruction, 1)
        dtype = TYPES[instruction.qualifiers[-1]]
        if instruction.qualifiers[-1] in ("f16x2", "bf16x2", "bf16"):
            raise ValueError(f"not known: {instruction.text}")
        sources = [self.read(text, dtype) for text in instruction.operands[1:]]
        write = self.write(instruction.operands[0])
        flush = "ftz" in instruction.qualifiers

        def run(warp: Warp, lanes: np.ndarray) -> None:
            result = function(*(source(warp) for source in sources))
            if flush:
                result = np.where(np.abs(result) < np.finfo(dtype).tiny, 0, result).astype(dtype)
            write(warp, result, lanes)

        return run

    def make_fma(self, instruction: Instruction) -> Run:
        """Rounded once."""
        wide = {"f2": np.float32, "f4": np.float64, "f8": np.longdouble}
        dtype = np.dtype(TYPES[instruction.qualifiers[-1]])
        more = wide[f"{dtype.kind}{dtype.itemsize}"]
        return self._function(
            lambda a, b, c: (a.astype(more) * b + c).astype(dtype), instruction
        )

    def make_mul(self, instruction: Instruction) -> Run:
        """The lower half of the product, its upper half, or all of it."""
        if "wide" not in instruction.qualifiers:
            return self._function(np.multiply, instruction)
        return self._wide(instruction, lambda a, b: a * b)

    def make_mad(self, instruction: Instruction) -> Run:
        """A product and a sum, of integers."""
        if "wide" in instruction.qualifiers:
            return self._wide(instruction, lambda a, b, c: a * b + c)
        return self._function(lambda a, b, c: a * b + c, instruction)

    def _wide(self, instruction: Instruction, function: Callable) -> Run:
        _check_manner(instruction, 1)
        dtype = np.dtype(TYPES[instruction.qualifiers[-1]])
        more = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        types = (dtype, dtype, more)
        sources = [self.read(t, dt) for t, dt in zip(instruction.operands[1:], types)]
        write = self.write(instruction.operands[0])
        return lambda warp, lanes: write(
            warp, function(*(source(warp).astype(more) for source in sources)), lanes
        )

    def make_shl(self, instruction: Instruction) -> Run:
        return self._shift(instruction, np.left_shift)

    def make_shr(self, instruction: Instruction) -> Run:
        return self._shift(instruction, np.right_shift)

    def _shift(self, instruction: Instruction, function: Callable) -> Run:
        _check_manner(instruction, 1)
        dtype = np.dtype(TYPES[instruction.qualifiers[-1]])
        value = self.read(instruction.operands[1], dtype)
        by = self.read(instruction.operands[2], TYPES["u32"])
        write = self.write(instruction.operands[0])
        return lambda warp, lanes: write(warp, function(value(warp), by(warp).astype(dtype)), lanes)

    def make_setp(self, instruction: Instruction) -> Run:
        compare, *_, kind = instruction.qualifiers
        unordered = compare.endswith("u") and compare[:-1] in COMPARISONS
        function = COMPARISONS[compare[:-1] if unordered else compare]
        first, second = (self.read(text, TYPES[kind]) for text in instruction.operands[1:])
        write = self.write(instruction.operands[0])

        def run(warp: Warp, lanes: np.ndarray) -> None:
            a, b = first(warp), second(warp)
            result = function(a, b)
            if a.dtype.kind == "f":
                missing = np.isnan(a) | np.isnan(b)
                result = result | missing if unordered else result & ~missing
            write(warp, result, lanes)

        return run

    def make_selp(self, instruction: Instruction) -> Run:
        dtype = TYPES[instruction.qualifiers[-1]]
        first, second = (self.read(text, dtype) for text in instruction.operands[1:3])
        which = self.read(instruction.operands[3], TYPES["pred"])
        write = self.write(instruction.operands[0])
        return lambda warp, lanes: write(
            warp, np.where(which(warp), first(warp), second(warp)), lanes
        )

    def make_mov(self, instruction: Instruction) -> Run:
        """A copy; or several registers into one, or one into several."""
        to, source = instruction.operands
        dtype = np.dtype(TYPES[instruction.qualifiers[-1]])
        if source.startswith("{"):
            names = _names(source)
            part = np.dtype(f"u{dtype.itemsize // len(names)}")
            parts = [self.read(name, part) for name in names]
            write = self.write(to)
            return lambda warp, lanes: write(
                warp, np.stack([p(warp) for p in parts], axis=1).view(dtype)[:, 0], lanes
            )
        read = self.read(source, dtype)
        if to.startswith("{"):
            names = _names(to)
            part = np.dtype(f"u{dtype.itemsize // len(names)}")
            writes = [self.write(name) for name in names]

            def split(warp: Warp, lanes: np.ndarray) -> None:
                parts = np.ascontiguousarray(read(warp)).view(part).reshape(LANES, -1)
                for i, write in enumerate(writes):
                    write(warp, np.ascontiguousarray(parts[:, i]), lanes)

            return split
        write = self.write(to)
        return lambda warp, lanes: write(warp, read(warp), lanes)

    def make_cvta(self, instruction: Instruction) -> Run:
        """Generic addresses are those of global memory here; only these are converted."""
        if "global" not in instruction.qualifiers:
            raise ValueError(f"not known: {instruction.text}")
        write = self.write(instruction.operands[0])
        read = self.read(instruction.operands[1], TYPES["u64"])
        return lambda warp, lanes: write(warp, read(warp), lanes)

    def make_cvt(self, instruction: Instruction) -> Run:
        """From one type to another, to the nearest."""
        _check_manner(instruction, 2)
        to, source = instruction.qualifiers[-2:]
        write = self.write(instruction.operands[0])
        reads = [self.read(text, TYPES[source]) for text in instruction.operands[1:]]
        if to in ("f16x2", "bf16x2"):  # the first operand is the upper half
            half = partial(_converted, to=to[:-2], source=source)
            return lambda warp, lanes: write(
                warp,
                half(reads[0](warp)).view("u2").astype("u4") << np.uint32(16)
                | half(reads[1](warp)).view("u2"),
                lanes,
            )
        return lambda warp, lanes: write(warp, _converted(reads[0](warp), to, source), lanes)

    def make_prmt(self, instruction: Instruction) -> Run:
        """Four bytes out of eight."""
        first, second, choice = (
            self.read(text, TYPES["b32"]) for text in instruction.operands[1:]
        )
        write = self.write(instruction.operands[0])

        def run(warp: Warp, lanes: np.ndarray) -> None:
            pool = np.stack([first(warp), second(warp)], axis=1).view(np.uint8)
            by = choice(warp)
            if (by & 0x8888).any():
                raise Fault("a sign instead of a byte")
            which = np.stack([(by >> np.uint32(4 * i)) & np.uint32(7) for i in range(4)], axis=1)
            picked = np.take_along_axis(pool, which.astype(np.int64), axis=1)
            write(warp, picked.view(np.uint32)[:, 0], lanes)

        return run

    # Memory

    def make_ld(self, instruction: Instruction) -> Run:
        kind = np.dtype(TYPES[instruction.qualifiers[-1]])
        names = _names(instruction.operands[0])
        size = kind.itemsize * len(names)
        writes = [self.write(name) for name in names]
        if "param" in instruction.qualifiers:
            name, _, distance = instruction.operands[1].strip("[]").partition("+")
            at = self.kernel.parameters[name] + int(distance or 0)

            def load_parameter(warp: Warp, lanes: np.ndarray) -> None:
                values = warp.block.parameters[at : at + size].view(kind)
                for value, write in zip(values, writes):
                    write(warp, np.full(LANES, value), lanes)

            return load_parameter
        shared = "shared" in instruction.qualifiers
        self._check_space(instruction)
        address = self.address(instruction.operands[1], "u32" if shared else "u64")

        def load(warp: Warp, lanes: np.ndarray) -> None:
            array, places = warp.block.access(address(warp)[lanes], size, shared)
            found = array[places].view(kind)
            for i, write in enumerate(writes):
                value = np.zeros(LANES, kind)
                value[lanes] = found[:, i]
                write(warp, value, lanes)

        return load

    def make_st(self, instruction: Instruction) -> Run:
        kind = np.dtype(TYPES[instruction.qualifiers[-1]])
        reads = [self.read(name, kind) for name in _names(instruction.operands[1])]
        size = kind.itemsize * len(reads)
        shared = "shared" in instruction.qualifiers
        self._check_space(instruction)
        address = self.address(instruction.operands[0], "u32" if shared else "u64")

        def store(warp: Warp, lanes: np.ndarray) -> None:
            array, places = warp.block.access(address(warp)[lanes], size, shared)
            values = np.stack([read(warp)[lanes] for read in reads], axis=1)
            array[places] = values.view(np.uint8)

        return store

    def _check_space(self, instruction: Instruction) -> None:
        if not {"global", "shared"} & set(instruction.qualifiers):
            raise ValueError(f"memory of no known kind: {instruction.text}")

    def make_cp(self, instruction: Instruction) -> Run:
        """Copies that arrive when they are waited for, as late as a GPU may let them."""
        if "commit_group" in instruction.qualifiers:
            return lambda warp, lanes: warp.groups.append([])
        if "wait_group" in instruction.qualifiers:
            besides = int(instruction.operands[0])

            def wait(warp: Warp, lanes: np.ndarray) -> None:
                # The last list is the group that is still open.
                count = len(warp.groups) - 1 - besides
                for group in warp.groups[:count] if count > 0 else []:
                    for places, data in group:
                        warp.block.shared[places] = data
                warp.groups = warp.groups[max(count, 0) :]

            return wait
        if instruction.qualifiers[:4] != ["async", "cg", "shared", "global"]:
            raise ValueError(f"not known: {instruction.text}")
        to, source = (
            self.address(text, dtype)
            for text, dtype in zip(instruction.operands, ("u32", "u64"))
        )
        size = self.read(instruction.operands[3], TYPES["u32"])

        def copy(warp: Warp, lanes: np.ndarray) -> None:
            places = warp.block.within_shared(to(warp)[lanes], 16)
            array, sources = warp.block.memory.access(source(warp)[lanes], 16)
            data = np.where(np.arange(16) < size(warp)[lanes][:, None], array[sources], 0)
            warp.block.shared[places] = 0xFF
            warp.groups[-1].append((places, data))

        return copy

    # What a warp does together

    def make_shfl(self, instruction: Instruction) -> Run:
        if instruction.qualifiers != ["sync", "bfly", "b32"]:
            raise ValueError(f"not known: {instruction.text}")
        to, source, distance, bounds, members = instruction.operands
        value = self.read(source, TYPES["b32"])
        by = self.read(distance, TYPES["u32"])
        if (int(bounds, 0), int(members, 0)) not in ((31, -1), (31, 0xFFFFFFFF)):
            raise ValueError(f"not known: {instruction.text}")
        write = self.write(to.partition("|")[0])

        def run(warp: Warp, lanes: np.ndarray) -> None:
            _need_all(lanes)
            write(warp, value(warp)[np.arange(LANES) ^ by(warp)], lanes)

        return run

    def make_ldmatrix(self, instruction: Instruction) -> Run:
        if instruction.qualifiers[:4] != ["sync", "aligned", "m8n8", "x4"]:
            raise ValueError(f"not known: {instruction.text}")
        transposed = "trans" in instruction.qualifiers
        writes = [self.write(name) for name in _names(instruction.operands[0])]
        address = self.address(instruction.operands[1], "u32")

        def run(warp: Warp, lanes: np.ndarray) -> None:
            _need_all(lanes)
            places = warp.block.within_shared(address(warp), 16)
            matrices = warp.block.shared[places].view(np.uint16).reshape(4, 8, 8)
            for write, matrix in zip(writes, matrices):
                matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
                write(warp, matrix.view(np.uint32).reshape(LANES), lanes)

        return run

    def make_mma(self, instruction: Instruction) -> Run:
        shape, left, right, to, kind, other, sums = instruction.qualifiers[2:]
        if (shape, left, right, to, sums) != ("m16n8k16", "row", "col", "f32", "f32"):
            raise ValueError(f"not known: {instruction.text}")
        if kind != other or kind not in ("f16", "bf16"):
            raise ValueError(f"not known: {instruction.text}")
        writes = [self.write(name) for name in _names(instruction.operands[0])]
        a, b = (
            [self.read(name, TYPES["b32"]) for name in _names(instruction.operands[i])]
            for i in (1, 2)
        )
        c = [self.read(name, TYPES["f32"]) for name in _names(instruction.operands[3])]
        g, t = np.arange(LANES) // 4, np.arange(LANES) % 4

        def halves(warp: Warp, read: Read) -> tuple[np.ndarray, np.ndarray]:
            two = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(LANES, 2)
            return _widened(two[:, 0], kind), _widened(two[:, 1], kind)

        def run(warp: Warp, lanes: np.ndarray) -> None:
            _need_all(lanes)
            rows, columns, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
            for i, read in enumerate(a):
                for j, values in enumerate(halves(warp, read)):
                    rows[g + i % 2 * 8, 2 * t + j + i // 2 * 8] = values
            for i, read in enumerate(b):
                for j, values in enumerate(halves(warp, read)):
                    columns[2 * t + j + 8 * i, g] = values
            for i, read in enumerate(c):
                total[g + i // 2 * 8, 2 * t + i % 2] = read(warp)
            total = (rows @ columns + total).astype(np.float32)
            for i, write in enumerate(writes):
                write(warp, total[g + i // 2 * 8, 2 * t + i % 2], lanes)

        return run


def _check_manner(instruction: Instruction, types: int) -> None:
    unknown = set(instruction.qualifiers[:-types]) - MANNERS.get(instruction.operation, set())
    if unknown:
        raise ValueError(f"not known: {instruction.text}")


def _need_all(lanes: np.ndarray) -> None:
    if not lanes.all():
        raise Fault("an instruction for the whole warp, without some lanes")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _as(register: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A register's numbers as of another type; of a smaller one, their lower bytes."""
    if register.dtype == np.bool_ or register.dtype.itemsize == dtype.itemsize:
        return register.view(dtype)
    return register.astype(f"u{dtype.itemsize}").view(dtype)


def _widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of 16 bits, "f16" or "bf16", as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _converted(values: np.ndarray, to: str, source: str) -> np.ndarray:
    if source == "bf16":
        values, source = _widened(values, "bf16"), "f32"
    if to != "bf16":
        return values.astype(TYPES[to])
    bits = values.astype(np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
