// The scenes beside the picture: their scores as a whole, and the list to pick from.

const SCORES = ["HSS", "F1", "IoU"];
const HSS_BARS = 20;
// Below this a score is drawn as a bad one.
const LOW = 0.3;

const scored = index.scenes.filter((entry) => entry.score);
const barOf = (entry) => Math.min(HSS_BARS - 1, Math.floor(entry.score[0] * HSS_BARS));

function fillHeader() {
  byId("source").textContent = index.source;
  byId("about").textContent = [counted(index.scenes.length, "scene"), ...index.about].join(" · ");
  if (!scored.length) return;
  byId("mean").hidden = byId("spread").hidden = false;
  SCORES.forEach((name, i) => {
    const mean = scored.reduce((sum, entry) => sum + entry.score[i], 0) / scored.length;
    const title = `Mean of ${counted(scored.length, "scored scene")}`;
    const tile = [element("strong", {}, fixed(mean)), element("span", {}, i ? name : `mean ${name}`)];
    byId("mean").append(element("div", { title }, ...tile));
  });
  const heights = new Array(HSS_BARS).fill(0);
  for (const entry of scored) heights[barOf(entry)]++;
  const most = Math.max(...heights);
  heights.forEach((count, i) => {
    const [from, to] = [i, i + 1].map((at) => (at / HSS_BARS).toFixed(2));
    const bar = element("i", { title: `HSS ${from} to ${to}: ${counted(count, "scene")}` });
    bar.style.height = `${count ? Math.max(6, (100 * count) / most) : 0}%`;
    byId("bars").append(bar);
  });
  byId("bars").setAttribute("aria-label", `How the HSS of ${counted(scored.length, "scene")} spreads from 0 to 1`);
}

const RULES = {
  // The page's own order is worst first; scenes without a score come last either way.
  worst: (a, b) => a.rank - b.rank,
  best: (a, b) => !a.score - !b.score || (a.score ? b.score[0] - a.score[0] : 0) || a.rank - b.rank,
  source: (a, b) => a.at - b.at,
  name: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : a.at - b.at),
};

function rowOf(entry) {
  const value = entry.score ? fixed(entry.score[0]) : "–";
  const meter = span("meter");
  if (entry.score) {
    const bar = element("i");
    bar.style.width = `${100 * entry.score[0]}%`;
    meter.classList.toggle("low", entry.score[0] < LOW);
    meter.append(bar);
  } else {
    meter.style.visibility = "hidden";
  }
  // Where an id is too long its middle goes: ids differ at their ends.
  const id = span("id", element("span", {}, entry.id.slice(0, -9)), entry.id.slice(-9));
  const label = `${entry.id}, ${entry.score ? `HSS ${value}` : "not scored"}`;
  const values = { type: "button", title: entry.id, "aria-label": label };
  const button = element("button", values, id, meter, span("value", value));
  button.addEventListener("click", () => {
    byId("side").classList.remove("open");
    pick(entry);
  });
  return { item: element("li", {}, button), button };
}

// The entries that are listed, in the order of the list.
function fillList() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const entries = index.scenes.filter((entry) => entry.id.toLowerCase().includes(wanted));
  entries.sort(RULES[byId("order").value]);
  for (const entry of entries) entry.row ??= rowOf(entry);
  byId("scenes").replaceChildren(...entries.map((entry) => entry.row.item));
  byId("nothing").hidden = entries.length > 0;
  return entries;
}

function mark(entry, before) {
  before?.row?.button.removeAttribute("aria-current");
  entry.row ??= rowOf(entry);
  entry.row.button.setAttribute("aria-current", "true");
  entry.row.item.scrollIntoView({ block: "nearest" });
  const here = entry.score ? barOf(entry) : -1;
  [...byId("bars").children].forEach((bar, i) => bar.classList.toggle("here", i === here));
}

function scoreLine(entry) {
  const parts = entry.score
    ? SCORES.map((name, i) => element("span", {}, `${name} `, element("b", {}, fixed(entry.score[i]))))
    : [element("span", {}, "not scored")];
  return entry.note ? [...parts, span("why", entry.note)] : parts;
}
