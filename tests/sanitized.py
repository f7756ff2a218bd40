"""Runs the extension's tests against ``wireframe._C`` built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitized.py [pytest's arguments, instead of every file with such tests]

Without the sanitisers' libraries it fails, unless WIREFRAME_SANITIZE=0 says that they are not wanted.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
PACKAGE = FOLDER / "lib"

# In the process of the tests: proves that they meet the sanitised module, then runs them.
RUN = """
import sys
sys.path[0] = {package!r}
import wireframe
from wireframe.kernels import native
assert wireframe.__file__.startswith({package!r}), wireframe.__file__
assert native.module().sanitized, "the module is not the sanitised one"
print(f"sanitised: {{native.module().__file__}}", flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def main(arguments: list[str]) -> int:
    if os.environ.get("WIREFRAME_SANITIZE") == "0":
        print("skipped: WIREFRAME_SANITIZE=0")
        return 0
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    # libstdc++ before it is first needed: AddressSanitizer looks for the function that throws when it starts.
    preload = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in preload:
        lacking = f"{shlex.join(compiler)} has no libasan and libubsan"
        print(f"{lacking}; WIREFRAME_SANITIZE=0 skips these tests", file=sys.stderr)
        return 1
    build = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-base", FOLDER, "--build-lib", PACKAGE]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "WIREFRAME_SANITIZE": "1"}, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep what they allocate until the process ends: leaks of theirs would hide ours.
        # Aborting makes pytest print where in the tests it was.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        # Python's own allocator would hide reads beyond short bytes objects.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(PACKAGE),
    }
    # Collecting the other files would take longer than the tests.
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.native" in path.read_text()]
    # The reports go to the process's stderr, not to Python's.
    options = ["-m", "native", "--capture=sys", "-p", "no:cacheprovider", "-q", *(arguments or files)]
    run = [sys.executable, "-c", RUN.format(package=str(PACKAGE)), *options]
    return subprocess.run(run, cwd=ROOT, env=environment).returncode


def runtime(compiler: list[str], name: str) -> str | None:
    """The sanitiser's library, None where the compiler has none: it then prints the bare name."""
    try:
        done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    except OSError:
        return None
    path = Path(done.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
