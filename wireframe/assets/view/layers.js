// The layers: a switch each, one for every class of points, and a legend of lines with what they count.

const LAYERS = { points: "Points", cameras: "Cameras", truth: "Truth", prediction: "Prediction", ground: "Ground" };

const shown = new Set(Object.keys(LAYERS));
const classes = index.classes.map(() => true);

function makeLayers(changed) {
  const switches = {};
  Object.entries(LAYERS).forEach(([name, title], i) => {
    switches[name] = layerSwitch(name, title, i + 1, changed);
    byId("switches").append(switches[name].holder);
  });
  const { group, chips } = classSwitches(changed);
  switches.points.parts.append(group);

  // Says what a scene has of each layer.
  function fill(scene) {
    for (const [name, { box, count, parts }] of Object.entries(switches)) {
      box.disabled = !scene.has[name];
      count.textContent = scene.has[name] ? scene.about[name] : "none";
      if (scene.parts[name]) parts.replaceChildren(...scene.parts[name].map(legendLine));
    }
    scene.counts.forEach((count, i) => {
      chips[i].disabled = count === 0;
      chips[i].lastChild.textContent = count ? plain(count) : "";
    });
  }

  return { fill, toggle: (number) => Object.values(switches)[number - 1]?.box };
}

function layerSwitch(name, title, number, changed) {
  const box = element("input", { type: "checkbox", checked: true, id: `layer-${name}` });
  const count = span("count"), parts = element("div", { className: "parts" });
  const about = { title: `Show or hide (${number})` };
  const label = element("label", about, box, title, element("kbd", {}, String(number)), count);
  const holder = element("div", { className: "layer" }, label, parts);
  box.addEventListener("change", () => {
    if (box.checked) shown.add(name);
    else shown.delete(name);
    holder.classList.toggle("off", !box.checked);
    changed();
  });
  return { box, count, parts, holder };
}

function classSwitches(changed) {
  const show = (i, on) => {
    classes[i] = on;
    chips[i].setAttribute("aria-pressed", String(on));
    changed();
  };
  const chips = index.classes.map((name, i) => {
    const dot = element("i");
    dot.style.background = `var(--c${i})`;
    const chip = element("button", { type: "button", "aria-pressed": "true" }, dot, name, span("count"));
    chip.addEventListener("click", () => show(i, !classes[i]));
    return chip;
  });
  const both = [["all", true], ["none", false]].map(([text, on]) => {
    const button = element("button", { type: "button", "aria-label": `Show ${text} of the classes` }, text);
    button.addEventListener("click", () => chips.forEach((_, i) => show(i, on)));
    return button;
  });
  const about = { className: "classes", role: "group", "aria-label": "Classes of points" };
  return { group: element("div", about, ...chips, element("div", { className: "both" }, ...both)), chips };
}

function legendLine([style, text, number]) {
  if (!style) return element("p", { className: "note" }, text);
  return element("p", {}, strokeOf(STYLES[style]), text, span("count", number));
}

function strokeOf({ width, dash, color, alpha }) {
  const line = drawing("line", {
    x1: 3, x2: 19, y1: 4, y2: 4, "stroke-width": Math.min(width, 5), "stroke-linecap": "round",
    "stroke-opacity": alpha, "stroke-dasharray": dash ? "3 6" : "none",
  });
  line.style.stroke = `var(--${color})`;
  return drawing("svg", { width: 22, height: 8, "aria-hidden": "true" }, line);
}
