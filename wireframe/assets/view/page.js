// Ties the parts together: picks scenes, draws when something has changed, listens to keys and buttons.

const canvas = byId("view");
const painter = makePainter(canvas) ?? makeFlatPainter(canvas);
const panel = byId("layers");
const orbit = makeOrbit(canvas, redraw, () => (panel.open ? panel.offsetWidth + 14 : 0));
const layers = makeLayers(redraw);
let order = [], current = null, scene = null, colors = null, styles = null, frame = 0, last = 0;

function pick(entry) {
  mark(entry, current);
  current = entry;
  scene = decode(JSON.parse(byId(`scene-${entry.at}`).textContent));
  byId("scene").textContent = byId("scene").title = entry.id;
  byId("scored").replaceChildren(...scoreLine(entry));
  const there = Object.entries(LAYERS).filter(([name]) => scene.has[name] && name !== "ground");
  const what = there.map(([, title]) => title.toLowerCase()).join(", ");
  canvas.setAttribute("aria-label", `${entry.id} in 3D: ${what || "nothing to show"}`);
  layers.fill(scene);
  painter.load(scene);
  orbit.fit([0, 0, 0], scene.radius);
  history.replaceState(null, "", `#${encodeURIComponent(entry.id)}`);
}

function step(by) {
  if (!order.length) return;
  const at = order.indexOf(current);
  pick(order[at < 0 ? 0 : (at + by + order.length) % order.length]);
}

function readColors() {
  const probe = element("span");
  byId("app").append(probe);
  const rgba = (name, alpha = 1) => {
    probe.style.color = `var(--${name})`;
    const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3);
    return [...parts.map((value) => value / 255), alpha];
  };
  colors = {
    fine: rgba("ground", 0.3), coarse: rgba("ground", 0.6),
    classes: index.classes.map((_, i) => rgba(`c${i}`)),
  };
  styles = {};
  for (const [name, style] of Object.entries(STYLES)) {
    styles[name] = { ...style, color: rgba(style.color, style.alpha) };
  }
  probe.remove();
  redraw();
}

function redraw() {
  if (!frame) frame = requestAnimationFrame(paint);
}

// Without a GPU a frame takes long. So many slow ones in a row make the picture coarse as long as it moves.
const SLOW = { milliseconds: 30, frames: 10, sharpness: 0.5, rest: 180 };
let slow = 0, resting = 0;

function paint(time) {
  frame = 0;
  const gap = time - last;
  last = time;
  const more = orbit.advance(Math.min(gap / 1000, 0.05));
  const moving = gap < 1000 && time - orbit.moved < SLOW.rest;
  if (slow < SLOW.frames && moving) slow = gap > SLOW.milliseconds ? slow + 1 : 0;
  const coarse = slow >= SLOW.frames && (more || moving);
  painter.draw(orbit.lens, shown, classes, colors, styles, coarse ? SLOW.sharpness : 1);
  clearTimeout(resting);
  if (coarse) resting = setTimeout(redraw, SLOW.rest + 20);
  if (more) redraw();
}

function spin(on = !orbit.spinning) {
  orbit.spin(on);
  byId("spin").setAttribute("aria-pressed", String(on));
}

function otherScheme() {
  const chosen = document.documentElement.dataset;
  const dark = chosen.scheme ? chosen.scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  chosen.scheme = dark ? "light" : "dark";
  readColors();
}

const KEYS = {
  r: () => orbit.reset(), t: () => orbit.fromAbove(), s: () => spin(), d: otherScheme,
  "+": () => orbit.zoom(0.8), "=": () => orbit.zoom(0.8), "-": () => orbit.zoom(1.25),
  ArrowLeft: () => step(-1), ArrowRight: () => step(1), p: () => step(-1), n: () => step(1),
};
const TURNS = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, -0.12], ArrowDown: [0, 0.12] };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input[type=search], select")) return;
  const box = layers.toggle(Number(event.key));
  if (event.shiftKey && TURNS[event.key]) orbit.turn(...TURNS[event.key]);
  else if (box) box.click();
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

function openList(open) {
  byId("side").classList.toggle("open", open);
  byId("menu").setAttribute("aria-expanded", String(byId("side").classList.contains("open")));
}

const BUTTONS = {
  before: () => step(-1), after: () => step(1), reset: () => orbit.reset(), above: () => orbit.fromAbove(),
  spin: () => spin(), scheme: otherScheme, menu: () => openList(),
};
for (const [name, act] of Object.entries(BUTTONS)) byId(name).addEventListener("click", act);
for (const [name, kind] of [["filter", "input"], ["order", "change"]]) {
  byId(name).addEventListener(kind, () => { order = fillList(); });
}
canvas.addEventListener("pointerdown", () => openList(false));
canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
canvas.addEventListener("webglcontextrestored", () => {
  painter.start();
  painter.load(scene);
  redraw();
});
panel.addEventListener("toggle", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColors);
new ResizeObserver(redraw).observe(canvas);

// The scenes' data stand behind this script.
addEventListener("DOMContentLoaded", () => {
  if (innerWidth <= 860) panel.open = false;
  index.scenes.forEach((entry, rank) => { entry.rank = rank; });
  readColors();
  fillHeader();
  if (!scored.length) byId("order").value = "source";
  order = fillList();
  let wanted = "";
  try {
    wanted = decodeURIComponent(location.hash.slice(1));
  } catch {
    // The address was typed by hand.
  }
  pick(index.scenes.find((entry) => entry.id === wanted) || order[0]);
});
