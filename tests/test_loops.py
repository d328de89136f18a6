"""tools/loops.py and the files it uses: loops are found in code, and their instructions counted by pipe."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from support.stems import ROOT


@pytest.fixture(scope="module")
def tool() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        modules = [importlib.import_module(name) for name in ("gpu_rates", "machine_code", "loops")]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def listing(*code: str, arch: str = "90a", name: str = "a_kernel") -> list[str]:
    """Return a listing as cuobjdump prints it; line i of the code is at address 16 i."""
    lines = [f"\tcode for sm_{arch}", f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for index, text in enumerate(code):
        lines += [f"        /*{16 * index:04x}*/      {text} ;     /* 0x00 */", " " * 40 + "/* 0x00 */"]
    return lines


def kernel(tool, *code: str, arch: str = "90a"):
    (found,) = tool.kernels(listing(*code, arch=arch))
    return found


def account(tool, *code: str, arch: str = "90a", warps: int = 1):
    found = kernel(tool, *code, arch=arch)
    return tool.Account(found.code, arch, warps, found.code)


def opcodes(code) -> list[str]:
    return [instruction.opcode for instruction in code]


def test_listings_of_several_kernels_are_read(tool):
    lines = [
        *listing("EXIT", arch="80", name="first"),
        *listing("@!P0 FADD R1, R2, 0x3", "EXIT", name="second"),
    ]
    first, second = tool.kernels(lines)
    assert (first.name, first.arch, opcodes(first.code)) == ("first", "80", ["EXIT"])
    assert (second.name, second.arch) == ("second", "90a")
    assert second.code[0] == (0, "!P0", "FADD", "R1, R2, 0x3")


def test_code_without_a_way_back_has_no_loops(tool):
    assert tool.loops(kernel(tool, "@P0 BRA 0x20", "FADD R1, R1, R1", "EXIT", "BRA 0x30").code) == []


def test_inner_loops_come_first_and_are_not_counted_in_the_outer(tool):
    found = tool.loops(
        kernel(
            tool,
            "MOV R1, RZ",
            "LDG.E R2, [R4]",  # 10: the outer loop
            "FFMA R1, R2, R2, R1",  # 20: the inner loop
            "@P0 BRA 0x20",
            "STG.E [R4], R1",
            "@P1 BRA 0x10",
            "EXIT",
        ).code
    )
    assert [(loop.first, loop.last, loop.depth) for loop in found] == [(0x20, 0x30, 2), (0x10, 0x50, 1)]
    assert opcodes(found[0].always) == ["FFMA", "BRA"]
    assert opcodes(found[1].always) == ["LDG.E", "STG.E", "BRA"]
    assert all(loop.behind == [] for loop in found)


def test_what_a_branch_may_leave_out_is_counted_apart(tool):
    (loop,) = tool.loops(
        kernel(
            tool,
            "FADD R1, R1, R1",
            "@P0 BRA 0x40",  # over the masks
            "FSETP.GEU.AND P1, PT, R1, R2, PT",
            "FSEL R1, R1, R2, P1",
            "@P2 MUFU.EX2 R3, R1",  # predicated, and issued all the same
            "BRA.U UP0, 0x0",
            "EXIT",
        ).code
    )
    assert opcodes(loop.always) == ["FADD", "BRA", "MUFU.EX2", "BRA.U"]
    assert opcodes(loop.behind) == ["FSETP.GEU.AND", "FSEL"]


def test_both_sides_of_a_branch_are_behind_it(tool):
    (loop,) = tool.loops(
        kernel(
            tool,
            "NOP",
            "@P0 BRA 0x40",
            "FADD R1, R1, R1",
            "BRA 0x50",
            "FMUL R1, R1, R1",
            "@P1 BRA 0x0",
            "EXIT",
        ).code
    )
    assert opcodes(loop.always) == ["NOP", "BRA", "BRA"]
    assert opcodes(loop.behind) == ["FADD", "BRA", "FMUL"]


def test_a_jump_out_of_the_loop_does_not_end_an_iteration(tool):
    (loop,) = tool.loops(
        kernel(tool, "FADD R1, R1, R1", "@P0 BRA 0x40", "FMUL R1, R1, R1", "BRA 0x0", "EXIT").code
    )
    assert opcodes(loop.always) == ["FADD", "BRA", "FMUL", "BRA"]


def test_what_only_diverged_warps_run_is_left_out(tool):
    (loop,) = tool.loops(
        kernel(
            tool,
            "FADD R1, R1, R1",
            "BRA.DIV UR4, 0x60",
            "SHFL.BFLY PT, R2, R1, 0x1, 0x1f",
            "FADD R1, R1, R2",
            "@P0 BRA 0x0",
            "EXIT",
            "WARPSYNC.COLLECTIVE R3, 0x80",
            "SHFL.BFLY PT, R2, R1, 0x1, 0x1f",
            "BRA 0x30",
        ).code
    )
    assert opcodes(loop.always) == ["FADD", "BRA.DIV", "SHFL.BFLY", "FADD", "BRA"]
    assert loop.behind == []


def test_what_runs_for_every_value_of_the_lanes_is_no_loop(tool):
    code = ("R2UR UR4, R2", "UBLKCP.S.G [UR4], [UR6], UR8", "@P0 BRA.U.ANY 0x0", "EXIT")
    assert tool.loops(kernel(tool, *code).code) == []


def test_functions_that_are_called_are_searched_too(tool):
    code = ("CALL.REL.NOINC 0x20", "EXIT", "FADD R1, R1, R1", "@P0 BRA 0x20", "RET.REL.NODEC R2 0x0")
    (loop,) = tool.loops(kernel(tool, *code).code)
    assert (loop.first, loop.last) == (0x20, 0x30)


def test_jumps_by_a_table_reach_what_nothing_else_does(tool):
    code = ("BRX R2 -0x10", "EXIT", "FADD R1, R1, R1", "@P0 BRA 0x20", "EXIT")
    (loop,) = tool.loops(kernel(tool, *code).code)
    assert opcodes(loop.always) == ["FADD", "BRA"]


def test_warpgroups_run_what_follows_where_registers_change_hands(tool):
    found = tool.report(
        "a_kernel",
        kernel(
            tool,
            "@P0 BRA 0x50",
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
            "@P1 BRA 0x20",
            "EXIT",
            "USETMAXREG.DEALLOC.CTAPOOL 0x18",
            "VIADD R3, R3, 0x1",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
            "@!P0 BRA 0x70",
            "UBLKCP.S.G [UR4], [UR6], UR8",
            "@P1 BRA 0x60",
            "EXIT",
        ),
        tool.Launch(168, 384),
    )
    assert found.waiting == 1
    assert [warps for _, warps, _, _ in found.rows] == [8, 4]
    assert found.rows[0][2].cycles["tensor"] == 2 * 64


def test_rates_of_tensor_cores_are_those_of_the_published_peaks(tool):
    for arch, (_, peak, num_sms, gigahertz) in tool.DENSE_PEAKS.items():
        assert 2 * tool.RATES[arch].tensor * num_sms * gigahertz / 1000 == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("arch", "text", "pipe", "cycles"),
    [
        ("80", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor", 8),
        ("80", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "tensor", 8),
        ("120", "HMMA.16816.F32 R4, R8, R12, R4", "tensor", 32),
        ("90a", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", "tensor", 128),
        ("90a", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "memory", 32),
        ("90a", "HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24", "memory", 16),
        ("80", "FFMA R1, R2, R3, R1", "fma", 2),
        ("90", "FFMA R1, R2, R3, R1", "fma", 1),
        ("80", "IMAD R1, R2, R3, R1", "fma", 2),
        ("90", "IMAD R1, R2, R3, R1", "imad", 2),
        ("80", "HFMA2.BF16_V2 R1, R2, R3, R1", "half", 2),
        ("90", "MUFU.EX2 R1, R1", "special", 8),
        ("90", "I2F.S64 R1, R2", "special", 8),
        ("120", "F2F.F64.F32 R2, R1", "special", 64),
        ("90", "F2FP.BF16.F32.PACK_AB R1, R2, R3", "alu", 2),
        ("80", "DFMA R2, R4, R6, R2", "fp64", 4),
        ("90", "LDS R1, [R2]", "memory", 4),
        ("90", "LDSM.16.MT88.4 R4, [R2]", "memory", 16),
        ("90", "LDG.E.128.CONSTANT R4, [R2.64]", "memory", 16),
        ("90", "SHFL.BFLY PT, R2, R1, 0x1, 0x1f", "memory", 4),
        ("90", "ULDC.64 UR4, c[0x0][0x208]", "issue", 1),
    ],
)
def test_intervals(tool, arch, text, pipe, cycles):
    assert account(tool, text, arch=arch).cycles[pipe] == cycles
    assert account(tool, text, text, arch=arch, warps=3).cycles[pipe] == 6 * cycles


def test_an_architecture_that_is_not_known_has_the_rates_of_the_one_before(tool):
    assert account(tool, "FFMA R1, R2, R3, R1", arch="86").cycles["fma"] == 2
    assert account(tool, "FFMA R1, R2, R3, R1", arch="103a").cycles["fma"] == 1


def test_exponentials_bind_where_a_product_is_narrow(tool):
    exponentials = ["MUFU.EX2 R1, R1"] * 66
    scores, weighted = (
        "HGMMA.64x{}x16.F32.BF16 R24, gdesc[UR8], R24",
        "HGMMA.64x{}x16.F32.BF16 R24, R4, gdesc[UR8], R24",
    )
    wide = account(tool, *exponentials, *[scores.format(128)] * 8, *[weighted.format(128)] * 8, warps=2)
    assert (wide.cycles["special"], wide.cycles["tensor"], wide.binds) == (1056, 2048, "tensor")
    # Operands in shared memory are read while they are multiplied.
    assert wide.cycles["memory"] == 2 * 8 * (48 + 32)
    assert wide.allowed() == pytest.approx((1, 2048 / (2048 + 1056), 2048 / (2048 + 1056)))
    narrow = account(tool, *exponentials, *[scores.format(128)] * 4, *[weighted.format(64)] * 8, warps=2)
    assert (narrow.cycles["special"], narrow.cycles["tensor"], narrow.binds) == (1056, 1024, "special")
    assert narrow.allowed()[:2] == pytest.approx((1024 / 1056, 1024 / (1024 + 1056)))


def test_products_of_a_single_warp_do_not_reach_hoppers_rate(tool):
    found = account(tool, *["HMMA.16816.F32 R4, R8, R12, R4"] * 100, arch="90")
    assert found.allowed()[0] == pytest.approx(0.63)


def test_products_of_tensor_memory_take_their_size_from_a_descriptor(tool):
    code = ("UMOV UR57, 0x8100490", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR56], idesc[UR57], UPT")
    found = account(tool, *code, arch="100a", warps=2)
    assert (found.cycles["tensor"], found.is_known) == (128 * 64 * 16 / 4096, True)
    assert not account(tool, code[1], arch="100a").is_known


def test_half_the_pipe_of_float32_takes_integer_products(tool):
    found = account(tool, *["IMAD R1, R2, R3, R1"] * 10, *["FFMA R1, R2, R3, R1"] * 30, arch="90")
    assert (found.cycles["imad"], found.cycles["fma"]) == (20, 40)


def test_tables_fit_a_screen(tool):
    found = tool.report(
        "a_kernel_with_a_name<" + ", ".join(["a_long_type_of_an_argument"] * 8) + ">",
        kernel(
            tool,
            *["HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", "MUFU.EX2 R1, R1"] * 400,
            "@P1 BRA 0x3220",
            "FSEL R1, R1, R2, P1",
            "@P0 BRA 0x0",
            "EXIT",
        ),
        tool.Launch(255, 1024),
    )
    text = tool.table(found)
    assert max(map(len, text.splitlines())) <= 110
    assert "behind branch" in text
    (loop,) = tool.as_json(found)["loops"]
    assert (loop["warps"], loop["always"]["cycles"]["special"]) == (32, 400 * 8 * 8)


def test_of_a_kernel_without_loops_all_that_can_run_counts(tool):
    code = kernel(tool, "FADD R1, R1, R1", "@P0 EXIT", "MUFU.EX2 R1, R1", "EXIT", "BRA 0x40")
    found = tool.report("a_kernel", code, tool.Launch(8, 0))
    ((loop, warps, always, behind),) = found.rows
    assert (loop.depth, warps, behind) == (0, 1, None)
    assert (always.instructions["issue"], always.cycles["special"]) == (4, 8)
    assert "no loops" in tool.table(found)


SOURCE = """
extern "C" __global__ void __launch_bounds__(96) plain(float* x, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x[i]));
    sum += y;
  }
  x[threadIdx.x] = sum;
}
"""


def test_a_kernel_of_nvcc(tool, tmp_path):
    triton = pytest.importorskip("triton", reason="its cuobjdump reads the machine code")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    (tmp_path / "plain.cu").write_text(SOURCE)
    cubin = tmp_path / "plain.sm_90.cubin"
    subprocess.run([nvcc, "-arch=sm_90", "-cubin", "-o", str(cubin), str(tmp_path / "plain.cu")], check=True)
    assert tool.threads_of(tmp_path) == {("plain", "90"): 96}
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = tool.kernels(text.splitlines())
    assert (found.name, found.arch) == ("plain", "90")
    (loop,) = tool.loops(found.code)
    taken = tool.Account(loop.always, found.arch, 1, found.code).instructions
    assert (taken["special"], taken["global"], taken["fma"]) == (1, 1, 1)
