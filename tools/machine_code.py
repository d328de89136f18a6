"""Kernels in a listing of machine code, and the natural loops of a kernel, in which tools/loops.py counts.

`kernels` reads what cuobjdump --dump-sass prints; `loops` divides a kernel into blocks, finds the jumps back
to a block that dominates them, and what of a loop runs in every iteration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpu_rates import column_of


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
        columns = {column_of(opcode) for opcode in opcodes}
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


def all_code(code: list[Instruction]) -> Loop:
    """Return what can be reached of a kernel without loops."""
    blocks, successors, roots = _blocks(code)
    rank = _dominators(successors, roots)[1]
    reached = [instruction for block, found in enumerate(blocks) if rank[block] >= 0 for instruction in found]
    return Loop(reached[0].address, reached[-1].address, 0, reached, [], "")
