"""What the loops of a kernel take of each of a GPU's pipes, read from its machine code, without a GPU.

`machine_code.kernels` reads the listing of cuobjdump --dump-sass, `machine_code.loops` finds the natural
loops of a kernel, `Account` counts a loop's instructions by pipe and says how many cycles of a scheduler each
pipe needs for one iteration of all warps of a block; `table` prints that. Used by tools/inspect_cuda.py
--loops and tools/compile_triton.py --loops.

An iteration is what runs every time: blocks of code that dominate the jumps back. What else belongs to the
loop is counted apart, as "behind a branch": masks of a ragged tile, say. An inner loop is one of its own and
not part of the outer one's counts. Predicated instructions count, as they are issued. Paths that only
diverged warps take (BRA.DIV) do not, and what is done again for every different value of a warp's lanes
(BRA.U.ANY) counts once. Loops that only wait for a barrier are not shown; of a kernel without loops all is.

Cycles are an instruction's interval times instructions times warps of a scheduler. They say what a pipe
needs, not how long one waits for a result: a loop reaches what binds it if there are warps enough. Of memory,
the way through the L1 cache and shared memory is counted, without conflicts, not L2 and DRAM.

Intervals, rates and their sources stand in gpu_rates.py.
"""

from __future__ import annotations

import re
import struct
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from gpu_rates import COLUMNS, PIPES, PRODUCTS, SHAPES, SHARED_BYTES, column_of, rates_of
from machine_code import Instruction, Kernel, Loop, all_code, loops


def _bytes_of(instruction: Instruction) -> int:
    """Return how many bytes of every lane an access moves through shared memory or the L1 cache."""
    opcode = instruction.opcode
    if instruction.base in ("LDSM", "STSM"):
        match = re.search(r"\.M\w+\.(\d)", opcode)
        return 4 * int(match[1]) if match else 4
    for bits in (256, 128, 64):
        if f".{bits}" in opcode:
            return bits // 8
    return 4


def _descriptors(code: list[Instruction], whole: list[Instruction]) -> dict[int, int]:
    """Return the descriptors of tcgen05's products, constants moved to a register before, by address."""
    wanted = {instruction.address for instruction in code if instruction.base.startswith("UTC")}
    found: dict[int, int] = {}
    if not wanted:
        return found
    values: dict[str, int] = {}
    for instruction in whole:
        if match := re.match(r"(UR\d+), 0x([0-9a-f]+)$", instruction.operands):
            values[match[1]] = int(match[2], 16)
        if instruction.address in wanted:
            match = re.search(r"idesc\[(UR\d+)\]", instruction.operands)
            found[instruction.address] = values.get(match[1], 0) if match else 0
    return found


class Account:
    """Instructions and cycles of one iteration, of the code given.

    Args:
        code: instructions.
        arch: "90a".
        warps: of a scheduler that run it, which all take these instructions.
        whole: the kernel's code, where descriptors of tcgen05's products are looked up.
    """

    def __init__(self, code: list[Instruction], arch: str, warps: int, whole: list[Instruction]) -> None:
        self.instructions: Counter[str] = Counter()
        self.cycles: dict[str, float] = defaultdict(float)
        self.least_tensor = 0.0  # cycles at the full rate of the tensor cores
        self.is_known = True  # whether all products' shapes are
        self._of_products = 0.0  # cycles of shared memory in which products read it
        self._rates, self._warps = rates_of(arch), warps
        shapes = _descriptors(code, whole)
        for instruction in code:
            self.instructions[self._add(instruction, shapes.get(instruction.address, 0))] += 1
        self.instructions["issue"] = len(code)
        self.cycles["issue"] = len(code) * warps
        if not self._rates.has_imad:
            self.cycles["fma"] += self.cycles.pop("imad", 0)
        else:
            self.cycles["fma"] += self.cycles["imad"] / 2
        self.cycles["memory"] = self.cycles["global"] + self.cycles["shared"]

    def _take(self, pipe: str, interval: float) -> None:
        self.cycles[pipe] += interval * self._warps

    def _add(self, instruction: Instruction, shape: int) -> str:
        """Add an instruction's cycles; return its column."""
        base, opcode, rates = instruction.base, instruction.opcode, self._rates
        if base in PRODUCTS:
            self._add_product(instruction)
            return "tensor"
        if base.startswith("UTC") and base.endswith("MMA"):
            self._add_tcgen05(instruction, shape)
            return "tensor"
        column = column_of(base)
        if column == "fma":
            self._take("fma", 2 if base.endswith("2") else rates.fma)
        elif column in ("imad", "alu"):
            self._take(column, 2)
        elif column == "half":
            self._take("half", rates.bfloat16 if "BF16" in opcode else rates.half)
        elif column == "fp64":
            self._take("fp64", rates.fp64)
        elif column == "special":
            self._take("special", 8)
        elif column == "convert" and base.endswith("P"):
            self._take("alu", 2)
        elif column == "convert":
            self._take("special", rates.convert_64 if "64" in opcode else 8)
        elif column in ("global", "shared") and base[0] != "U" and base not in ("LDTM", "STTM"):
            # A quarter of the way is a scheduler's.
            self._take(column, 32 * _bytes_of(instruction) / (SHARED_BYTES / 4))
        return column

    def _add_product(self, instruction: Instruction) -> None:
        opcode, rates = instruction.opcode, self._rates
        if match := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = map(int, match.groups())
            work = m * n * k
        elif (match := re.search(r"MMA\.(\d+)", opcode)) and match[1] in SHAPES:
            work = SHAPES[match[1]]
        else:
            self.is_known = False
            return
        rate = rates.tensor_64 if opcode.startswith("D") else rates.tensor
        if "TF32" in opcode:
            rate //= 2
        elif opcode[0] in "IQO":
            rate *= 2
        if "GMMA" in opcode:
            self.least_tensor += work / rate * self._warps
            self._take("tensor", work / rate)
            # Both operands come from shared memory, or the left one from registers.
            read = n * k + (0 if re.match(r"R\d+, R\d+", instruction.operands) else m * k)
            interval = read * (1 if opcode[0] in "IQ" else 2) / SHARED_BYTES
            self._take("shared", interval)
            self._of_products += interval * self._warps
        else:
            share = 1 if opcode.startswith("D") else rates.mma_share
            self.least_tensor += 4 * work / rate * self._warps
            self._take("tensor", 4 * work / (rate * share))

    def _add_tcgen05(self, instruction: Instruction, descriptor: int) -> None:
        """Add a product of a block, of whose descriptor bits 17 to 22 are N / 8 and 24 to 28 M / 16."""
        m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        if not m or not n:
            self.is_known = False
            return
        # 32 bytes of both operands: 16 numbers of 16 bits. TF32 takes twice as long for 8.
        k = {"UTCHMMA": 16, "UTCQMMA": 32, "UTCIMMA": 32}.get(instruction.base, 16)
        cycles = m * n * k / (self._rates.tensor * (k // 16))
        self.least_tensor += cycles
        self.cycles["tensor"] += cycles

    @property
    def binds(self) -> str:
        """The pipe that needs the most cycles."""
        return max(PIPES, key=lambda pipe: self.cycles[pipe])

    def allowed(self) -> tuple[float, float, float] | None:
        """Return shares of the tensor cores' rate, None where there are no products.

        Where all pipes work at once; where products, with their reading, and the rest take turns; where each
        pipe takes its turn.
        """
        if not self.least_tensor:
            return None
        rest = {pipe: self.cycles[pipe] for pipe in PIPES if pipe not in ("tensor", "issue")}
        rest["memory"] -= self._of_products
        # Integer products are in both.
        apart = sum(rest.values()) - min(rest["fma"], rest["imad"])
        products, issue = max(self.cycles["tensor"], self._of_products), self.cycles["issue"]
        return (
            self.least_tensor / max(products, issue, self.cycles["memory"], *rest.values()),
            self.least_tensor / (products + max(issue, *rest.values())),
            self.least_tensor / (products + max(issue, apart)),
        )


class Launch(NamedTuple):
    """How a kernel runs, as far as its machine code says."""

    registers: int  # per thread
    threads: int  # of a block, at most; 0: not known


def launches(cubin: bytes) -> dict[str, int]:
    """Return the threads of a block that an ELF file's kernels are built for, by mangled name, or 0."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = []
    for index in range(count):
        name, _, _, _, at, length = struct.unpack_from("<IIQQQQ", cubin, offset + index * size)
        sections.append((name, at, length))
    names_at = sections[names_index][1]
    found = {}
    for name, at, length in sections:
        text = cubin[names_at + name : cubin.index(b"\0", names_at + name)].decode()
        if not text.startswith(".nv.info."):
            continue
        threads, place = 0, at
        while place < at + length:
            kind, attribute, value = struct.unpack_from("<BBH", cubin, place)
            place += 4
            if kind == 4:
                # EIATTR_MAX_THREADS and EIATTR_REQNTID: three numbers.
                if attribute in (0x05, 0x10):
                    x, y, z = struct.unpack_from("<III", cubin, place)
                    threads = x * y * z
                place += value
        found[text.removeprefix(".nv.info.")] = threads
    return found


class Report(NamedTuple):
    """A kernel's loops and what they take."""

    name: str  # for people
    arch: str
    launch: Launch
    rows: list[tuple[Loop, int, Account, Account | None]]  # loop, warps of a block, always, behind a branch
    waiting: int  # loops that only wait


def report(name: str, kernel: Kernel, launch: Launch, warps: int | None = None) -> Report:
    """Return the loops of a kernel.

    Args:
        name: for people.
        kernel: its code.
        launch: how it runs.
        warps: of a block that run each loop; by default all, and where warpgroups give and take registers,
            one that gives and all others.
    """
    rows, waiting = [], 0
    for loop in loops(kernel.code):
        if loop.waits:
            waiting += 1
            continue
        all_warps = max(1, launch.threads // 32)
        running = {"more": all_warps - 4, "fewer": 4}.get(loop.registers, all_warps)
        running = warps or max(1, running)
        of_scheduler = -(-running // 4)
        always = Account(loop.always, kernel.arch, of_scheduler, kernel.code)
        behind = Account(loop.behind, kernel.arch, of_scheduler, kernel.code) if loop.behind else None
        rows.append((loop, running, always, behind))
    if not rows:
        whole = all_code(kernel.code)
        running = warps or max(1, launch.threads // 32)
        account = Account(whole.always, kernel.arch, -(-running // 4), kernel.code)
        rows.append((whole, running, account, None))
    return Report(name, kernel.arch, launch, rows, waiting)


_WIDTHS = {column: max(6, len(column) + 1) for column in COLUMNS}


def _row(label: str, values: dict[str, Any]) -> str:
    cells = []
    for column in COLUMNS:
        value = values.get(column, 0)
        text = value if isinstance(value, str) else f"{value:.0f}" if value else "."
        cells.append(f"{text:>{_WIDTHS[column]}}")
    return f"  {label:13}" + "".join(cells)


def verdict(account: Account) -> str:
    """Return in a sentence what binds one iteration, and what it leaves the tensor cores."""
    binds = account.binds
    text = f"{binds} binds, {account.cycles[binds]:.0f} cycles"
    if shares := account.allowed():
        at_once, turns, one_by_one = (f"{share:.0%}" for share in shares)
        text += f"; tensor cores {at_once} at once, {turns} in turns with the rest, {one_by_one} one by one"
    return text + ("" if account.is_known else "; products of unknown size")


def table(found: Report) -> str:
    """Return a kernel's loops as text, in 110 columns."""
    threads = f"blocks of {found.launch.threads} threads" if found.launch.threads else "blocks of any size"
    lines = textwrap.wrap(found.name, 110, subsequent_indent="    ")
    lines.append(f"  {found.arch}, {found.launch.registers} registers, {threads}")
    if found.waiting:
        lines[-1] += f", {found.waiting} loops that wait"
    lines.append(_row("", {column: column for column in COLUMNS}))
    for loop, warps, always, behind in found.rows:
        count = f"{warps} warps" if warps != 1 else "1 warp"
        what = (
            f"loop {loop.first:x}-{loop.last:x}, depth {loop.depth}"
            if loop.depth
            else "no loops, all its code"
        )
        lines.append(f"  {what}, {count} of a block")
        lines.append(f"    {verdict(always)}")
        lines.append(_row("instructions", always.instructions))
        lines.append(_row("cycles", always.cycles))
        if behind:
            lines.append(_row("behind branch", behind.instructions))
            lines.append(_row("cycles", behind.cycles))
    return "\n".join(lines)


def as_json(found: Report) -> dict[str, Any]:
    """Return a kernel's loops for a JSON file."""

    def numbers(account: Account | None) -> dict[str, Any] | None:
        if account is None:
            return None
        return {
            "instructions": {column: account.instructions[column] for column in COLUMNS},
            "cycles": {pipe: account.cycles[pipe] for pipe in (*PIPES, "global", "shared")},
            "binds": account.binds,
            "tensor_rate": account.allowed(),
        }

    return {
        "kernel": found.name,
        "arch": found.arch,
        "registers": found.launch.registers,
        "threads": found.launch.threads,
        "loops": [
            {
                "first": loop.first,
                "last": loop.last,
                "depth": loop.depth,
                "warps": warps,
                "always": numbers(always),
                "behind_a_branch": numbers(behind),
            }
            for loop, warps, always, behind in found.rows
        ],
    }


def threads_of(folder: Path) -> dict[tuple[str, str], int]:
    """Return `launches` of a folder's files *sm_ARCH.cubin, by mangled name and architecture."""
    found = {}
    for path in sorted(folder.glob("*.cubin")):
        match = re.search(r"sm_(\w+)\.cubin$", path.name)
        for name, threads in launches(path.read_bytes()).items():
            found[name, match[1] if match else ""] = threads
    return found
