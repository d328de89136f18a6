"""What the loops of a kernel take of each of a GPU's pipes, read from its machine code, without a GPU.

`kernels` reads the listing of cuobjdump --dump-sass, `loops` finds the natural loops of a kernel, `Account`
counts a loop's instructions by pipe and says how many cycles of a scheduler each pipe needs for one iteration
of all warps of a block; `table` prints that. Used by tools/inspect_cuda.py --loops and
tools/compile_triton.py --loops.

An iteration is what runs every time: blocks of code that dominate the jumps back. What else belongs to the
loop is counted apart, as "behind a branch": masks of a ragged tile, say. An inner loop is one of its own and
not part of the outer one's counts. Predicated instructions count, as they are issued. Paths that only
diverged warps take (BRA.DIV) do not, and what is done again for every different value of a warp's lanes
(BRA.U.ANY) counts once. Loops that only wait for a barrier are not shown; of a kernel without loops all is.

Cycles are an instruction's interval times instructions times warps of a scheduler. They say what a pipe
needs, not how long one waits for a result: a loop reaches what binds it if there are warps enough. Of memory,
the way through the L1 cache and shared memory is counted, without conflicts, not L2 and DRAM.

Intervals are 32 lanes over those that a scheduler's quarter of the SM executes in a cycle. Sources:

- arithmetic: the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ programming guide,
  results a cycle and SM on 8.0, 9.0, 10.0, 12.0. FP32 64, 128, 128, 128; comparisons, logic, shifts, integer
  sums and products 64; half precision 256, 256, 256, 128, of bfloat16 on 8.0 128; FP64 32, 64, 64, 2; special
  functions, bit counts and conversions by the same pipe 16; shuffles 32. Integer products take the pipe of
  FP32, later than 8.0 one half of it. Conversions of two floats into one register (F2FP) and of integers by
  I2FP are taken as 64. On 10.0 and 12.0 some integer sums may run at 128 and are taken as 64.
- memory: 32 banks of 4 bytes a cycle and SM (the guide, shared memory). A warpgroup's product reads what lies
  there once for all four warps. Moves from and to tensor memory count as one slot: no rate is published.
- tensor cores: NVIDIA's papers of the architectures, multiply-adds of 16 bits a cycle and SM; DENSE_PEAKS
  holds what they are checked against. mma.sync reaches 63% of that on Hopper (arXiv 2402.13499) and is taken
  to do as much a cycle on 10.0, of which nothing is published. 12.0 is the GeForce, at half rate with sums in
  float32.
"""

from __future__ import annotations

import re
import struct
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = (
    *("tensor", "fma", "imad", "alu", "half", "fp64", "special", "convert"),
    *("global", "shared", "uniform", "sync", "other", "issue"),
)
# Those that work beside each other; memory is what global and shared share.
PIPES = ("tensor", "fma", "imad", "alu", "half", "fp64", "special", "memory", "issue")


class Rates(NamedTuple):
    """Cycles in which a scheduler's quarter of an SM takes one instruction of a warp."""

    fma: int
    has_imad: bool  # integer products take one half of the FP32 pipe, otherwise all of it
    half: int
    bfloat16: int
    fp64: int
    convert_64: int  # from and to types of 64 bits
    tensor: int  # multiply-adds of 16 bits a cycle and SM
    tensor_64: int
    mma_share: float  # of that rate, what the product of a single warp reaches


RATES = {
    "80": Rates(2, False, 1, 2, 4, 8, 1024, 64, 1),
    "90": Rates(1, True, 1, 1, 2, 8, 2048, 128, 0.63),
    "100": Rates(1, True, 1, 1, 2, 8, 4096, 64, 0.315),
    "120": Rates(1, True, 2, 2, 64, 64, 256, 4, 1),
}
_SHARED_BYTES = 128  # a cycle and SM

# By architecture: the card, its dense peak in TFLOP/s of bfloat16 with sums in float32, its SMs, GHz of that.
DENSE_PEAKS = {
    "80": ("A100 SXM", 312, 108, 1.41),
    "90": ("H100 SXM", 989.4, 132, 1.83),
    "100": ("B200", 2250, 148, 1.85),
    "120": ("RTX 5090", 209.5, 170, 2.407),
}

# Column by opcode, without what follows by points. Products, and uniform ones, are told by their letters.
_COLUMN_OF = {
    opcode: column
    for column, opcodes in {
        "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I FSWZADD",
        "imad": "IMAD IMUL IMAD32I IDP",
        "alu": """IADD3 IADD VIADD VIADDMNMX LOP3 LOP SHF SHL SHR LEA ISETP FSETP FSEL SEL FMNMX FMNMX3 IMNMX
            VIMNMX VIMNMX3 PRMT PLOP3 MOV MOV32I P2R R2P IABS FSET FCHK VOTE MATCH HMNMX2 VHMNMX BMSK SGXT
            VABSDIFF VABSDIFF4 ISCADD""",
        "half": "HADD2 HMUL2 HFMA2 HSETP2 HSET2 HADD2_32I HMUL2_32I HFMA2_32I",
        "fp64": "DADD DMUL DFMA DSETP DMNMX DSET",
        "special": "MUFU POPC FLO BREV REDUX",
        "convert": "F2F F2I I2F FRND I2I F2FP I2FP I2IP F2IP",
        "global": """LDG STG LD ST LDL STL LDGSTS RED REDG REDAS ATOM ATOMG STAS
            UBLKCP UBLKPF UBLKRED UTMALDG UTMASTG UTMAPF UTMAREDG""",
        "shared": "LDS STS LDSM STSM ATOMS SHFL LDTM STTM",
        "uniform": "R2UR S2UR CREDUX VOTEU",
        "sync": """BAR SYNCS WARPSYNC BSSY BSYNC BREAK BMOV WARPGROUP WARPGROUPSET DEPBAR LDGDEPBAR MEMBAR
            FENCE ERRBAR CGAERRBAR NANOSLEEP YIELD ELECT ENDCOLLECTIVE USETMAXREG UTCBAR UTCATOMSWS
            UTMACMDFLUSH UCGABAR_ARV UCGABAR_WAIT ACQBULK ACQSHMINIT PREEXIT CCTL ARRIVES""",
    }.items()
    for opcode in opcodes.split()
}


def _column_of(opcode: str) -> str:
    return _COLUMN_OF.get(opcode, "uniform" if opcode.startswith("U") else "other")


_PRODUCTS = {"HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "QMMA", "OMMA"}
_SHAPES = {
    "16816": 16 * 8 * 16,
    "1688": 16 * 8 * 8,
    "1684": 16 * 8 * 4,
    "884": 8 * 8 * 4,
    "16832": 16 * 8 * 32,
}


class Instruction(NamedTuple):
    address: int
    predicate: str  # "P0", "!UP1", or "" where it always runs
    opcode: str  # with what follows by points
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


class Kernel(NamedTuple):
    name: str  # mangled
    arch: str  # "80", "90a"
    code: list[Instruction]


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+) )?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def kernels(listing: Iterable[str]) -> Iterator[Kernel]:
    """Yield the kernels of a listing that cuobjdump --dump-sass or nvdisasm printed."""
    arch, name, built_for = "", "", ""
    code: list[Instruction] = []
    for line in listing:
        if match := _LINE.match(line):
            address, predicate, opcode, operands = match.groups()
            code.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        elif "code for sm_" in line:
            arch = line.rpartition("sm_")[2].strip()
        elif "Function :" in line:
            if code:
                yield Kernel(name, built_for, code)
            name, built_for, code = line.rpartition(":")[2].strip(), arch, []
    if code:
        yield Kernel(name, built_for, code)


_WAITS = {"NANOSLEEP", "SYNCS", "USETMAXREG", "UTCATOMSWS"}


class Loop(NamedTuple):
    first: int  # addresses of the first and last instruction of an iteration
    last: int
    depth: int  # 1: in no other; 0: all code of a kernel without loops
    always: list[Instruction]  # of every iteration, inner loops left out
    behind: list[Instruction]  # behind a branch
    registers: str  # "more" or "fewer": its warps have taken or given registers; "": no such thing

    @property
    def waits(self) -> bool:
        """Whether it does nothing but wait for a barrier."""
        opcodes = {instruction.base for instruction in [*self.always, *self.behind]}
        columns = {_column_of(opcode) for opcode in opcodes}
        return not _WAITS.isdisjoint(opcodes) and columns <= {"sync", "other", "alu", "imad", "uniform"}


_ENDS = {"BRA", "BRX", "JMP", "JMX", "EXIT", "RET"}


def _target(instruction: Instruction) -> int | None:
    """Return where an instruction may go on, None if it is the next or the code does not say."""
    if instruction.base not in ("BRA", "JMP", "CALL", "WARPSYNC"):
        return None
    found = re.search(r"\b0x([0-9a-f]+)$", instruction.operands)
    # WARPSYNC 0xffffffff is a mask; that of a .COLLECTIVE names what diverged warps go to.
    is_mask = instruction.base == "WARPSYNC" and "," not in instruction.operands
    return int(found[1], 16) if found and not is_mask else None


def _is_conditional(instruction: Instruction) -> bool:
    return instruction.predicate not in ("", "PT", "UPT") or bool(
        re.search(r"\bU?P\d\b|\.CONV", f"{instruction.opcode} {instruction.operands}")
    )


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]], list[int]]:
    """Return basic blocks, their successors, and those where a kernel or a function it calls begins."""
    place = {instruction.address: index for index, instruction in enumerate(code)}
    leaders: set[int] = {0}
    called: set[int] = set()
    entered: set[int] = set()
    for index, instruction in enumerate(code):
        if instruction.base in _ENDS:
            leaders.add(index + 1)
        if (target := _target(instruction)) in place:
            (called if instruction.base == "CALL" else entered).add(place[target])
    starts = sorted(leader for leader in leaders | called | entered if leader < len(code))
    number = {start: block for block, start in enumerate(starts)}
    blocks = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    successors: list[list[int]] = []
    unknown, diverged = [], []
    for block, instructions in enumerate(blocks):
        last, following = instructions[-1], []
        is_skipped = ".DIV" in last.opcode or ".ANY" in last.opcode
        target = _target(last)
        if last.base in ("BRA", "JMP") and target in place and not is_skipped:
            following.append(number[place[target]])
        diverged += [
            place[target]
            for instruction in instructions
            if (instruction.base == "WARPSYNC" or ".DIV" in instruction.opcode)
            and (target := _target(instruction)) in place
        ]
        if last.base in ("BRX", "JMX"):
            unknown.append(block)
        if (last.base not in _ENDS or is_skipped or _is_conditional(last)) and block + 1 < len(blocks):
            following.append(block + 1)
        successors.append(following)
    if unknown:
        # A jump by a table: to all that nothing before leads to, less what only diverged warps run.
        ahead = {
            target for block, following in enumerate(successors) for target in following if target > block
        }
        skipped = {number[index] for index in diverged}
        others = {0, *ahead, *skipped, *(number[index] for index in called)}
        for block in unknown:
            successors[block] += [case for case in range(len(blocks)) if case not in others]
    return blocks, successors, [0, *sorted(number[index] for index in called)]


def _dominators(successors: list[list[int]], roots: list[int]) -> tuple[list[int], list[int]]:
    """Return each block's immediate dominator, and its number in reverse postorder; -1 where none gets.

    A last block, which does not exist, comes before the roots. (Cooper, Harvey, Kennedy: A simple, fast
    dominance algorithm.)
    """
    top = len(successors)
    graph = [*successors, roots]
    order, seen, stack = [], {top}, [(top, iter(graph[top]))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(graph[following])))
                break
        else:
            order.append(block)
            stack.pop()
    order.reverse()
    rank = [-1] * (top + 1)
    for index, block in enumerate(order):
        rank[block] = index
    before: list[list[int]] = [[] for _ in graph]
    for block in order:
        for following in graph[block]:
            before[following].append(block)
    dominator = [-1] * (top + 1)
    dominator[top] = top
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = -1
            for other in before[block]:
                if dominator[other] < 0:
                    continue
                while new >= 0 and new != other:
                    if rank[new] > rank[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
                new = other
            if new != dominator[block]:
                dominator[block], changed = new, True
    return dominator, rank


def loops(code: list[Instruction]) -> list[Loop]:
    """Return the natural loops of a kernel, inner ones before those that hold them."""
    blocks, successors, roots = _blocks(code)
    dominator, rank = _dominators(successors, roots)
    top = len(blocks)

    def above(block: int) -> Iterator[int]:
        while block != top:
            yield block
            block = dominator[block]

    latches: dict[int, list[int]] = {}
    before: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        if rank[block] < 0:
            continue
        for head in following:
            before[head].append(block)
            if rank[head] <= rank[block] and head in above(block):
                latches.setdefault(head, []).append(block)
    bodies = {}
    for head, ends in latches.items():
        body, stack = {head}, list(ends)
        while stack:
            block = stack.pop()
            if block not in body:
                body.add(block)
                stack += before[block]
        bodies[head] = body
    found = []
    for head, body in bodies.items():
        inner = set[int]().union(*(bodies[other] for other in bodies if other != head and other in body))
        steady = set.intersection(*(set(above(latch)) for latch in latches[head]))
        always: list[Instruction] = []
        behind: list[Instruction] = []
        for block in sorted(body - inner):
            # One thread begins tcgen05's products for all: behind a branch, and in every iteration.
            for instruction in blocks[block]:
                is_always = block in steady or instruction.base.startswith("UTC")
                (always if is_always else behind).append(instruction)
        depth = sum(head in other for other in bodies.values())
        registers = ""
        for block in above(head):
            for instruction in blocks[block]:
                if instruction.base == "USETMAXREG":
                    registers = registers or ("fewer" if "DEALLOC" in instruction.opcode else "more")
        outermost = min(blocks[head_of][0].address for head_of, other in bodies.items() if head in other)
        loop = Loop(always[0].address, always[-1].address, depth, always, behind, registers)
        found.append((outermost, -depth, loop.first, loop))
    return [loop for *_, loop in sorted(found, key=lambda entry: entry[:3])]


def _rates(arch: str) -> Rates:
    """Return the rates of an architecture, or of the nearest before it that is known."""
    number = int(re.sub(r"\D", "", arch))
    known = [int(name) for name in RATES if int(name) <= number]
    return RATES[str(max(known, default=80))]


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
        self._rates, self._warps = _rates(arch), warps
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
        if base in _PRODUCTS:
            self._add_product(instruction)
            return "tensor"
        if base.startswith("UTC") and base.endswith("MMA"):
            self._add_tcgen05(instruction, shape)
            return "tensor"
        column = _column_of(base)
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
            self._take(column, 32 * _bytes_of(instruction) / (_SHARED_BYTES / 4))
        return column

    def _add_product(self, instruction: Instruction) -> None:
        opcode, rates = instruction.opcode, self._rates
        if match := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = map(int, match.groups())
            work = m * n * k
        elif (match := re.search(r"MMA\.(\d+)", opcode)) and match[1] in _SHAPES:
            work = _SHAPES[match[1]]
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
            interval = read * (1 if opcode[0] in "IQ" else 2) / _SHARED_BYTES
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
        blocks, successors, roots = _blocks(kernel.code)
        rank = _dominators(successors, roots)[1]
        code = [
            instruction for block, found in enumerate(blocks) if rank[block] >= 0 for instruction in found
        ]
        running = warps or max(1, launch.threads // 32)
        all_of_it = Loop(code[0].address, code[-1].address, 0, code, [], "")
        rows.append((all_of_it, running, Account(code, kernel.arch, -(-running // 4), kernel.code), None))
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
