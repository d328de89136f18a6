"""Builds the compiled modules mmfast._cpu and mmfast._cuda with ninja; the rest is in pyproject.toml.

Sources are found by glob. Environment variables:
    MMFAST_CPU=0        leave the C++ module out; everything runs through plain torch
    MMFAST_CUDA=auto    build the CUDA module where nvcc is found (default); 1: fail without nvcc; 0: never
    MMFAST_CUDA_ARCHS=80,90,100,120     compute capabilities to build for (default: these that nvcc knows)
    MMFAST_CUDART=static    link the CUDA runtime in (default); shared: use the libcudart that torch loads
    MMFAST_SANITIZE=address,undefined    instrument the C++ module with these sanitizers (tools/sanitize)
    MMFAST_SPILLS=error fail if a CUDA kernel does not fit its registers; otherwise it is only said
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME    as usual

The modules use Python's stable interface and know nothing of torch: a wheel serves every CPython from 3.11
on, and every torch. `tools/wheels` builds one that old systems take, too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h"))

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Icsrc"]
# GCC 12 takes the deliberately undefined registers of its own intrinsics for a mistake.
CPU_FLAGS = ["-fopenmp", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized"]
GCC_FLAGS = ["-Wno-maybe-uninitialized"]
# Lowest first: see the order of objects in Build.build_cpu. No MMX, into whose registers GCC 12 spills: they
# are those of long double, which would be NaN from then on.
X86_LEVELS = {
    "baseline": ["-march=x86-64", "-mtune=generic", "-mno-mmx"],
    "avx2": ["-march=x86-64", "-mtune=haswell", "-mno-mmx", "-mpopcnt", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *["-march=x86-64", "-mtune=skylake-avx512", "-mno-mmx", "-mpopcnt", "-mavx2", "-mfma", "-mf16c"],
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    ],
}
# Machine code for each, PTX for the last one the compiler knows.
CUDA_ARCHITECTURES = (80, 90, 100, 120)
# A file <op>_sm<arch>.cu is built for its architecture alone, such as 90a, the one that has wgmma.
ONE_ARCHITECTURE = re.compile(r"_sm(\d+[a-z]?)$")
# One build for every CPython from 3.11 on. Python without its lock has no stable interface yet.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
# How the CUDA runtime can be linked.
CUDA_RUNTIMES = ("static", "shared")
# Programs that may stand before the compiler in $CXX.
LAUNCHERS = ("ccache", "distcc", "icecc", "sccache")


class BuildError(Exception):
    """A build that cannot go on; its text is the one sentence the user reads."""


def joined(words: list[str]) -> str:
    """Return words as a shell takes them, with no "$" that ninja would read."""
    return shlex.join(words).replace("$", "$$")


def say(text: str) -> None:
    """Print one line that survives pip's capture of the build's output where -v is given."""
    print(f"mmfast: {text}", file=sys.stderr, flush=True)


def switch(name: str, default: str, choices: tuple[str, ...]) -> str:
    """Return the environment variable `name`, checked."""
    value = os.environ.get(name, default).lower()
    if value not in choices:
        raise BuildError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def cuda_architectures(nvcc: str) -> list[int]:
    """Return the compute capabilities to build for: those of $MMFAST_CUDA_ARCHS, or all that `nvcc` knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [int(arch) for arch in re.findall(r"^compute_(\d+)$", listed, flags=re.MULTILINE)]
    named = re.split(r"[,;\s]+", os.environ.get("MMFAST_CUDA_ARCHS", "").strip())
    if named == [""]:
        return [arch for arch in CUDA_ARCHITECTURES if arch in known]
    # "9.0" is what torch's own variable of this kind holds.
    wanted = [name.replace(".", "") for name in named]
    wrong = [name for name, arch in zip(named, wanted) if not arch.isdecimal() or int(arch) not in known]
    if wrong:
        raise BuildError(
            f"MMFAST_CUDA_ARCHS must hold compute capabilities that {nvcc} builds for, "
            f"of {', '.join(map(str, known))}, got {', '.join(map(repr, wrong))}"
        )
    archs = sorted(set(map(int, wanted)))
    if archs[0] < CUDA_ARCHITECTURES[0]:
        least = CUDA_ARCHITECTURES[0]
        raise BuildError(
            f"MMFAST_CUDA_ARCHS: the kernels need compute capability {least} or more, got {archs[0]}"
        )
    return archs


def sanitizer_flags() -> list[str]:
    """Return the compiler's and linker's flags for $MMFAST_SANITIZE, such as address,undefined."""
    names = os.environ.get("MMFAST_SANITIZE", "")
    if not names:
        return []
    # Optimised, instrumented kernels take four times as long to compile, and the tests hardly less to run.
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O0", "-w"]


def revision() -> str:
    """Return the commit of this checkout, "+" after it where files differ from it; "" where there is none."""
    git = ["git", "-C", str(ROOT)]
    # Of a copy of the sources within another project's checkout the commit would be that project's.
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    return found.stdout.strip() + "+" * (changed != 0) if found.returncode == 0 else ""


def find_cxx() -> str | None:
    """Return the C++ compiler: $CXX, or the first usual name on the path."""
    named = os.environ.get("CXX", "").strip()
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def version_of(compiler: str) -> str:
    """Return what a compiler, with flags or not, says of its version."""
    return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout


def host_compiler(cxx: str) -> list[str]:
    """Return nvcc's options for host code: -ccbin takes a program, without launcher and without flags."""
    words = shlex.split(cxx)
    if Path(words[0]).name in LAUNCHERS and len(words) > 1:
        words = words[1:]
    return ["-ccbin", words[0], *(f"-Xcompiler={word}" for word in words[1:])]


def find_nvcc() -> str | None:
    """Return nvcc: of $CUDA_HOME, on the path, or where NVIDIA's installer puts it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def wanted_modules() -> list[str]:
    """Return the modules to build on this machine, after saying in one line why one is left out."""
    cpu = switch("MMFAST_CPU", "1", ("0", "1"))
    cuda = switch("MMFAST_CUDA", "auto", ("auto", "0", "1"))
    if not sys.platform.startswith("linux"):
        say(f"no compiled modules on {sys.platform}: the ops run through plain torch")
        return []
    if (cpu == "1" or cuda == "1") and find_cxx() is None:
        raise BuildError(
            "no C++ compiler found: install g++ or set CXX, "
            "or set MMFAST_CPU=0 to install mmfast without its C++ kernels"
        )
    names = ["mmfast._cpu"] if cpu == "1" else []
    if cpu == "0":
        say("MMFAST_CPU=0: the C++ kernels are left out")
    nvcc = find_nvcc()
    if cuda == "1" and nvcc is None:
        raise BuildError("MMFAST_CUDA=1 but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    if cuda != "0" and nvcc is not None and find_cxx() is not None:
        # Wrong options stop an install that only would have tried, too.
        cuda_architectures(nvcc)
        switch("MMFAST_CUDART", "static", CUDA_RUNTIMES)
        names.append("mmfast._cuda")
        say(f"MMFAST_CUDA={cuda}: building the CUDA kernels with {nvcc}")
    else:
        say(
            f"MMFAST_CUDA={cuda}: the CUDA kernels are left out"
            + ("" if cuda == "0" else ", nvcc was not found")
        )
    return names


class Build:
    """Writes one ninja file for all modules and runs it."""

    def __init__(self, folder: Path, name: str):
        from ninja import ninja_syntax

        # A folder's name may hold spaces.
        self.escape = ninja_syntax.escape_path

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.cxx = find_cxx()
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
        self.module_flags = ["-Wall", "-Wextra", *(f"-I{path}" for path in dict.fromkeys(includes))]
        if STABLE_ABI:
            self.module_flags.append("-DPy_LIMITED_API=0x030B0000")
        self.module_flags.append(f'-DMMFAST_REVISION="{revision()}"')
        self.ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        self.cxxflags = [*COMMON_FLAGS, *sanitizer_flags(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        # Objects of one build serve the next, with other modules, but not with another compiler at this path.
        self.cxx_version = self.note_version(self.cxx, "cxx")
        self.file = (self.folder / f"{name}.ninja").open("w")
        self.shared: str | None = None
        self.logs: list[Path] = []  # of ptxas, for this build's objects
        self.ninja = ninja_syntax.Writer(self.file, width=110)
        # The log of what is built lies beside what is built, not in the checkout.
        self.ninja.variable("builddir", str(self.folder))
        self.ninja.rule(
            "cxx",
            f"{self.cxx} -MMD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="c++ $in $level",
        )
        self.ninja.rule("link", f"{self.cxx} -shared $in -o $out $flags", description="link $out")

    def note_version(self, compiler: str, name: str) -> str:
        """Return a file that holds the compiler's version, for ninja to see that it is another."""
        path, said = self.folder / f"{name}.version", version_of(compiler)
        if not path.exists() or path.read_text() != said:
            path.write_text(said)
        return str(path)

    def compile(self, source: Path, flags: list[str], level: str = "") -> str:
        """Add one C++ object and return its path."""
        stem = "_".join(
            [*source.relative_to(ROOT / "csrc").with_suffix("").parts, *([level] if level else [])]
        )
        out = str(self.folder / f"{stem}.o")
        variables = {"flags": joined(flags), "level": level}
        name = str(source.relative_to(ROOT))
        self.ninja.build(out, "cxx", name, implicit=[self.cxx_version], variables=variables)
        return out

    def compile_shared(self) -> str:
        """Add what is linked into every module, once, and return its object's path."""
        if self.shared is None:
            self.shared = self.compile(ROOT / "csrc/libstdcxx.cpp", [*self.cxxflags, "-Wall", "-Wextra"])
        return self.shared

    def build_cpu(self, target: str) -> None:
        """Add mmfast._cpu: every op once per instruction set, the module itself for the baseline."""
        levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        module = ROOT / "csrc/cpu/module.cpp"
        # clang warns of flags that GCC alone knows.
        own = [] if "clang" in version_of(self.cxx) else GCC_FLAGS
        objects = [self.compile(module, [*self.cxxflags, *self.module_flags]), self.compile_shared()]
        # A linker keeps the first copy it meets of an inline function that several objects carry, one from
        # the standard library say. The baseline's comes first, so none with newer instructions is shared.
        for number, (level, flags) in enumerate(levels.items()):
            flags = [*self.cxxflags, *CPU_FLAGS, *own, *flags, f"-DMMFAST_ISA={number}"]
            objects += [self.compile(source, flags, level) for source in sources if source != module]
        # libgomp by its plain soname: torch, imported before, has loaded one and its symbols come first.
        flags = joined(["-fopenmp", "-Wl,--as-needed", *self.ldflags, *sanitizer_flags()])
        self.ninja.build(target, "link", objects, variables={"flags": flags})
        self.ninja.default(self.escape(target))

    def build_cuda(self, target: str) -> None:
        """Add mmfast._cuda: machine code for every architecture nvcc knows, the CUDA runtime linked in."""
        nvcc, host = find_nvcc(), host_compiler(self.cxx)
        cudart = switch("MMFAST_CUDART", "static", CUDA_RUNTIMES)
        known = cuda_architectures(nvcc)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
        codes.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", *host]
        # An op's record is read by the linker's section alone.
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-diag-suppress", "177"]
        linked = [f"-Xcompiler={word.replace(',', chr(92) + ',')}" for word in self.ldflags]
        # Each object's registers and spills, as ptxas states them, lie beside it: $out.ptxas.log.
        self.ninja.rule(
            "nvcc",
            f"{nvcc} $flags -c $in -o $out > $out.ptxas.log 2>&1 || (cat $out.ptxas.log; exit 1)",
            description="nvcc $in",
        )
        self.ninja.rule(
            "nvlink",
            f"{nvcc} -shared -cudart {cudart} {joined(host)} $codes $in {joined(linked)} -o $out",
            description="link $out",
        )
        module = ROOT / "csrc/cuda/module.cpp"
        built_for = " ".join(map(str, known)) + f", PTX {known[-1]}"
        release = re.search(r"release ([\d.]+)", version_of(shlex.quote(nvcc)))
        defines = [f'-DMMFAST_CUDA_ARCHITECTURES="{built_for}"']
        defines.append(f'-DMMFAST_NVCC="{release[1] if release else "of an unknown release"}"')
        objects = [
            self.compile(module, [*self.cxxflags, *self.module_flags, *defines]),
            self.compile_shared(),
        ]
        headers = [header for header in HEADERS if not header.startswith("csrc/cpu/")]
        needed = [*headers, self.note_version(shlex.quote(nvcc), "nvcc"), self.cxx_version]
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            out = str(self.folder / f"cuda_{source.stem}.o")
            one = ONE_ARCHITECTURE.search(source.stem)
            targets = [f"-gencode=arch=compute_{one[1]},code=sm_{one[1]}"] if one else codes
            self.ninja.build(
                out,
                "nvcc",
                str(source.relative_to(ROOT)),
                implicit=needed,
                variables={"flags": joined([*flags, *targets])},
            )
            objects.append(out)
            self.logs.append(Path(f"{out}.ptxas.log"))
        self.ninja.build(target, "nvlink", objects, variables={"codes": joined(codes)})
        self.ninja.default(self.escape(target))

    def run(self) -> None:
        """Run ninja on all that was added."""
        import ninja

        self.file.close()
        program = Path(ninja.BIN_DIR) / "ninja"
        command = [str(program) if program.exists() else "ninja", "-f", self.file.name]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise BuildError("the compiled modules did not build: the compiler's message is above")

    def report_spills(self) -> None:
        """Name every CUDA kernel whose registers did not suffice, or fail if MMFAST_SPILLS=error."""
        spills = []
        for log in self.logs:
            entries = re.split(r"Compiling entry function ", log.read_text())[1:]
            for entry in entries:
                stores = re.search(r"(\d+) bytes spill stores", entry)
                if stores and int(stores[1]) > 0:
                    spills.append(" for ".join(re.findall(r"'(\S+)'", entry)[:2]) + f": {stores[1]} bytes")
        if spills:
            text = f"{len(spills)} CUDA kernels spill registers: {'; '.join(spills)}"
            if os.environ.get("MMFAST_SPILLS") == "error":
                raise BuildError(text)
            say(text)


class CleanBuildPy(build_py):
    """setuptools' build_py, which would put what an earlier build left in its folder into the wheel."""

    def run(self) -> None:
        left = Path(self.build_lib) / "mmfast"
        if left.resolve() != ROOT / "mmfast":
            shutil.rmtree(left, ignore_errors=True)
        super().run()


class NinjaBuildExt(build_ext):
    """setuptools' build_ext with the work handed to ninja."""

    def run(self) -> None:
        # Not before: metadata and source distributions are made on machines without a compiler, too.
        self.keep(wanted_modules())
        super().run()

    def copy_extensions_to_source(self) -> None:
        self.drop_others(ROOT / "mmfast")
        super().copy_extensions_to_source()

    def drop_others(self, folder: Path) -> None:
        """Remove modules of other builds: those for one Python are found before those for all."""
        wanted = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for pattern in ("_cpu.*", "_cuda.*"):
            for path in folder.glob(pattern):
                if path.suffix in (".so", ".pyd") and path.name not in wanted:
                    path.unlink()

    def keep(self, names: list[str]) -> None:
        kept = [extension for extension in self.extensions if extension.name in names]
        # What makes the wheel asks the distribution.
        self.extensions = self.distribution.ext_modules = kept

    def build_extensions(self) -> None:
        self.drop_others(Path(self.build_lib) / "mmfast")
        names = [extension.name for extension in self.extensions]
        if "mmfast._cuda" in names and os.environ.get("MMFAST_CUDA", "auto").lower() == "auto":
            names.remove("mmfast._cuda")
            # A toolkit that does not fit this compiler must not stop an install that never asked for it.
            try:
                build = self.build_modules(["mmfast._cuda"], "cuda")
            except (BuildError, subprocess.CalledProcessError):
                say("MMFAST_CUDA=auto: the CUDA kernels did not build and are left out")
                self.keep(names)
            else:
                build.report_spills()
        if names:
            self.build_modules(names, "all" if "mmfast._cuda" in names else "cpu").report_spills()

    def build_modules(self, names: list[str], part: str) -> Build:
        build = Build(Path(self.build_temp), part)
        for name in names:
            target = Path(self.get_ext_fullpath(name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            (build.build_cpu if name == "mmfast._cpu" else build.build_cuda)(str(target))
        build.run()
        return build


class TaggedWheel(bdist_wheel):
    """setuptools' bdist_wheel, whose tag tells what was built: without a module it is for all systems."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


try:
    # All there may be; the command leaves out what this machine cannot build.
    names = ("mmfast._cpu", "mmfast._cuda")
    modules = [Extension(name, sources=[], py_limited_api=STABLE_ABI) for name in names]
    options = {"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {}
    commands = {"bdist_wheel": TaggedWheel, "build_ext": NinjaBuildExt, "build_py": CleanBuildPy}
    setup(ext_modules=modules, cmdclass=commands, options=options)
except BuildError as error:
    sys.exit(f"mmfast: {error}")
