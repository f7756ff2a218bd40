"""The build of the compiled modules: real builds of a copy of the tree with a small csrc/, and a look at the real ones.

The copy lies in a folder with a space in its name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from wireframe.kernels import build_info, dispatch, native

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("g++") or shutil.which("c++")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/"), "bin"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(CXX is None or NVCC is None, reason="no nvcc")

MODULE = """
#include <Python.h>
#include "answer.h"
static int add(PyObject* module) {
  return PyModule_AddStringConstant(module, "sources", WIREFRAME_SOURCES) |
         PyModule_AddStringConstant(module, "compiler", WIREFRAME_COMPILER) |
         PyModule_AddIntConstant(module, "answer", answer());
}
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  return module && add(module) == 0 ? module : nullptr;
}
"""
SOURCES = {
    "cpu/module.cpp": MODULE,
    "cpu/answer.h": "int answer();\n",
    "cpu/answer.cpp": '#include "answer.h"\nint answer() { return 42; }\n',
    "cpu/other.cpp": "int other() { return 1; }\n",
    "cuda/votes.cu": "__global__ void votes_kernel() {}\n",
}


class Tree:
    """A copy of the checkout with a small csrc/."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a tree"
        leave = shutil.ignore_patterns("*.so", "_build.*", "__pycache__", "assets")
        for name in ("kernels", "train", "bench", "wireframe"):
            shutil.copytree(ROOT / name, self.root / name, ignore=leave)
        for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE", "NOTICE"):
            shutil.copy(ROOT / name, self.root)
        for name in ("native_build.py", "point_math.h"):
            (self.root / "csrc").mkdir(exist_ok=True)
            shutil.copy(ROOT / "csrc" / name, self.root / "csrc")
        for name, text in SOURCES.items():
            (self.root / "csrc" / name).parent.mkdir(exist_ok=True)
            (self.root / "csrc" / name).write_text(text)
        self.module = self.root / "wireframe" / f"_C.{build_info.tag()}.so"

    def setup(self, *arguments, **environment):
        environment = {**os.environ, "WIREFRAME_CUDA": "0", "PYTHONPATH": "", **environment}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "setup.py", "-q", *(arguments or ("build_ext", "--inplace"))],
            cwd=self.root, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def build(self, *arguments, **environment) -> str:
        done = self.setup(*arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log(self) -> str:
        return (self.root / "build" / f"native-{build_info.tag()}" / "_C" / "build.log").read_text()

    def note(self, name: str = "_C") -> dict:
        return json.loads((self.root / "wireframe" / build_info.note_name()).read_text())[name]

    def python(self, *arguments) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def problem(self) -> str:
        return self.python("-c", "from wireframe.kernels import native; print(native.problem())")

    def edit(self, name: str, text: str) -> None:
        (self.root / "csrc" / name).write_text(text)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@needs_compiler
def test_the_second_build_has_nothing_to_do_and_an_edited_header_recompiles_what_includes_it(tree):
    assert "wireframe._C: built with " in tree.build()
    assert tree.python("-c", "import wireframe._C; print(wireframe._C.answer)") == "42"
    assert tree.note()["built"] and tree.problem() == "None"
    # The paths of pip's isolated environments differ each time: none may be in a command.
    assert sys.prefix not in (tree.root / "build" / f"native-{build_info.tag()}" / "_C" / "build.ninja").read_text()
    tree.build()
    assert tree.log() == "ninja: no work to do.\n"
    tree.edit("cpu/answer.h", "int answer();  // edited\n")
    assert tree.problem() == "csrc/ has changed since wireframe._C was built; run: pip install -e ."
    tree.build()
    assert set(re.findall(r"csrc/cpu/(\w+)\.cpp$", tree.log(), re.MULTILINE)) == {"answer", "module"}
    assert tree.problem() == "None"
    # A source that nothing includes: the module alone is compiled again, for the digest.
    tree.edit("point_math.h", "// edited\n")
    tree.build()
    assert re.findall(r"csrc/cpu/(\w+)\.cpp$", tree.log(), re.MULTILINE) == ["module"]


@needs_compiler
def test_a_failing_compiler_leaves_a_working_package_and_the_doctor_says_why(tree):
    assert tree.problem() == (
        f"wireframe._C is not built for this Python ({build_info.tag()}); run: pip install -e ."
    )
    tree.build()
    assert tree.module.exists()
    tree.edit("cpu/answer.cpp", '#include "answer.h"\nint answer() { return missing; }\n')
    tree.build()
    # The module of the build before would be taken for this one's.
    assert not tree.module.exists()
    reason = tree.note()["reason"]
    assert re.search(r"failed: csrc/cpu/answer\.cpp:2:\d+: error: .missing. was not declared", reason)
    assert Path(tree.note()["log"]).read_text() == tree.log()
    tree.build(CXX="false")
    assert re.fullmatch(r"false .*failed: it said nothing", tree.note()["reason"])
    code = """
from wireframe.kernels import dispatch, native
print(dispatch.choose("house_mask", "auto"))
for ask in (native.module, lambda: dispatch.choose("house_mask", "native")):
    try:
        ask()
    except dispatch.ImplementationError as problem:
        print(problem)
"""
    why = f"wireframe._C is not built: {tree.note()['reason']}"
    assert tree.python("-c", code).splitlines() == [
        "reference", why, f"house_mask: impl 'native' cannot run: {why}"
    ]  # fmt: skip
    report = tree.python("-m", "wireframe", "doctor").splitlines()
    assert f"{why} (log: {tree.note()['log']})" in report
    assert f"  house_mask: reference (NumPy); not native: {why}" in report


@needs_compiler
def test_a_module_that_lacks_symbols_is_not_taken_for_built(tree):
    (tree.root / "csrc" / "cpu" / "answer.cpp").unlink()
    tree.build()
    assert "does not load" in tree.note()["reason"] and "answer" in tree.note()["reason"]
    assert not tree.module.exists()


def test_a_build_without_pybind11_or_a_compiler_is_a_note(tree):
    tree.build(PATH="/nowhere", CXX="")
    assert tree.note()["reason"].startswith("no C++ compiler: ")
    (tree.root / "sitecustomize.py").write_text("import sys\nsys.modules['pybind11'] = None\n")
    tree.build(PYTHONPATH=str(tree.root), CXX="true")
    assert tree.note()["reason"] == "pybind11 is not installed: pip install pybind11 ninja"
    assert tree.note("_C_cuda")["reason"] == "switched off by WIREFRAME_CUDA=0"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"WIREFRAME_CUDA": "1"}, "WIREFRAME_CUDA=1, and wireframe._C_cuda is not built: no nvcc in CUDA_HOME or PATH"),
        ({"WIREFRAME_CUDA": "yes"}, "WIREFRAME_CUDA must be 0 or 1, got 'yes'"),
        ({"WIREFRAME_CUDA_ARCHS": "hopper"}, "WIREFRAME_CUDA_ARCHS must look like 89;90, got 'hopper'"),
        ({"WIREFRAME_CUDA_ARCHS": "80;"}, "WIREFRAME_CUDA_ARCHS must look like 89;90, got '80;'"),
        ({"WIREFRAME_SANITIZE": "1"}, "WIREFRAME_SANITIZE=1, and wireframe._C is not built: no C++ compiler: "),
    ],
)
def test_what_was_demanded_and_cannot_be_had_is_one_line(tree, changes, words):
    done = tree.setup(PATH="/nowhere", CUDA_HOME="", CXX="", **changes)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line][-1].startswith(f"error: {words}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("demanded", [False, True])
def test_a_failing_nvcc_fails_the_installation_only_where_cuda_is_demanded(tree, demanded):
    nvcc = tree.root / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;\n'
        "  --list-gpu-arch) echo compute_89; echo compute_90 ;;\n"
        '  *) echo "csrc/cuda/votes.cu(1): error: it is broken" >&2; exit 2 ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tree.root), "CXX": "true", "WIREFRAME_CUDA": "1" if demanded else ""}
    done = tree.setup(WIREFRAME_CUDA_ARCHS="89;90", **environment)
    reason = "nvcc 12.4 failed: csrc/cuda/votes.cu(1): error: it is broken"
    assert tree.note("_C_cuda")["reason"] == reason
    assert done.returncode == demanded and (reason in done.stderr) == demanded
    done = tree.setup(WIREFRAME_CUDA_ARCHS="80;90", **environment)
    assert done.returncode == 1
    assert "error: WIREFRAME_CUDA_ARCHS: nvcc 12.4 does not know 80; it knows 89 90" in done.stderr


@needs_compiler
def test_the_sdist_holds_the_sources_and_a_wheel_made_from_it_the_module_and_its_note(tree, tmp_path):
    tree.build("sdist", "-d", str(tmp_path / "dist"))
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "from sdist", filter="data")
    (tree.root,) = (tmp_path / "from sdist").iterdir()
    for name in SOURCES:
        assert (tree.root / "csrc" / name).read_text() == SOURCES[name]
    # A file where the folder of the objects should be: they go to build_temp.
    (tree.root / "build").write_text("")
    work = tmp_path / "work"
    tree.build("build", "--build-base", str(work), "bdist_wheel", "-b", str(work / "wheel"), "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert build_info.tag().split("-")[1] in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {path.name for path in (tmp_path / "site" / "wireframe").iterdir()}
    assert {tree.module.name, build_info.note_name(), "kernels"} <= names and "csrc" not in names
    tree.root = tmp_path / "site"
    assert tree.problem() == "None" and tree.note()["built"]
    assert "log" not in tree.note()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The modules built from the real csrc/, in a folder of their own; what make test has compiled is not again."""
    folder = tmp_path_factory.mktemp("modules")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"],
        cwd=ROOT, env={**os.environ, "WIREFRAME_CUDA": str(int(NVCC is not None))},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    notes = json.loads((folder / "wireframe" / build_info.note_name()).read_text())
    assert notes["_C"]["built"], notes
    return folder / "wireframe"


def tool(*command) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=60).stdout


@needs_compiler
def test_the_modules_link_the_standard_libraries_alone_and_export_one_name(real):
    modules = sorted(real.glob("*.so"))
    assert len(modules) == (1 if NVCC is None else 2)
    for module in modules:
        needed = re.findall(r"NEEDED.*\[(.*?)\.so", tool("readelf", "-d", module))
        assert needed and set(needed) <= {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", "libdl", "librt"} | {
            name for name in needed if name.startswith("ld-linux")
        }
        names = [line.split()[-1] for line in tool("nm", "-D", "--defined-only", module).splitlines()]
        assert names == [f"PyInit_{module.name.split('.')[0]}"]


@needs_compiler
def test_the_cpu_module_has_no_fused_multiply_add(real):
    (module,) = real.glob("_C.*.so")
    code = tool("objdump", "-d", "--no-show-raw-insn", module)
    assert re.search(r"\s(mulsd|fmul)\s", code)
    assert re.findall(r"\sv?fn?m(?:add|sub|la|ls)\w*\s.*", code) == []


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_without_warnings_and_spills(real):
    folder = ROOT / "build" / f"native-{build_info.tag()}" / "_C_cuda"
    architectures = {f"sm_{one}" for one in (os.environ.get("WIREFRAME_CUDA_ARCHS") or "80;86;89;90").split(";")}
    kernels = 0
    for source in cuda_sources():
        log = (folder / f"{source.name}.o.log").read_text()
        assert "warning" not in log.lower(), log
        assert set(re.findall(r"(\d+) bytes spill (?:stores|loads)", log)) <= {"0"}, log
        compiled = {}
        for kernel, architecture in re.findall(r"Compiling entry function '(\w+)' for '(sm_\w+)'", log):
            compiled.setdefault(kernel, set()).add(architecture)
        # One report of spills for each kernel and architecture, at least.
        assert log.count("bytes spill stores") >= len(compiled) * len(architectures)
        assert all(found == architectures for found in compiled.values()), compiled
        kernels += len(compiled)
    assert kernels > 0
    other = [path.read_text() for path in folder.glob("*.cpp.o.log")]
    assert not any("warning" in log.lower() for log in other), other


@needs_nvcc
def test_the_ptx_has_no_fused_multiply_add(tmp_path):
    flags = subprocess.run(
        [sys.executable, "-c", "import native_build; print(native_build.CUDA_FLAGS)"],
        cwd=ROOT / "csrc", capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    jobs = []
    for source in cuda_sources():
        target = tmp_path / f"{source.name}.ptx"
        command = [NVCC, *flags, "-ptx", "-arch=compute_90", "-I", ROOT / "csrc", "-o", target, source]
        jobs.append((target, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
    kernels = 0
    for target, job in jobs:
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said
        text = target.read_text()
        kernels += len(re.findall(r"\.entry\b", text))
        # ptxas may fuse what does not say how it is rounded.
        assert re.findall(r"\s(?:mul|add|sub)\.f(?:32|64)\b.*", text) == []
        # Division and roots are the rounded ones; the compiler makes multiply-adds of them only below this level.
        assert re.findall(r"\s(?:fma|mad)\.r[nzmp]\S*\.f\d\d.*", text) == []
        assert re.findall(r"\s(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\S*|\.ftz\b.*", text) == []
    assert kernels > 0


def test_the_doctor_names_the_choice_on_each_device(monkeypatch):
    monkeypatch.setattr(native, "problem", {"_C": None, "_C_cuda": "wireframe._C_cuda is not built: no nvcc"}.get)
    assert dispatch.why("house_mask", ("cpu", "cuda")) == [
        "house_mask: native (C++); also runs: reference",
        "house_mask on cuda tensors: reference (NumPy, on the CPU); "
        "not native: wireframe._C_cuda is not built: no nvcc",
    ]
    assert dispatch.why("merge_vertices", ("cpu", "cuda")) == ["merge_vertices: native (C++); also runs: reference"]
