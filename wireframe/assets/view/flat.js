// The same picture with a 2D canvas, for browsers without WebGL 2 (which without a GPU have none): far points first,
// then the wires over all of them.

const BINS = 1024;

function makeFlatPainter(canvas) {
  const pen = canvas.getContext("2d");
  const sprites = new Map();
  let loaded = null;

  // A point of a class as a picture of whole pixels, drawn once.
  function sprite(color, size, ring = 0) {
    const key = `${color} ${size} ${ring}`;
    if (!sprites.has(key)) {
      const made = document.createElement("canvas");
      made.width = made.height = size + 2;
      const brush = made.getContext("2d");
      brush.fillStyle = brush.strokeStyle = css(color);
      brush.lineWidth = (size / 2) * (1 - ring);
      brush.beginPath();
      brush.arc(size / 2 + 1, size / 2 + 1, ring ? (size / 4) * (1 + ring) : size / 2, 0, 2 * Math.PI);
      if (ring) brush.stroke();
      else brush.fill();
      sprites.set(key, made);
    }
    return sprites.get(key);
  }

  const css = ([r, g, b, alpha]) => `rgb(${[r, g, b].map((value) => Math.round(255 * value)).join(" ")} / ${alpha})`;

  function load(scene) {
    loaded = scene;
  }

  function draw(lens, shown, classes, colors, styles, sharpness = 1) {
    const ratio = Math.min(devicePixelRatio || 1, 2) * sharpness;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    pen.clearRect(0, 0, width, height);
    if (!loaded) return;
    const { matrix, near, distance, pixels } = lens(width, height);
    const eye = { matrix, near, width, height, ratio, fog: fogOf(distance, near, loaded.radius) };
    if (shown.has("ground")) for (const name of ["fine", "coarse"]) ground(eye, loaded.lines[name], colors[name]);
    if (shown.has("points")) points(eye, classes, colors.classes, pixels);
    for (const [name, style] of Object.entries(styles)) {
      if (shown.has(style.layer)) wires(eye, loaded.lines[name], loaded.dots[name], style);
    }
    pen.globalAlpha = 1;
  }

  // Where a point is on the screen, and how deep.
  function project({ matrix: m, width, height }, values, at) {
    const x = values[at], y = values[at + 1], z = values[at + 2];
    const w = m[3] * x + m[7] * y + m[11] * z + m[15];
    const scaled = 0.5 / w;
    return [
      width * (0.5 + (m[0] * x + m[4] * y + m[8] * z + m[12]) * scaled),
      height * (0.5 - (m[1] * x + m[5] * y + m[9] * z + m[13]) * scaled), w,
    ];
  }

  function points(eye, classes, colors, pixels) {
    const { near, ratio, fog, width, height } = eye;
    const bins = Array.from({ length: BINS }, () => []);
    let first = 0;
    loaded.counts.forEach((count, kind) => {
      for (let i = first; classes[kind] && i < first + count; i++) {
        const [x, y, w] = project(eye, loaded.points, 3 * i);
        if (w < near || x < 0 || y < 0 || x > width || y > height) continue;
        const depth = Math.min(Math.max((w - fog[0]) / (fog[1] - fog[0]), 0), 1);
        bins[Math.floor(depth * (BINS - 1))].push(x, y, w, kind);
      }
      first += count;
    });
    for (let bin = BINS - 1; bin >= 0; bin--) {
      const found = bins[bin];
      if (found.length) pen.globalAlpha = 1 - 0.62 * smooth(bin / BINS);
      for (let i = 0; i < found.length; i += 4) {
        const size = pointSize(found[i + 3], loaded.radius, pixels, found[i + 2], ratio);
        const dot = sprite(colors[found[i + 3]], Math.round(size));
        pen.drawImage(dot, Math.round(found[i] - dot.width / 2), Math.round(found[i + 1] - dot.width / 2));
      }
    }
  }

  function stroke(eye, lines, i) {
    let [from, to] = [6 * i, 6 * i + 3].map((at) => project(eye, lines, at));
    if (from[2] < eye.near && to[2] < eye.near) return;
    if (from[2] < eye.near || to[2] < eye.near) {
      // The cut is where the depth, which is linear along the line, reaches the near plane.
      const share = (eye.near - from[2]) / (to[2] - from[2]);
      const cut = [0, 1, 2].map((axis) => {
        const start = lines[6 * i + axis];
        return start + share * (lines[6 * i + 3 + axis] - start);
      });
      if (from[2] < eye.near) from = project(eye, cut, 0);
      else to = project(eye, cut, 0);
    }
    pen.moveTo(from[0], from[1]);
    pen.lineTo(to[0], to[1]);
  }

  function ground(eye, lines, color) {
    pen.lineWidth = 0.9 * eye.ratio;
    pen.strokeStyle = css(color);
    pen.setLineDash([]);
    for (let i = 0; i < lines.length / 6; i++) {
      const far = Math.hypot(lines[6 * i] + lines[6 * i + 3], lines[6 * i + 2] + lines[6 * i + 5]) / 2;
      pen.globalAlpha = 1 - smooth((far / (loaded.radius * RIM) - 0.2) / 0.8);
      if (pen.globalAlpha < 0.03) continue;
      pen.beginPath();
      stroke(eye, lines, i);
      pen.stroke();
    }
  }

  function wires(eye, lines, dots, { color, width, dash, size, ring }) {
    pen.globalAlpha = 1;
    pen.lineCap = "round";
    pen.lineWidth = width * eye.ratio;
    pen.strokeStyle = css(color);
    pen.setLineDash(dash ? [0.54 * dash * eye.ratio, 0.46 * dash * eye.ratio + pen.lineWidth] : []);
    pen.beginPath();
    for (let i = 0; i < lines.length / 6; i++) stroke(eye, lines, i);
    pen.stroke();
    pen.lineCap = "butt";
    const dot = sprite(color, Math.round(size * eye.ratio), ring);
    for (let i = 0; i < dots.length; i += 3) {
      const [x, y, w] = project(eye, dots, i);
      if (w >= eye.near) pen.drawImage(dot, x - dot.width / 2, y - dot.width / 2);
    }
  }

  return { load, draw, start() {} };
}
