"""Which pipe of a GPU takes an instruction, and how many a cycle, by architecture, for tools/loops.py.

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
from typing import NamedTuple

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
SHARED_BYTES = 128  # a cycle and SM

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


def column_of(opcode: str) -> str:
    """Return the column of an opcode, without what follows by points."""
    return _COLUMN_OF.get(opcode, "uniform" if opcode.startswith("U") else "other")


PRODUCTS = {"HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "QMMA", "OMMA"}
SHAPES = {
    "16816": 16 * 8 * 16,
    "1688": 16 * 8 * 8,
    "1684": 16 * 8 * 4,
    "884": 8 * 8 * 4,
    "16832": 16 * 8 * 32,
}


def rates_of(arch: str) -> Rates:
    """Return the rates of an architecture, or of the nearest before it that is known."""
    number = int(re.sub(r"\D", "", arch))
    known = [int(name) for name in RATES if int(name) <= number]
    return RATES[str(max(known, default=80))]
