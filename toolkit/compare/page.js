"use strict";
// Shows the comparison that stands in the page as JSON. Texts go into the page as text, never as HTML. votes.js is part
// of the same script.

const holder = document.getElementById("data");
const data = JSON.parse(holder.textContent);
holder.remove(); // in blind mode the page itself then holds no name
const byId = (id) => document.getElementById(id);
const names = data.names;
const key = "votes " + data.recipe + " " + data.id;
const MOST_MARKED = 2 / 3; // of an answer's words: where nearly all differs, marks say nothing
const asksQuestions = data.rows.some((row) => row.expected);
const numPrompts = data.rows.filter((row) => !row.expected).length; // questions are held out: no votes, no training

let blind = false;
let here = 0; // index of the row that the keyboard votes on
const cards = [];
const orders = data.rows.map(() => shuffled(names.length)); // another one at each load
const cast = readVotes(); // all votes in their order: [row, index of the model that won, "tie", "skip" or null]

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
  const all = [...votes().values()];
  const count = (value) => all.filter((vote) => vote === value).length;
  const won = all.length ? [["votes won", ...names.map((_, model) => String(count(model)))]] : [];
  const row = ([label, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, label), ...cells.map((cell) => make("td", {}, cell)));
  const head = make("tr", {}, ...["", ...names].map((name) => make("th", { scope: "col" }, name)));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...[...won, ...data.measures].map(row)));
  const open = byId("measures").firstElementChild?.open ?? true;
  const wide = make("div", { className: "wide" }, table);
  byId("measures").replaceChildren(make("details", { open }, make("summary", {}, "measures"), wide));
}

function drawChoice(id, fallback, options) {
  const chosen = byId(id).value || fallback;
  byId(id).replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  byId(id).value = options.some(([value]) => value === chosen) ? chosen : fallback;
}

function drawChoices() {
  const byName = (text) => (blind ? [] : names.map((name, model) => [String(model), `${text} ${name}`]));
  const before = `differences from the ${blind ? "column" : "model"} before`;
  drawChoice("against", "before", [["none", "mark no differences"], ["before", before], ...byName("differences from")]);
  const wrong = asksQuestions ? [["wrong", "a wrong answer"], ...byName("wrong answer of")] : [];
  drawChoice("filter", "all", [["all", "all"], ["differ", "answers differ"], ["open", "not voted on"],
    ["voted", "voted on"], ["cut", "an answer did not end"], ...wrong]);
}

// Ranges of words that differ from the answer they are held against, and whether those are nearly all there are.
function differences(row, column) {
  const against = byId("against").value;
  const model = order(row)[column];
  const other = against === "before" ? order(row)[column - 1] : Number(against);
  const { words, marks } = data.rows[row];
  const ranges = against === "none" ? [] : (marks[model][other] ?? []);
  const num = ranges.reduce((sum, [start, end]) => sum + end - start, 0);
  const isNew = num > MOST_MARKED * words[model].length && other !== model;
  return isNew ? [[], other] : [ranges, null];
}

function answerText(row, column, ranges) {
  const model = order(row)[column];
  const words = data.rows[row].words[model];
  if (!words.length) return [make("span", { className: "about" }, "(empty)")];
  const kinds = words.map(() => "");
  for (const [start, end] of ranges) kinds.fill("other", start, end);
  for (const [start, end] of data.rows[row].found?.[model] ?? []) kinds.fill("expected", start, end);
  const parts = [];
  for (let start = 0, end; start < words.length; start = end) {
    for (end = start + 1; kinds[end] === kinds[start]; end++);
    const text = words.slice(start, end).join("");
    const bare = text.trimEnd();
    parts.push(kinds[start] ? make("mark", { className: kinds[start] }, bare) : bare, text.slice(bare.length));
  }
  return parts;
}

function button(row, value, text, title) {
  const pressed = votes().get(row) === value;
  const element = make("button", { type: "button", onclick: () => vote(row, value) }, text);
  element.setAttribute("aria-pressed", pressed);
  element.setAttribute("aria-label", title);
  return element;
}

function answerCard(row, column) {
  const model = order(row)[column];
  const { ended, tokens, correct } = data.rows[row];
  const [ranges, replaced] = differences(row, column);
  const size = make("span", {}, `${tokens[model]} token${tokens[model] === 1 ? "" : "s"}`);
  const text = (at) => data.rows[row].words[order(row)[at]].join("");
  const twin = names.findIndex((_, at) => at < column && text(at) === text(column));
  if (twin >= 0) size.prepend(`same as ${label(row, twin)}, `);
  if (replaced !== null && twin < 0) {
    const at = order(row).indexOf(replaced);
    size.prepend(make("span", { title: "so no differences are marked" }, `mostly other words than ${label(row, at)}, `));
  }
  if (correct) {
    const right = correct[model];
    size.prepend(make("b", { className: right ? "right" : "wrong" }, right ? "right" : "wrong"), ", ");
  }
  if (!ended[model]) size.append(make("span", { className: "cut" }, ", did not end"));
  const title = `${label(row, column)} is better for prompt ${row + 1}`;
  return make(
    "section",
    { className: votes().get(row) === model ? "answer won" : "answer" },
    make("h3", {}, label(row, column), size),
    make("div", { className: "text" }, ...answerText(row, column, ranges)),
    ...(correct ? [] : [make("div", {}, button(row, model, `${column + 1} \u00b7 this one is better`, title))]),
  );
}

function drawCard(row) {
  const { turns, expected } = data.rows[row];
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
  const asked = make("div", {}, ...turns.map(turn));
  const due = expected ? [make("div", { className: "about" }, "expected: ", make("b", {}, expected.join(" or ")))] : [];
  const canVote = !expected && names.length > 1;
  cards[row].replaceChildren(asked, ...due, answers, ...(canVote ? [others] : []));
  if (held) [...cards[row].querySelectorAll("button")].find((found) => found.ariaLabel === held)?.focus();
}

function drawProgress() {
  const usable = pairs().length;
  byId("progress").textContent = `${votes().size} of ${numPrompts} voted on, ${usable} pair${usable === 1 ? "" : "s"}`;
  byId("download").disabled = !usable;
  byId("undo").disabled = !cast.length;
}

function applyFilter() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("filter").value;
  const voted = votes();
  data.rows.forEach((row, index) => {
    const texts = row.words.map((words) => words.join(""));
    const all = [...row.turns.map((turn) => turn.content), ...texts].join("\n").toLowerCase();
    const fits = {
      all: true,
      differ: new Set(texts).size > 1,
      open: !row.expected && !voted.has(index),
      voted: voted.has(index),
      cut: row.ended.includes(false),
      wrong: row.correct?.includes(false),
    }[kind] ?? row.correct?.[Number(kind)] === false;
    cards[index].hidden = !(fits && wanted.every((word) => all.includes(word)));
  });
  const shown = cards.filter((card) => !card.hidden).length;
  const each = asksQuestions ? "prompts and questions" : "prompts";
  byId("note").textContent = shown < cards.length ? `${shown} of ${cards.length} ${each} shown` : "";
  for (const part of document.querySelectorAll("main section.part"))
    part.hidden = ![...part.querySelectorAll("article")].some((card) => !card.hidden);
  if (shown && cards[here].hidden) go(cards.findIndex((card) => !card.hidden), false);
}

function draw() {
  byId("blind").setAttribute("aria-pressed", blind);
  drawHeader();
  drawMeasures();
  drawChoices();
  cards.forEach((_, row) => drawCard(row));
  drawProgress();
  applyFilter();
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
  else if (event.key === "u") undo();
  else if (event.key === "/") byId("search").focus();
  else if (column >= 0 && column < names.length) vote(here, order(here)[column]);
  else return;
  event.preventDefault();
});

data.rows.forEach((_, row) => {
  const card = make("article", { tabIndex: -1, onclick: (event) => event.target.closest("button") || go(row, false) });
  card.setAttribute("aria-label", row < numPrompts ? `prompt ${row + 1}` : `question ${row + 1 - numPrompts}`);
  cards.push(card);
});
byId("prompts").append(...cards.slice(0, numPrompts));
byId("questions")?.append(...cards.slice(numPrompts));
byId("undo").onclick = undo;
byId("blind").onclick = () => setBlind(!blind);
byId("search").oninput = applyFilter;
byId("filter").onchange = applyFilter;
byId("against").onchange = () => cards.forEach((_, row) => drawCard(row));
byId("download").onclick = download;
draw();
const voted = votes();
const open = nextPrompt(-1, (row) => !voted.has(row)) ?? 0;
go(open, open > 0); // on with the votes of an earlier visit
