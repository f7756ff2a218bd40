// The camera around a target: mouse, touch and keys change where it should be, and it glides there.

const FIELD = (38 * Math.PI) / 180;
const START = { yaw: 0.6, pitch: 0.42 };

function makeOrbit(canvas, changed, cover) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const goal = { ...START, distance: 20, target: [0, 0, 0] };
  const now = structuredClone(goal);
  const pointers = new Map();
  let home = { distance: 20, target: [0, 0, 0] };
  let spinning = false, moved = 0;

  const bound = (value, low, high) => Math.min(Math.max(value, low), high);
  const metresPerPixel = () => (2 * goal.distance * Math.tan(FIELD / 2)) / Math.max(canvas.clientHeight, 1);

  function turn(x, y) {
    goal.yaw -= x;
    goal.pitch = bound(goal.pitch + y, -1.55, 1.55);
    changed();
  }

  function zoom(factor) {
    goal.distance = bound(goal.distance * factor, home.distance / 60, home.distance * 12);
    changed();
  }

  function pan(x, y) {
    const { right, up } = axes(goal);
    const step = metresPerPixel();
    goal.target = goal.target.map((value, i) => value + step * (y * up[i] - x * right[i]));
    changed();
  }

  // The picture's axes in the world, y up; the camera looks along -back.
  function axes({ yaw, pitch }) {
    const back = [Math.cos(pitch) * Math.sin(yaw), Math.sin(pitch), Math.cos(pitch) * Math.cos(yaw)];
    const right = [Math.cos(yaw), 0, -Math.sin(yaw)];
    const up = [-Math.sin(pitch) * Math.sin(yaw), Math.cos(pitch), -Math.sin(pitch) * Math.cos(yaw)];
    return { right, up, back };
  }

  const middle = () => {
    const all = [...pointers.values()];
    const [x, y] = [0, 1].map((i) => all.reduce((sum, at) => sum + at[i], 0) / all.length);
    const spread = all.length > 1 ? Math.hypot(all[0][0] - all[1][0], all[0][1] - all[1][1]) : 0;
    return { x, y, spread };
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return;
    const before = middle();
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    const after = middle();
    const [x, y] = [after.x - before.x, after.y - before.y];
    if (pointers.size > 1) {
      pan(x, y);
      if (before.spread > 0 && after.spread > 0) zoom(before.spread / after.spread);
    } else if (event.shiftKey || event.buttons & 6) {
      pan(x, y);
    } else {
      turn(x * 0.0075, y * 0.0075);
    }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      pointers.delete(event.pointerId);
      canvas.classList.toggle("held", pointers.size > 0);
    });
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    // Firefox counts in lines; a pinch on a trackpad comes as small steps with ctrl.
    const steps = event.deltaY * (event.deltaMode === 1 ? 33 : 1) * (event.ctrlKey ? 6 : 1);
    zoom(Math.exp(bound(steps, -400, 400) * 0.0013));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => reset());

  // What stands over the right side of the picture, in pixels; the target is in the middle of the rest.
  const covered = () => (canvas.clientWidth > 700 ? cover() : 0);

  function fit(target, radius) {
    const narrow = Math.min(1, (canvas.clientWidth - covered()) / Math.max(canvas.clientHeight, 1));
    home = { target, distance: (radius * 0.88) / Math.sin(FIELD / 2) / Math.max(narrow, 0.3) };
    Object.assign(goal, structuredClone(home));
    Object.assign(now, structuredClone(home));
    changed();
  }

  function reset(angles = START) {
    // The short way round after many turns.
    goal.yaw = angles.yaw + 2 * Math.PI * Math.round((goal.yaw - angles.yaw) / (2 * Math.PI));
    goal.pitch = angles.pitch;
    Object.assign(goal, structuredClone(home));
    changed();
  }

  // Moves on by some seconds; whether there is still way to go.
  function advance(seconds) {
    if (spinning && pointers.size === 0) goal.yaw += seconds * 0.5;
    const share = calm.matches ? 1 : 1 - Math.exp(-seconds * 22);
    let left = spinning ? 1 : 0;
    const glide = (from, to, unit) => {
      const way = to - from;
      left = Math.max(left, Math.abs(way) / unit);
      return share === 1 || Math.abs(way) < 1e-4 * unit ? to : from + way * share;
    };
    now.yaw = glide(now.yaw, goal.yaw, 1);
    now.pitch = glide(now.pitch, goal.pitch, 1);
    now.distance = glide(now.distance, goal.distance, goal.distance);
    now.target = now.target.map((value, i) => glide(value, goal.target[i], goal.distance));
    if (left > 1e-4) moved = performance.now();
    return left > 1e-4;
  }

  // World to clip space, column by column, and what the shaders need to know of the distance.
  function lens(width, height) {
    const { right, up, back } = axes(now);
    const eye = now.target.map((value, i) => value + now.distance * back[i]);
    const near = now.distance * 0.02, far = now.distance * 4 + home.distance * 60;
    const y = 1 / Math.tan(FIELD / 2), x = (y * height) / width;
    const a = (far + near) / (near - far), b = (2 * far * near) / (near - far);
    const dot = (u) => u[0] * eye[0] + u[1] * eye[1] + u[2] * eye[2];
    const aside = covered() / Math.max(canvas.clientWidth, 1);
    const matrix = [];
    for (let i = 0; i < 3; i++) matrix.push(x * right[i] + aside * back[i], y * up[i], a * back[i], -back[i]);
    matrix.push(-x * dot(right) - aside * dot(back), -y * dot(up), -a * dot(back) + b, dot(back));
    return { matrix, near, distance: now.distance, pixels: (y * height) / 2 };
  }

  return {
    fit, turn, zoom, reset, advance, lens,
    spin(on) { spinning = on; changed(); },
    get spinning() { return spinning; },
    // When it last went on, in milliseconds.
    get moved() { return moved; },
    fromAbove() { reset({ yaw: 0, pitch: 1.55 }); },
  };
}
