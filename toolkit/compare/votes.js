// Votes of the comparison page: kept in the browser, taken back one by one, downloaded as pairs to train on.

function readVotes() {
  if (data.cast) return data.cast; // a server keeps them
  try {
    const kept = JSON.parse(localStorage.getItem(key) || "[]");
    return kept.filter(([row]) => row in data.rows);
  } catch {
    return [];
  }
}

let sent = Promise.resolve(); // one after the other: the last one is what stays

function send() {
  const headers = { "Content-Type": "application/json", "X-Votes": data.id };
  const body = JSON.stringify(cast);
  sent = sent
    .then(() => fetch(location.href, { method: "POST", headers, body }))
    .then((answer) => (answer.ok ? answer.text() : Promise.reject(answer.statusText)))
    .then((said) => (byId("note").textContent = said))
    .catch((error) => (byId("note").textContent = `This vote is not on disk (${error}): vote again to try again.`));
}

function keepVotes(row) {
  if (data.cast) send();
  else keepHere();
  drawCard(row);
  drawProgress();
  if (!blind) drawMeasures();
}

function keepHere() {
  try {
    localStorage.setItem(key, JSON.stringify(cast));
  } catch {
    byId("note").textContent = "This browser keeps no votes for this page: download them before you close it.";
  }
}

// row -> what holds now
function votes() {
  const found = new Map();
  for (const [row, value] of cast) {
    if (value === null) found.delete(row);
    else found.set(row, value);
  }
  return found;
}

function vote(row, value) {
  if (data.rows[row].expected) return;
  const taken = votes().get(row) === value;
  cast.push([row, taken ? null : value]);
  keepVotes(row);
  if (!taken) go(nextPrompt(row, (at) => !cards[at].hidden) ?? row);
}

function nextPrompt(row, fits) {
  for (let at = row + 1; at < numPrompts; at++) if (fits(at)) return at;
}

function undo() {
  if (!cast.length) return;
  const [row] = cast.pop();
  keepVotes(row);
  cards[row].hidden = false;
  go(row);
}

function pairs() {
  const text = (row, model) => data.rows[row].words[model].join("");
  const found = [];
  for (const [row, winner] of votes()) {
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
