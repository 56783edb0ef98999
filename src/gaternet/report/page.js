// Draws the figures of a report and answers the mouse. `report` is the page's data: figures, sprite, images, gates.
"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const touch = window.matchMedia("(hover: none)").matches;
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: touch ? false : "hover", // without a mouse it would always be there, over the legends
  modeBarButtonsToRemove: ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d"], // a page must send nothing
};

function theme() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return { font: { color: ink, family: "system-ui, sans-serif" }, axis };
}

function themed(layout) {
  const { font, axis } = theme(), dragmode = touch ? false : layout.dragmode; // fingers scroll the page
  return { ...layout, font, dragmode, xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis } };
}

const drawn = {};
function draw(id, figure) {
  const place = document.getElementById(id);
  if (!place) return;
  drawn[id] = figure;
  Plotly.react(place, figure.data, themed(figure.layout), config);
}

function thumb(place, side) {
  // An element that shows one image out of the sprite, as large as `side` in pixels.
  const element = document.createElement("div"), slot = report.sprite.slots[place];
  element.className = "thumb";
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words(place).join(", "));
  if (slot === undefined) return element;
  const { columns, rows, tile } = report.sprite;
  element.style.width = element.style.height = side + "px";
  element.style.backgroundImage = `url(${document.getElementById("sprite").src})`;
  element.style.backgroundSize = `${columns * side}px ${rows * side}px`;
  element.style.backgroundPosition = `-${(slot % columns) * side}px -${Math.floor(slot / columns) * side}px`;
  if (side >= 2 * tile) element.style.imageRendering = "pixelated";
  return element;
}

function words(place) {
  const image = report.images[place];
  if (!image) return [`image ${place}`];
  const [label, prediction, open, macs] = image, names = report.classes;
  const first = label < 0 ? `predicted ${names[prediction]}` : names[label];
  const second = label >= 0 && label !== prediction ? [`predicted ${names[prediction]}`] : [];
  return [first, ...second, `${open} gates open`, `${(macs / 1e6).toFixed(macs < 1e7 ? 2 : 1)} MMACs`];
}

function strip(id, places) {
  const element = document.getElementById(id);
  if (!element) return;
  element.replaceChildren(...places.filter((place) => place >= 0).map((place) => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.innerText = words(place).join("\n");
    figure.append(thumb(place, 64), caption);
    return figure;
  }));
}

function listenToMap() {
  const map = document.getElementById("map"), tip = document.getElementById("tip");
  if (!map) return;
  const show = (event) => {
    const place = event.points[0].customdata, mouse = event.event;
    const text = document.createElement("div");
    text.innerText = words(place).join("\n");
    tip.replaceChildren(thumb(place, 96), text);
    tip.style.display = "block";
    const left = Math.min(mouse.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    const top = Math.min(mouse.clientY + 14, window.innerHeight - tip.offsetHeight - 8);
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = Math.max(0, top) + "px";
  };
  map.on("plotly_hover", show);
  map.on("plotly_click", show);
  map.on("plotly_unhover", () => { tip.style.display = "none"; });
}

function showGate(number) {
  const gate = report.gates[number];
  document.getElementById("gate").value = number;
  document.getElementById("gate-facts").textContent =
    `Gate ${gate.gate} of ${gate.conv}: open for ${(100 * gate.rate).toFixed(1)} % of the images; tells ` +
    `${gate.bits.toFixed(4)} bits about the class (at most ${gate.chance.toFixed(4)} in 20 shuffles); ` +
    `selectivity ${gate.selectivity.toFixed(2)}.`;
  document.getElementById("gate-forced").textContent = gate.forced;
  strip("gate-surest", gate.surest);
  strip("gate-least", gate.least);
  const figure = report.gateFigure, bar = { ...figure.data[0], y: gate.classRates };
  draw("gate-classes", { data: [bar], layout: figure.layout });
}

function listenToGates() {
  const select = document.getElementById("gate");
  if (!select) return;
  const step = (by) => showGate((Number(select.value) + by + report.gates.length) % report.gates.length);
  select.addEventListener("change", () => showGate(Number(select.value)));
  document.getElementById("gate-before").addEventListener("click", () => step(-1));
  document.getElementById("gate-next").addEventListener("click", () => step(1));
  showGate(0);
}

function drawInTurns(figures) {
  // One figure after another, so that the page can be read and scrolled meanwhile.
  if (!figures.length) {
    document.documentElement.dataset.drawn = "yes";
    return;
  }
  const [id, figure] = figures[0];
  draw(id, figure);
  if (id === "map") listenToMap();
  setTimeout(() => drawInTurns(figures.slice(1)));
}

for (const [id, figure] of Object.entries(report.figures)) {
  const place = document.getElementById(id);
  if (place) place.style.height = figure.layout.height + "px";
}
for (const [id, places] of Object.entries(report.strips)) strip(id, places);
listenToGates();
setTimeout(() => drawInTurns(Object.entries(report.figures)));
dark.addEventListener("change", () => {
  for (const [id, figure] of Object.entries(drawn)) Plotly.relayout(id, themed(figure.layout));
});
document.documentElement.dataset.ready = "yes";
