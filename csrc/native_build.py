"""Compiles csrc/ into wireframe._C and wireframe._C_cuda with ninja: the ``build_ext`` command of setup.py.

Objects stay in build/native-<tag>/ of the checkout, so that later builds, pip's isolated ones too, compile only what
changed. A module that cannot be built is left out, and a note installed with the package says why.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INFO = runpy.run_path(str(ROOT / "kernels" / "build_info.py"))
NAMES = tuple(INFO["SOURCES"])

# No contraction into multiply-adds on either side: the CPU, CUDA and NumPy give the same bits.
WARNINGS = "-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion"
CPU_FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -pthread {WARNINGS}"
SANITIZE_FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
CUDA_FLAGS = (
    "-std=c++17 -O3 -fmad=false -lineinfo -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"
)
ARCHITECTURES = "80;86;89;90"
OLDEST_NVCC = 12
PRECOMPILED = "pybind.h"

# The log of each object lies beside it: ptxas's report must outlive the builds that do not compile it again.
NINJA = """\
builddir = {folder}

rule compile
  command = {compiler} -MMD -MT $out -MF $out.d {flags} $extra -c $in -o $out{log}
  depfile = $out.d
  deps = gcc
  description = $in

rule header
  command = {compiler} -MMD -MT $out -MF $out.d {flags} -x c++-header $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in

rule link
  command = {linker} {link_flags} $in -o $out
  description = $out

{objects}
build {module}: link {inputs} | {exports}
default {module}
"""


class NotBuilt(Exception):
    """Why a module was not built, in one line; ``log`` is the file with the rest, where there is one."""

    def __init__(self, reason: str, log: Path | None = None) -> None:
        super().__init__(reason)
        self.log = log


@dataclass(frozen=True)
class Settings:
    """The environment variables of a build."""

    cuda: bool | None  # None: where nvcc is
    sanitize: bool
    architectures: tuple[str, ...]

    @classmethod
    def from_environment(cls) -> Settings:
        def flag(name: str) -> bool | None:
            text = os.environ.get(name, "")
            if text not in ("", "0", "1"):
                raise SetupError(f"{name} must be 0 or 1, got {text!r}")
            return text == "1" if text else None

        text = os.environ.get("WIREFRAME_CUDA_ARCHS") or ARCHITECTURES
        architectures = tuple(text.split(";"))
        if not all(re.fullmatch(r"\d{2,3}[af]?", one) for one in architectures):
            raise SetupError(f"WIREFRAME_CUDA_ARCHS must look like 89;90, got {text!r}")
        return cls(flag("WIREFRAME_CUDA"), bool(flag("WIREFRAME_SANITIZE")), architectures)

    def demands(self, name: str) -> tuple[str, bool]:
        """The variable that makes it an error when module ``name`` is not built, and whether it does."""
        return ("WIREFRAME_SANITIZE", self.sanitize) if name == "_C" else ("WIREFRAME_CUDA", self.cuda is True)


class BuildNative(build_ext):
    """Builds both modules into ``build_lib`` or, in place and for editable installs, beside the package's sources."""

    def run(self) -> None:
        settings = Settings.from_environment()
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        notes, failed = {}, []
        with self._objects(settings) as folder:
            for name in NAMES:
                module = target / _file_name(name)
                try:
                    built, notes[name] = _build(name, settings, folder / name, self.parallel)
                    _replace(built, module)
                    print(f"wireframe.{name}: built with {notes[name]['compiler']}")
                except NotBuilt as problem:
                    # What an earlier build left would be taken for this one's.
                    module.unlink(missing_ok=True)
                    notes[name] = {"built": False, "reason": str(problem), "log": str(problem.log or "")}
                    print(f"wireframe.{name}: not built: {problem}")
                    wanted, demanded = settings.demands(name)
                    if demanded:
                        failed.append(f"{wanted}=1, and wireframe.{name} is not built: {problem}")
        _write(target / INFO["note_name"](), json.dumps(notes, indent=1) + "\n")
        if failed:
            raise CompileError(failed[0])

    def get_outputs(self) -> list[str]:
        """The files that are there: a module that was not built is none."""
        return [str(Path(self.build_lib, "wireframe", name)) for name in self._built_files()]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: where each file would be in the wheel, and where it is."""
        if not self.inplace:
            return {}
        return {
            str(Path(self.build_lib, "wireframe", name)): str(self._target() / name) for name in self._built_files()
        }

    def _built_files(self) -> list[str]:
        names = [*(_file_name(name) for name in NAMES), INFO["note_name"]()]
        return [name for name in names if (self._target() / name).exists()]

    def _target(self) -> Path:
        return Path(self.get_ext_fullpath("wireframe._C")).parent

    @contextlib.contextmanager
    def _objects(self, settings: Settings):
        """The folder of the objects, locked against other builds in the same checkout."""
        name = f"native-{INFO['tag']()}"
        folder = ROOT / "build" / "sanitize" / name if settings.sanitize else ROOT / "build" / name
        try:
            lock = _open_lock(folder)
        except OSError:
            folder = Path(self.build_temp).resolve() / name
            lock = _open_lock(folder)
        with lock:
            if os.name == "posix":
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def _open_lock(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / "lock", "w")


def _file_name(name: str) -> str:
    return name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def _replace(source: Path, target: Path) -> None:
    """Copies by renaming: a process that has the old module loaded keeps it."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    os.close(handle)
    shutil.copyfile(source, name)
    os.chmod(name, 0o755)
    os.replace(name, target)


def _write(path: Path, text: str) -> None:
    """Writes the file unless it holds the text already: its time decides what ninja compiles."""
    if not path.exists() or path.read_bytes() != text.encode():
        path.write_text(text)


def _build(name: str, settings: Settings, folder: Path, parallel: int | None) -> tuple[Path, dict]:
    """Compiles one module; its file and what its note says."""
    # The exports are a version script, which other systems' linkers do not take.
    if sys.platform != "linux":
        raise NotBuilt(f"only Linux is built for so far, this is {sys.platform}")
    if name == "_C_cuda" and (settings.cuda is False or settings.sanitize):
        raise NotBuilt("switched off by WIREFRAME_" + ("CUDA=0" if settings.cuda is False else "SANITIZE=1"))
    sources = INFO["files"](CSRC, INFO["SOURCES"][name])
    if not sources:
        raise NotBuilt("csrc/ holds no sources for it")
    nvcc, nvcc_version = _nvcc(settings) if name == "_C_cuda" else ("", "")
    cxx, cxx_version = _compiler()
    ninja, pybind11 = _tools()
    folder.mkdir(parents=True, exist_ok=True)
    includes = f"-I{_shell(CSRC)} -isystem {_shell(_headers(pybind11, folder.parent))} "
    includes += f"-isystem {_shell(sysconfig.get_path('include'))}"
    if nvcc:
        version = f"{nvcc_version}, {cxx_version}, sm_{' '.join(settings.architectures)} and PTX"
        rules = _cuda_rules(nvcc, cxx, includes, folder, settings.architectures)
    else:
        version = cxx_version + (", sanitized" if settings.sanitize else "")
        rules = _cpu_rules(cxx, includes, folder, settings.sanitize)
        # Most of a compilation is pybind11's headers; g++ takes them compiled.
        _write(folder / PRECOMPILED, "#include <pybind11/pybind11.h>\n")
    digest = INFO["digest"](CSRC, name)
    _write(folder / "exports.map", f"{{ global: PyInit_{name}; local: *; }};\n")
    # A header and no -D: nvcc splits the values of options at commas.
    definitions = _definitions(sources=digest, compiler=version, sanitized=int(settings.sanitize))
    _write(folder / "build_info.h", definitions)
    module = folder / _file_name(name)
    precompiled = folder / PRECOMPILED if cxx_version.startswith("g++") and not nvcc else None
    _write(folder / "build.ninja", _ninja_file(sources, folder, module, rules, precompiled))
    _run_ninja(ninja, folder, parallel, nvcc_version or cxx_version)
    # A sanitised module loads under LD_PRELOAD alone.
    if not settings.sanitize:
        _check_that_it_loads(name, module)
    return module, {"built": True, "compiler": version, "sources": digest}


def _definitions(**values: str | int) -> str:
    return "".join(f"#define WIREFRAME_{key.upper()} {json.dumps(value)}\n" for key, value in values.items())


def _cpu_rules(cxx: str, includes: str, folder: Path, sanitize: bool) -> dict[str, str]:
    flags = f"{CPU_FLAGS} {SANITIZE_FLAGS}" if sanitize else CPU_FLAGS
    link = f"-shared -pthread -Wl,--version-script={_shell(folder / 'exports.map')}"
    return {
        "compiler": cxx, "flags": f"{flags} {includes}", "log": "",
        "linker": cxx, "link_flags": f"{link} {SANITIZE_FLAGS}" if sanitize else link,
    }  # fmt: skip


def _cuda_rules(nvcc: str, cxx: str, includes: str, folder: Path, architectures: tuple[str, ...]) -> dict[str, str]:
    codes = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    host = " ".join(codes)
    # A compiler behind ccache is two words, which -ccbin does not take.
    if len(shlex.split(cxx)) == 1:
        host += f" -ccbin {cxx}"
    exports = f"-Xlinker --version-script={_shell(folder / 'exports.map')}"
    return {
        "compiler": nvcc, "flags": f"{host} {CUDA_FLAGS} {includes}",
        "log": " > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "linker": nvcc, "link_flags": f"-shared -cudart static {host} {exports}",
    }  # fmt: skip


def _ninja_file(
    sources: list[Path], folder: Path, module: Path, rules: dict[str, str], precompiled: Path | None
) -> str:
    objects, lines, needs = [], [], ""
    if precompiled is not None:
        needs = f" | {_path(precompiled)}.gch"
        lines.append(f"build {_path(precompiled)}.gch: header {_path(precompiled)}\n")
    for source in sources:
        objects.append(_path(folder / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: compile {_path(source)}{needs}\n")
        included = [precompiled] if precompiled is not None else []
        # The one file that says what it was built from: the others do not change with it.
        if source.stem == "module":
            included.append(folder / "build_info.h")
        lines.append(f"  extra = {' '.join(f'-include {_shell(header)}' for header in included)}\n")
    return NINJA.format(
        folder=_relative(folder), objects="".join(lines), inputs=" ".join(objects), module=_path(module),
        exports=_path(folder / "exports.map"), **rules,
    )  # fmt: skip


def _relative(path: str | Path) -> str:
    """Relative to the checkout, where ninja runs, for short messages; other paths as they are."""
    path = Path(path)
    text = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return text.replace("$", "$$")


def _shell(path: str | Path) -> str:
    """For a command of build.ninja."""
    return shlex.quote(_relative(path))


def _path(path: Path) -> str:
    """For a build line of build.ninja."""
    return _relative(path).replace(" ", "$ ").replace(":", "$:")


def _run_ninja(ninja: str, folder: Path, parallel: int | None, compiler: str) -> None:
    log = folder / "build.log"
    command = [ninja, "-f", str(folder / "build.ninja"), *([f"-j{parallel}"] if parallel else [])]
    environment = {**os.environ, "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "}
    with open(log, "w") as output:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text(errors="replace")
    if status:
        raise NotBuilt(f"{compiler} failed: {_what_failed(text)}", log)
    if "warning:" in text:
        print(text)


def _check_that_it_loads(name: str, module: Path) -> None:
    """The linker lets a shared library lack symbols, since Python provides some."""
    code = "import ctypes, os, sys; getattr(ctypes.PyDLL(sys.argv[1], os.RTLD_NOW), sys.argv[2])"
    command = [sys.executable, "-c", code, str(module), f"PyInit_{name}"]
    done = subprocess.run(command, capture_output=True, text=True, env=_plain())
    if done.returncode:
        raise NotBuilt(f"what was built does not load: {_what_failed(done.stderr)}".replace(f"{module}: ", ""))


def _what_failed(text: str) -> str:
    """The line of a failed build's output that says most: the first error, else what was said last."""
    # ninja's own lines, and the command that it repeats below FAILED.
    said = re.sub(r"(?m)^(\[\d+/\d+\] .*|FAILED: .*\n.*|ninja: build stopped.*)$", "", text)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if re.search(r"\berror\b.*:|\bfatal\b|undefined reference|not found", line)]
    return (errors or lines[-1:])[0][:300]


def _compiler() -> tuple[str, str]:
    """The C++ compiler as a command and as name and version."""
    try:
        words = shlex.split(os.environ.get("CXX", ""))
    except ValueError as problem:
        raise NotBuilt(f"CXX is no command: {problem}") from None
    candidates = [words] if words else [["g++"], ["c++"], ["clang++"]]
    for words in candidates:
        if shutil.which(words[0]):
            return shlex.join(words).replace("$", "$$"), _version(words)
    raise NotBuilt(
        f"no C++ compiler: CXX is {shlex.join(words)!r}, which is not there"
        if len(candidates) == 1
        else "no C++ compiler: g++, c++ and clang++ are not in PATH (or set CXX)"
    )


def _version(words: list[str]) -> str:
    """As in "g++ 12.2.0"; the name alone where it does not say."""
    name = Path(words[-1]).name
    try:
        done = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=60, env=_plain())
    except (OSError, subprocess.SubprocessError):
        return name
    found = re.findall(r"\d+\.\d+(?:\.\d+)?", (done.stdout.splitlines() or [""])[0])
    return f"{name} {found[-1]}" if found else name


def _plain() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _nvcc(settings: Settings) -> tuple[str, str]:
    """nvcc as a command and as name and version; refuses architectures that it does not know."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=Path(home, "bin")) if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        raise NotBuilt("no nvcc in CUDA_HOME or PATH")
    try:
        text = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, env=_plain()).stdout
        known = subprocess.run([found, "--list-gpu-arch"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        raise NotBuilt(f"{found} does not run ({problem})") from None
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or int(release[1]) < OLDEST_NVCC:
        raise NotBuilt(f"{found} is release {release[1] if release else 'unknown'}; {OLDEST_NVCC} or later is needed")
    version = f"nvcc {release[1]}.{release[2]}"
    for one in settings.architectures:
        if f"compute_{one.rstrip('af')}\n" not in known:
            listed = " ".join(re.findall(r"compute_(\d+)", known))
            raise SetupError(f"WIREFRAME_CUDA_ARCHS: {version} does not know {one}; it knows {listed}")
    return shlex.quote(found).replace("$", "$$"), version


def _tools() -> tuple[str, Path]:
    """ninja's program and pybind11's headers."""
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed: pip install pybind11 ninja") from None
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        program = None
    program = program or shutil.which("ninja")
    if program is None:
        raise NotBuilt("ninja is not installed: pip install pybind11 ninja")
    return program, Path(pybind11.get_include())


def _headers(pybind11: Path, folder: Path) -> Path:
    """pybind11's headers in a place that stays: an isolated build has them elsewhere each time."""
    copy = folder / f"pybind11-{importlib.metadata.version('pybind11')}"
    if not copy.exists():
        shutil.rmtree(folder / "pybind11.tmp", ignore_errors=True)
        shutil.copytree(pybind11 / "pybind11", folder / "pybind11.tmp" / "pybind11")
        os.replace(folder / "pybind11.tmp", copy)
    return copy
