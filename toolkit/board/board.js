"use strict";
// The board. What it shows is asked of the server again and again; what is chosen stands in the address, so that a page
// that is opened again, or a server that is started again, shows the same. Texts go into the page as text.

const EVERY_MS = 2000;
const byId = (id) => document.getElementById(id);
const TABS = ["curves", "differences", "answers", "details"];

let rows = [];
let listed = ""; // the list as it was last told: drawn again only where it changed
let shape = ""; // of the figures that are drawn
let views = []; // Bokeh's, of these figures
let steps = null; // their range of steps as we set it: another one is the reader's own
let bokeh = null; // its script, once it is loaded

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// What is chosen ---------------------------------------------------------------------------------------------

const state = read();

function read() {
  const said = new URLSearchParams(location.hash.slice(1));
  const tab = said.get("tab");
  return { runs: said.getAll("run"), tab: TABS.includes(tab) ? tab : TABS[0], here: said.get("here") };
}

function keep() {
  const said = new URLSearchParams();
  for (const run of state.runs) said.append("run", run);
  said.set("tab", state.tab);
  if (state.here) said.set("here", state.here);
  history.replaceState(null, "", "#" + said);
}

function here() {
  return state.runs.includes(state.here) ? state.here : state.runs.at(-1);
}

function query() {
  return state.runs.map((run) => "run=" + encodeURIComponent(run)).join("&");
}

function choose(run, isOn) {
  state.runs = state.runs.filter((other) => other !== run);
  if (isOn) state.runs.push(run);
  if (isOn) state.here = run;
  changed();
}

function changed() {
  keep();
  drawChosen();
  drawList();
  look();
}

// Asking -----------------------------------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path);
  if (answer.ok) return answer.json();
  throw new Error(await answer.text());
}

let looking = false;
let again = false;

async function look() {
  if (looking) return void (again = true);
  looking = true;
  do {
    again = false;
    try {
      await drawAll();
      say("");
    } catch (error) {
      say(error instanceof TypeError ? "no answer from run_board.py: it is asked again" : error.message, true);
    }
  } while (again);
  looking = false;
}

function say(text, isLost = false) {
  const running = rows.filter((row) => row.outcome === "running").length;
  byId("state").textContent = text || `${rows.length} run${rows.length === 1 ? "" : "s"}, ${running} running`;
  byId("state").className = isLost ? "lost" : "";
}

async function drawAll() {
  const told = await (await fetch("api/runs")).text();
  if (told !== listed) {
    rows = JSON.parse(told);
    listed = told;
    drawList();
    say("");
  }
  byId("hint").hidden = state.runs.length > 0;
  for (const tab of TABS) byId(tab).hidden = tab !== state.tab || !state.runs.length;
  for (const button of document.querySelectorAll("[data-tab]"))
    button.setAttribute("aria-selected", button.dataset.tab === state.tab);
  if (state.runs.length) await { curves, differences, answers, details }[state.tab]();
}

// The list ---------------------------------------------------------------------------------------------------

const HEADS = ["", "run", "outcome", "when (UTC)", "steps", "last", "held out", "time", "size", "from"];

function drawList() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = rows.filter((row) => words.every((word) => row.cells.join(" ").toLowerCase().includes(word)));
  const [head, body] = byId("list").querySelectorAll("thead, tbody");
  if (!head.children.length)
    head.append(make("tr", {}, ...HEADS.map((text) => make("th", { scope: "col", textContent: text }))));
  body.replaceChildren(...shown.map(drawRow));
}

function drawRow(row) {
  const place = state.runs.indexOf(row.name);
  const box = make("input", { type: "checkbox", checked: place >= 0, ariaLabel: row.name });
  const line = make("tr", { className: `${row.outcome} ${place >= 0 ? "on" : ""}` }, make("td", {}, box));
  row.cells.forEach((text, column) => {
    const dot = column === 1 ? [make("span", { className: "dot" })] : [];
    line.append(make("td", {}, ...dot, text));
  });
  if (place >= 0) line.style.setProperty("--colour", colour(place));
  line.onclick = () => choose(row.name, place < 0);
  return line;
}

function colour(place) {
  return state.runs.length === 1 ? "var(--curve-1)" : `var(--run-${place + 1})`;
}

function drawChosen() {
  byId("chosen").replaceChildren(
    ...state.runs.map((run, place) => {
      const show = make("button", { textContent: run, title: "its details and log" });
      const drop = make("button", { textContent: "×", ariaLabel: `without ${run}` });
      show.onclick = () => ((state.here = run), (state.tab = "details"), changed());
      drop.onclick = () => choose(run, false);
      const chip = make("span", { className: run === here() ? "here" : "" }, show, drop);
      chip.style.setProperty("--colour", colour(place));
      return chip;
    }),
  );
}

// Curves -----------------------------------------------------------------------------------------------------

function load(script, later = false) {
  return new Promise((done, failed) => {
    const element = make("script", { src: script, onload: done, onerror: failed });
    if (later) element.dataset.later = "true";
    document.head.append(element);
  });
}

async function curves() {
  if (!shape) clear("The figures are being drawn.");
  bokeh ??= load("bokeh.js").then(() => load("figures.js", true));
  const told = await ask(`api/curves?${query()}&shape=${shape}`);
  await bokeh;
  if (told.documents) await embed(told);
  if (told.shape) grow(told.columns);
  else clear("No step was logged yet.");
  follow(told.steps);
}

function models() {
  return Bokeh.documents.flatMap((made) => [...made.all_models]);
}

function clear(text = "") {
  for (const view of views) view.clear();
  if (globalThis.Bokeh) Bokeh.documents.length = 0;
  [views, shape, steps] = [[], "", null];
  byId("curves").replaceChildren(make("p", { className: "quiet", textContent: text, hidden: !text }));
}

async function embed(told) {
  clear();
  const sections = told.titles.map(({ title, about }, place) =>
    make(
      "section",
      {},
      make("h3", { textContent: title }),
      make("p", { className: "quiet", textContent: about || "\u00a0" }),
      make("div", { id: told.ids[place] }),
    ),
  );
  byId("curves").replaceChildren(make("div", { className: "charts" }, ...sections));
  views = await Bokeh.embed.embed_items(told.documents, told.items);
  shape = told.shape;
  paintFigures();
}

function grow(columns) {
  for (const model of models()) {
    const held = model.type === "ColumnDataSource" && columns[model.name];
    if (held && held.step.length && changedSince(model.data, held))
      model.data = { step: held.step, value: held.value.map((value) => value ?? NaN) };
  }
}

function changedSince(data, held) {
  const last = held.step.length - 1;
  return data.step.length !== held.step.length || data.step[last] !== held.step[last];
}

// The figures follow a run that goes on, unless the reader has zoomed.
function follow(told) {
  if (!told || !views.length) return;
  const range = models().find((model) => model.name === "steps");
  if (steps && (range.start !== steps[0] || range.end !== steps[1])) return;
  steps = told;
  range.setv({ start: told[0], end: told[1], reset_start: told[0], reset_end: told[1] });
}

// The other tabs ---------------------------------------------------------------------------------------------

function table(head, lines) {
  const row = (tag, cells) => make("tr", {}, ...cells.map((text) => make(tag, { textContent: text })));
  return make(
    "div",
    { className: "wide" },
    make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...lines.map((line) => row("td", line)))),
  );
}

let shown = {}; // what each tab shows: drawn again only where that changed

function isShown(tab, what) {
  const before = shown[tab];
  shown[tab] = what;
  return before === what;
}

async function differences() {
  if (state.runs.length < 2) return draw("differences", make("p", { className: "quiet" }, "Choose two runs or more."));
  const found = await ask(`api/differences?${query()}`);
  if (isShown("differences", JSON.stringify([state.runs, found]))) return;
  const lines = found.map(([what, values]) => [what, ...values]);
  draw("differences", lines.length ? table(["", ...state.runs], lines) : make("p", {}, "Nothing: they are the same."));
}

async function answers() {
  if (isShown("answers", query())) return;
  const frame = make("iframe", { src: `answers?${query()}`, title: "answers side by side" });
  draw("answers", frame);
}

async function details() {
  const told = await ask(`api/run?run=${encodeURIComponent(here())}`);
  if (isShown("details", JSON.stringify(told))) return;
  const log = byId("details").querySelector(".log");
  const isAtEnd = !log || log.scrollTop + log.clientHeight > log.scrollHeight - 40;
  const head = make("div", { innerHTML: told.html }); // made and escaped by the toolkit's own report
  const link = told.report ? [make("a", { href: `files/${told.report}`, target: "_blank" }, "its report")] : [];
  const text = make("pre", { className: "log", textContent: told.log, tabIndex: 0 });
  draw("details", head, make("p", {}, ...link), make("h2", {}, "The end of log.txt"), text);
  if (isAtEnd) text.scrollTop = text.scrollHeight;
  else text.scrollTop = log.scrollTop;
}

function draw(tab, ...parts) {
  byId(tab).replaceChildren(...parts);
}

// ------------------------------------------------------------------------------------------------------------

byId("filter").oninput = drawList;
byId("tabs").onclick = ({ target }) => {
  if (!target.dataset.tab) return;
  state.tab = target.dataset.tab;
  changed();
};
addEventListener("hashchange", () => (Object.assign(state, read()), changed()));
setInterval(() => document.hidden || look(), EVERY_MS);
document.addEventListener("visibilitychange", () => document.hidden || look());
changed();
