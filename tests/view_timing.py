"""How long a page of ``wireframe view`` takes in headless Chromium: to open, to turn, to pick a scene.

python tests/view_timing.py PAGE.html [RUNS]. Drawing is by software there: a GPU is faster. On a machine that does
other work the CPU time of all of the browser's processes says more than the clock.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from view_cases import NO_WEBGL, launched

TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
FRAMES = """async (count) => {
  const gaps = [];
  let last = await new Promise(requestAnimationFrame);
  while (gaps.length < count) {
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - last);
    last = now;
  }
  return gaps.sort((a, b) => a - b);
}"""
PICKS = """async (count) => {
  const times = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    step(1);
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
}"""


def cpu_seconds():
    """CPU time so far of all processes below this one (Linux)."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        children.setdefault(int(fields[1]), []).append((int(name.split()[0]), int(fields[11]) + int(fields[12])))
    total, waiting = 0, [os.getpid()]
    while waiting:
        for process, ticks in children.get(waiting.pop(), []):
            total += ticks
            waiting.append(process)
    return total / os.sysconf("SC_CLK_TCK")


def main(path, runs=5):
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for script, name in (("", "WebGL"), (NO_WEBGL, "2D canvas")):
        print(name)
        with launched() as browser:
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            tab.add_init_script(script)
            measure(tab, path, runs)


def measure(tab, path, runs):
    tab.goto(path.as_uri())
    walls, cpus = [], []
    for _ in range(runs):
        tab.goto("about:blank")
        cpu, wall = cpu_seconds(), time.perf_counter()
        tab.goto(path.as_uri())
        tab.evaluate(TWO_FRAMES)
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
    clock = f"least {min(walls):.2f} s, median {statistics.median(walls):.2f} s"
    print(f"  opened and drawn: {clock}; CPU least {min(cpus):.2f} s, median {statistics.median(cpus):.2f} s")
    for frames, name in ((1_000_000, "sharp"), (0, "coarse")):
        tab.evaluate(f"(SLOW.frames = {frames}, spin(true))")
        tab.evaluate(FRAMES, 5)
        cpu = cpu_seconds()
        gaps = tab.evaluate(FRAMES, 80)
        cpu = (cpu_seconds() - cpu) / len(gaps)
        tab.evaluate("spin(false)")
        clock = f"median {gaps[40]:.1f} ms, 95 % {gaps[76]:.1f} ms"
        print(f"  a frame while turning, {name}: {clock}; CPU {1e3 * cpu:.1f} ms")
    tab.evaluate("SLOW.frames = 1000000")
    times = tab.evaluate(PICKS, 40)
    print(f"  a scene picked and drawn: median {times[20]:.1f} ms, 95 % {times[38]:.1f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:3]))
