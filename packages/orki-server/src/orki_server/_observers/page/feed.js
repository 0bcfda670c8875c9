"use strict";
// Shows what the feed sends. Everything is put in as text, never as markup.

const KEPT = 500;
const AGAIN_MS = 2000;

const byId = (id) => document.getElementById(id);
const rows = byId("events");
let source = null;
let received = 0;
let held = false;

function say(text, kind) {
  const state = byId("state");
  state.textContent = text;
  state.className = kind;
}

function add(cells, kind) {
  const row = document.createElement("tr");
  row.className = kind;
  for (const text of cells) {
    const cell = document.createElement("td");
    cell.textContent = text;
    row.append(cell);
  }
  row.hidden = !matches(row);
  rows.prepend(row);
  while (rows.childElementCount > KEPT) rows.lastElementChild.remove();
}

function matches(row) {
  return row.textContent.toLowerCase().includes(byId("filter").value.toLowerCase());
}

function offerStreams(names) {
  const choice = byId("stream");
  const known = new Set(Array.from(choice.options, (option) => option.value));
  for (const name of names.filter((each) => !known.has(each))) choice.append(new Option(name, name));
}

function show(message) {
  received += 1;
  byId("count").textContent = String(received);
  if (held) return;
  const event = JSON.parse(message.data);
  const what = event.event === null ? event.problem : JSON.stringify(event.event);
  offerStreams([event.stream]);
  add([event.time, event.stream, event.traceparent.slice(3, 11), what], "");
}

function connect() {
  if (source) source.close();
  const stream = byId("stream").value;
  source = new EventSource(stream ? "events?stream=" + encodeURIComponent(stream) : "events");
  source.onopen = () => say("live", "live");
  source.onmessage = show;
  source.addEventListener("hello", (message) => offerStreams(JSON.parse(message.data).streams));
  source.addEventListener("gap", (message) => {
    const gap = JSON.parse(message.data);
    add(["", gap.stream, "", "events may be missing between " + gap.after + " and " + gap.first], "gap");
  });
  source.onerror = () => {
    say("connection lost, trying again", "lost");
    // The browser comes back by itself unless it was refused.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN_MS);
  };
}

byId("stream").addEventListener("change", connect);
byId("filter").addEventListener("input", () => {
  for (const row of rows.children) row.hidden = !matches(row);
});
byId("hold").addEventListener("click", () => {
  held = !held;
  byId("hold").setAttribute("aria-pressed", String(held));
});
connect();
