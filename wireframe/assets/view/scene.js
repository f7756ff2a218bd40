// A scene's data block as arrays to draw, around its centre, and as the texts of the layers.

// How lines are drawn; the colours are names of the style sheet's. The truth lies broad under the prediction.
const STYLES = {
  camera: { layer: "cameras", color: "camera", alpha: 0.8, width: 1.3, size: 4, bias: 0 },
  truth: { layer: "truth", color: "truth", alpha: 0.62, width: 6, size: 10, bias: 0.0006 },
  missed: { layer: "truth", color: "missed", alpha: 0.95, width: 4, dash: 13, size: 12, ring: 0.55, bias: 0.0007 },
  right: { layer: "prediction", color: "right", alpha: 1, width: 2.4, size: 8, bias: 0.0009 },
  extra: { layer: "prediction", color: "extra", alpha: 1, width: 2.4, size: 8, bias: 0.0009 },
};

// How long a camera's pyramid is, and how far the ground reaches, against the radius of the building.
const PYRAMID = 0.13, RIM = 2.6;

function decode(block) {
  const [cx, cy, cz] = block.centre;
  const place = ([x, y, z]) => [x - cx, y - cy, z - cz];
  const truth = wires(block.truth, place, "truth", "missed");
  const prediction = wires(block.prediction, place, "right", "extra");
  const camera = cameraLines(block.cameras, place, block.radius * PYRAMID);
  const eyes = new Float32Array(block.cameras.flatMap((numbers) => place(numbers)));
  const found = {
    radius: block.radius,
    points: decodePoints(block, place),
    counts: block.counts,
    lines: { camera, ...truth.lines, ...prediction.lines, ...groundLines(block.radius, block.floor - cy) },
    dots: { camera: eyes, ...truth.dots, ...prediction.dots },
    has: {
      points: block.counts.some(Boolean), cameras: block.cameras.length > 0, ground: true,
      truth: Boolean(block.truth), prediction: Boolean(block.prediction),
    },
  };
  found.about = {
    // Strays far away are counted and not drawn.
    points: plain(found.points.length / 3) + (block.far ? ` + ${plain(block.far)} far off` : ""),
    cameras: String(block.cameras.length), ground: `${gridStep(block.radius)} m`,
    truth: sizeOf(block.truth), prediction: sizeOf(block.prediction),
  };
  found.parts = { truth: partsOf(block, "truth"), prediction: partsOf(block, "prediction") };
  return found;
}

const sized = (vertices, edges) => `${vertices} v  ${edges} e`;
const sizeOf = (part) => (part ? sized(part.vertices.length, part.edges.length) : "");

// Parts that have a partner, then parts that have none.
const KINDS = {
  truth: [["truth", "found"], ["missed", "missed"]],
  prediction: [["right", "right"], ["extra", "extra"]],
};

// Lines of the legend: [style, text, number], or [null, text].
function partsOf(block, name) {
  const part = block[name];
  if (!part) return [];
  const said = part.undrawn ? [[null, `${part.undrawn} edges cannot be drawn`]] : [];
  if (!part.edgeFound) return said;
  const lines = KINDS[name].map(([style, text], i) => {
    const count = (marks) => marks.filter((mark) => mark === 1 - i).length;
    return [style, text, sized(count(part.vertexFound), count(part.edgeFound))];
  });
  return [...lines, ...said];
}

// 16 bits a coordinate, little-endian, points in the order of their classes.
function decodePoints(block, place) {
  const bytes = atob(block.points);
  const count = bytes.length / 6;
  const values = new Float32Array(3 * count);
  const low = place(block.low);
  for (let i = 0; i < 3 * count; i++) {
    const grid = bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1);
    values[i] = low[i % 3] + block.step * grid;
  }
  return values;
}

const typed = (sets) =>
  Object.fromEntries(Object.entries(sets).map(([name, values]) => [name, new Float32Array(values)]));

// Without marks every part is of the first kind.
function wires(part, place, first, second) {
  const lines = { [first]: [], [second]: [] }, dots = { [first]: [], [second]: [] };
  if (part) {
    const at = part.vertices.map(place);
    at.forEach((vertex, i) => dots[part.vertexFound && !part.vertexFound[i] ? second : first].push(...vertex));
    part.edges.forEach(([a, b], i) => {
      lines[part.edgeFound && !part.edgeFound[i] ? second : first].push(...at[a], ...at[b]);
    });
  }
  return { lines: typed(lines), dots: typed(dots) };
}

// Each camera is 15 numbers: its centre, and where the rays of the picture's corners are at depth 1.
function cameraLines(cameras, place, depth) {
  const values = [];
  for (const numbers of cameras) {
    const eye = place(numbers);
    const corners = [0, 1, 2, 3].map((i) => eye.map((value, axis) => value + depth * numbers[3 + 3 * i + axis]));
    corners.forEach((corner, i) => values.push(...eye, ...corner, ...corner, ...corners[(i + 1) % 4]));
    // A roof over the upper side of the picture shows which way is up.
    const [left, right, , lower] = corners;
    const tip = left.map((value, axis) => (value + right[axis]) / 2 + 0.35 * (left[axis] - lower[axis]));
    values.push(...left, ...tip, ...tip, ...right);
  }
  return new Float32Array(values);
}

// The distance of the ground's lines, a round number of metres.
function gridStep(radius) {
  const wanted = (RIM * radius) / 14, tens = 10 ** Math.floor(Math.log10(wanted));
  return tens * [1, 2, 5, 10].find((times) => times * tens >= wanted);
}

// A round grid in pieces, so that it can fade: fine lines, and every fifth of them.
function groundLines(radius, height) {
  const step = gridStep(radius), count = Math.ceil((RIM * radius) / step);
  const pieces = 6, lines = { fine: [], coarse: [] };
  for (let i = -count; i <= count; i++) {
    const half = Math.sqrt(Math.max(0, count * count - i * i)) * step;
    const of = i % 5 ? lines.fine : lines.coarse;
    for (let piece = 0; piece < pieces; piece++) {
      const [from, to] = [piece, piece + 1].map((at) => half * ((2 * at) / pieces - 1));
      of.push(i * step, height, from, i * step, height, to, from, height, i * step, to, height, i * step);
    }
  }
  return typed(lines);
}
