// What the parts of the page share. Texts of scenes go in as text alone.

const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("index").textContent);

function element(tag, values = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(values)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawing(tag, values, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const span = (className, ...children) => element("span", { className }, ...children);
const fixed = (value) => value.toFixed(3);
const plain = (count) => count.toLocaleString("en");
const counted = (count, what) => `${plain(count)} ${what}${count === 1 ? "" : "s"}`;
