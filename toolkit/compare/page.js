"use strict";
// Shows the comparison that stands in the page as JSON. Texts go into the page as text, never as HTML.

const holder = document.getElementById("data");
const data = JSON.parse(holder.textContent);
holder.remove(); // in blind mode the page itself then holds no name
const byId = (id) => document.getElementById(id);
const names = data.names;
const key = "votes " + data.recipe + " " + data.id;

let blind = false;
let here = 0; // index of the prompt that the keyboard votes on
const cards = [];
const orders = data.rows.map(() => shuffled(names.length)); // another one at each load
const votes = readVotes(); // prompt -> index of the model that won, "tie" or "skip"

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function shuffled(length) {
  const order = [...Array(length).keys()];
  for (let last = length - 1; last > 0; last--) {
    const other = Math.floor((crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32) * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

// Votes ------------------------------------------------------------------------------------------------------

function readVotes() {
  try {
    return new Map(JSON.parse(localStorage.getItem(key) || "[]"));
  } catch {
    return new Map();
  }
}

function keepVotes() {
  try {
    localStorage.setItem(key, JSON.stringify([...votes]));
  } catch {
    byId("note").textContent = "This browser keeps no votes for this page: download them before you close it.";
  }
}

function vote(row, value) {
  if (votes.get(row) === value) votes.delete(row);
  else votes.set(row, value);
  keepVotes();
  drawCard(row);
  drawProgress();
  if (!blind) drawMeasures();
}

function pairs() {
  const text = (row, model) => data.rows[row].words[model].join("");
  const found = [];
  for (const [row, winner] of votes) {
    if (typeof winner !== "number") continue;
    for (let loser = 0; loser < names.length; loser++) {
      const [chosen, rejected] = [text(row, winner), text(row, loser)];
      if (chosen === rejected || !chosen || !rejected) continue; // nothing to learn from such a pair
      found.push({
        prompt: data.rows[row].turns,
        chosen: [{ role: "assistant", content: chosen }],
        rejected: [{ role: "assistant", content: rejected }],
        chosen_model: names[winner],
        rejected_model: names[loser],
      });
    }
  }
  return found;
}

function download() {
  const lines = pairs().map((pair) => JSON.stringify(pair) + "\n");
  const url = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  make("a", { href: url, download: data.recipe + "-votes.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// What is shown ----------------------------------------------------------------------------------------------

function order(row) {
  return blind ? orders[row] : names.map((_, model) => model);
}

function label(row, column) {
  return blind ? String.fromCharCode(65 + column) : names[order(row)[column]];
}

function drawHeader() {
  const title = blind ? `${names.length} models, names hidden` : names.join(" / ");
  const about = blind ? [] : [make("p", { className: "about" }, data.description)];
  byId("header").replaceChildren(make("h1", {}, `${data.recipe}: ${title}`), ...about);
}

function drawMeasures() {
  if (blind) return byId("measures").replaceChildren();
  const count = (value) => [...votes.values()].filter((vote) => vote === value).length;
  const won = votes.size ? [["votes won", ...names.map((_, model) => String(count(model)))]] : [];
  const row = (cells) => make("tr", {}, ...cells.map((cell, at) => make(at ? "td" : "th", {}, cell)));
  const head = make("tr", {}, ...["", ...names].map((name) => make("th", { scope: "col" }, name)));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...[...won, ...data.measures].map(row)));
  const open = byId("measures").firstElementChild?.open ?? true;
  byId("measures").replaceChildren(make("details", { open }, make("summary", {}, "measures"), table));
}

function drawAgainst() {
  const chosen = byId("against").value || "left";
  const options = [["", "mark no differences"], ["left", "differences from the left column"]];
  if (!blind) options.push(...names.map((name, model) => [String(model), `differences from ${name}`]));
  byId("against").replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  byId("against").value = options.some(([value]) => value === chosen) ? chosen : "left";
}

function answerText(row, model) {
  const against = byId("against").value;
  const other = against === "left" ? order(row)[0] : Number(against);
  const words = data.rows[row].words[model];
  const parts = [];
  let at = 0;
  for (const [start, end] of against === "" ? [] : data.rows[row].marks[model][other]) {
    const marked = words.slice(start, end).join("");
    const text = marked.trimEnd();
    parts.push(words.slice(at, start).join(""), make("mark", {}, text), marked.slice(text.length));
    at = end;
  }
  parts.push(words.slice(at).join(""));
  return words.length ? parts : [make("span", { className: "about" }, "(empty)")];
}

function button(row, value, text, title) {
  const pressed = votes.get(row) === value;
  const element = make("button", { type: "button", onclick: () => vote(row, value) }, text);
  element.setAttribute("aria-pressed", pressed);
  element.setAttribute("aria-label", title);
  return element;
}

function answerCard(row, column) {
  const model = order(row)[column];
  const { ended, tokens } = data.rows[row];
  const size = make("span", {}, `${tokens[model]} tokens`);
  const text = (at) => data.rows[row].words[order(row)[at]].join("");
  const twin = names.findIndex((_, at) => at < column && text(at) === text(column));
  if (twin >= 0) size.prepend(`same as ${label(row, twin)}, `);
  if (!ended[model]) size.append(make("span", { className: "cut" }, ", did not end"));
  const title = `${label(row, column)} is better for prompt ${row + 1}`;
  return make(
    "section",
    { className: votes.get(row) === model ? "answer won" : "answer" },
    make("h3", {}, label(row, column), size),
    make("div", { className: "text" }, ...answerText(row, model)),
    make("div", {}, button(row, model, `${column + 1} \u00b7 this one is better`, title)),
  );
}

function drawCard(row) {
  const { turns } = data.rows[row];
  const turn = ({ role, content }) => {
    const speaker = turns.length > 1 ? [make("span", { className: "role" }, role)] : [];
    return make("div", { className: "turn" }, ...speaker, content);
  };
  const answers = make("div", { className: "answers" }, ...names.map((_, column) => answerCard(row, column)));
  answers.style.setProperty("--columns", Math.min(names.length, 4));
  const number = String(row + 1);
  const others = make(
    "div",
    { className: "votes" },
    button(row, "tie", "tie", `tie for prompt ${number}`),
    button(row, "skip", "skip", `skip prompt ${number}`),
  );
  const held = cards[row].contains(document.activeElement) && document.activeElement.ariaLabel;
  cards[row].replaceChildren(make("div", {}, ...turns.map(turn)), answers, ...(names.length > 1 ? [others] : []));
  if (held) [...cards[row].querySelectorAll("button")].find((found) => found.ariaLabel === held)?.focus();
}

function drawProgress() {
  const usable = pairs().length;
  byId("progress").textContent = `${votes.size} of ${data.rows.length} voted on, ${usable} pairs`;
  byId("download").disabled = !usable;
}

function applyFilter() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("filter").value;
  data.rows.forEach((row, index) => {
    const texts = row.words.map((words) => words.join(""));
    const all = [...row.turns.map((turn) => turn.content), ...texts].join("\n").toLowerCase();
    const fits = {
      all: true,
      differ: new Set(texts).size > 1,
      open: !votes.has(index),
      voted: votes.has(index),
      cut: row.ended.includes(false),
    }[kind];
    cards[index].hidden = !(fits && wanted.every((word) => all.includes(word)));
  });
  const shown = cards.filter((card) => !card.hidden).length;
  byId("note").textContent = shown < cards.length ? `${shown} of ${cards.length} prompts shown` : "";
  if (shown && cards[here].hidden) go(cards.findIndex((card) => !card.hidden), false);
}

function draw() {
  byId("blind").setAttribute("aria-pressed", blind);
  drawHeader();
  drawMeasures();
  drawAgainst();
  cards.forEach((_, row) => drawCard(row));
  drawProgress();
}

// Keyboard ---------------------------------------------------------------------------------------------------

function go(row, scroll = true) {
  cards[here].classList.remove("here");
  here = row;
  cards[here].classList.add("here");
  if (scroll) {
    cards[here].scrollIntoView({ block: "nearest" });
    cards[here].focus({ preventScroll: true });
  }
}

function step(by) {
  let row = here + by;
  while (cards[row]?.hidden) row += by;
  if (cards[row]) go(row);
}

function setBlind(value) {
  blind = value;
  draw();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const column = Number(event.key) - 1;
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "b") setBlind(!blind);
  else if (event.key === "t") vote(here, "tie");
  else if (event.key === "s") vote(here, "skip");
  else if (event.key === "/") byId("search").focus();
  else if (column >= 0 && column < names.length) vote(here, order(here)[column]);
  else return;
  event.preventDefault();
});

data.rows.forEach((_, row) => {
  const card = make("article", { tabIndex: -1, onclick: () => go(row, false) });
  card.setAttribute("aria-label", `prompt ${row + 1}`);
  cards.push(card);
});
byId("rows").append(...cards);
byId("blind").onclick = () => setBlind(!blind);
byId("search").oninput = applyFilter;
byId("filter").onchange = applyFilter;
byId("against").onchange = () => cards.forEach((_, row) => drawCard(row));
byId("download").onclick = download;
draw();
go(0, false);
