// The page: pick a dictionary, read a text, look at a token's features, at one feature over the text, and steer by it.
"use strict";

const at = (id) => document.getElementById(id);
const TOP = 20;
const SHADES = 5;
let entries = [];
let reading = null; // the last answer of /v1/features, for one dictionary
let chosen = null; // the feature that is shown

function tell(problem) {
  at("problem").textContent = problem ?? "";
  at("problem").hidden = !problem;
}

async function ask(path, body) {
  const headers = {};
  if (at("token").value) headers.Authorization = `Bearer ${at("token").value}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ detail: "no answer that could be read" }));
  throw new Error(`${answer.status}: ${told.detail}${told.request_id ? ` (request ${told.request_id})` : ""}`);
}

/** Runs what a person asked for; what goes wrong is told, and the button is off meanwhile. */
async function busy(button, work) {
  button.disabled = true;
  tell(null);
  try {
    await work();
  } catch (error) {
    tell(error.message);
  } finally {
    button.disabled = false;
  }
}

function node(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

async function list() {
  entries = [];
  let after = "";
  while (after !== null) {
    const page = await (await ask(`v1/dictionaries?limit=500&available=true&after=${encodeURIComponent(after)}`)).json();
    entries.push(...page.dictionaries);
    after = page.next;
  }
  at("dictionary").replaceChildren(...entries.map((entry) => node("option", entry.id, { value: entry.id })));
  at("service").textContent = `${entries.length} dictionaries`;
  describe();
}

function entryChosen() {
  return entries.find((entry) => entry.id === at("dictionary").value);
}

function describe() {
  const entry = entryChosen();
  const sites = entry ? [...new Set(entry.reads.map((part) => part.site))].join(", ") : "";
  const fvu = entry?.figures?.fvu;
  at("about").textContent = entry
    ? `${entry.kind}, ${entry.width.toLocaleString()} features, reads ${sites}${entry.l0 ? `, about ${entry.l0} active a token` : ""}` +
      `${typeof fvu === "number" ? `, FVU ${fvu.toFixed(3)}` : ""}`
    : "";
}

async function read() {
  const name = at("dictionary").value;
  const answer = await (await ask("v1/features", { text: at("text").value, dictionaries: [name] })).json();
  reading = { name, tokens: answer.tokens, rows: answer.dictionaries[0].features };
  at("feature").hidden = true;
  at("features").hidden = true;
  at("hint").hidden = false;
  const strengths = reading.rows.map((row) => Math.max(0, ...row.values));
  at("tokens").replaceChildren(...tokens(strengths, (n) => showToken(n)));
}

/** The text's tokens as buttons, shaded by a strength each. */
function tokens(strengths, pick) {
  const most = Math.max(...strengths, 1e-9);
  return reading.tokens.map((token, n) => {
    const shade = strengths[n] > 0 ? `s${Math.max(1, Math.ceil((SHADES * strengths[n]) / most))}` : "";
    const button = node("button", token.text, { type: "button", className: `token ${shade}`, disabled: token.masked });
    button.title = token.masked ? "no dictionary is trained on this token" : strengths[n].toFixed(2);
    if (pick) button.addEventListener("click", () => pick(n));
    return button;
  });
}

function showToken(n) {
  [...at("tokens").children].forEach((button, k) => button.setAttribute("aria-pressed", String(k === n)));
  const { indices, values } = reading.rows[n];
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, TOP);
  at("features").hidden = false;
  at("features").caption.textContent = `${indices.length} features at “${reading.tokens[n].text}”, the strongest ${order.length}`;
  at("features").tBodies[0].replaceChildren(
    ...order.map((k) => {
      const row = node("tr", "");
      const link = node("button", String(indices[k]), { type: "button" });
      link.addEventListener("click", () => busy(link, () => showFeature(indices[k])));
      const bar = node("progress", "", { max: values[order[0]], value: values[k] });
      row.append(node("td", ""), node("td", values[k].toFixed(2)), node("td", ""));
      row.children[0].append(link);
      row.children[2].append(bar);
      return row;
    }),
  );
}

async function showFeature(number) {
  const told = await (await ask(`v1/dictionaries/${encodeURIComponent(reading.name)}/features/${number}`)).json();
  chosen = { name: reading.name, number };
  const strengths = reading.rows.map((row) => row.values[row.indices.indexOf(number)] ?? 0);
  at("feature").hidden = false;
  at("answers").hidden = true;
  at("feature").querySelector("h2").textContent = `Feature ${number}`;
  at("where").replaceChildren(...tokens(strengths, null));
  const facts = { "Strongest here": Math.max(...strengths).toFixed(2), Threshold: told.threshold.toFixed(3), Bias: told.bias.toFixed(3) };
  for (const [site, norm] of Object.entries(told.norms)) facts[`Writes to ${site}`] = `norm ${norm.toFixed(3)}`;
  facts.Evidence = told.evidence ? JSON.stringify(told.evidence) : "none was published";
  at("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [node("dt", name), node("dd", value)]));
  at("value").value = (2 * Math.max(...strengths)).toFixed(1);
}

async function steer() {
  const change = { dictionary: chosen.name, feature: chosen.number, change: at("change").value, value: Number(at("value").value) };
  const body = {
    text: at("text").value,
    changes: [change],
    new_tokens: Number(at("length").value),
    temperature: Number(at("temperature").value),
  };
  at("steered").textContent = at("plain").textContent = "";
  at("answers").hidden = false;
  const answer = await ask("v1/steer", body);
  let rest = "";
  let done = false;
  for await (const part of parts(answer.body)) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const said = JSON.parse(line);
      done = said.done;
      for (const which of ["steered", "plain"]) at(which).textContent = said.done ? said[which] : at(which).textContent + said[which];
    }
  }
  if (!done) throw new Error("the answer broke off");
}

async function* parts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

at("token").value = sessionStorage.getItem("token") ?? "";
at("token").addEventListener("change", () => {
  sessionStorage.setItem("token", at("token").value);
  busy(at("read"), list);
});
at("dictionary").addEventListener("change", describe);
at("read").addEventListener("click", () => busy(at("read"), read));
at("steer").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(event.submitter ?? at("read"), steer);
});
busy(at("read"), list);
