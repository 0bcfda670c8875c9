"use strict";
// Shows the events of the feed. Values are inserted as text, never as markup.

const MAX_ROWS = 500;
const RETRY_MS = 2000;

const byId = (id) => document.getElementById(id);
const rows = byId("events");
let source = null;
let received = 0;
let paused = false;

function showState(text, kind) {
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
  while (rows.childElementCount > MAX_ROWS) rows.lastElementChild.remove();
}

function matches(row) {
  return row.textContent.toLowerCase().includes(byId("filter").value.toLowerCase());
}

function addStreams(names) {
  const choice = byId("stream");
  const known = new Set(Array.from(choice.options, (option) => option.value));
  for (const name of names.filter((each) => !known.has(each))) choice.append(new Option(name, name));
}

function show(message) {
  received += 1;
  byId("count").textContent = String(received);
  if (paused) return;
  const event = JSON.parse(message.data);
  const body = event.event === null ? event.problem : JSON.stringify(event.event);
  addStreams([event.stream]);
  add([event.time, event.stream, event.traceparent.slice(3, 11), body], "");
}

function connect() {
  if (source) source.close();
  const stream = byId("stream").value;
  source = new EventSource(stream ? "events?stream=" + encodeURIComponent(stream) : "events");
  source.onopen = () => showState("live", "live");
  source.onmessage = show;
  source.addEventListener("hello", (message) => addStreams(JSON.parse(message.data).streams));
  source.addEventListener("gap", (message) => {
    const gap = JSON.parse(message.data);
    add(["", gap.stream, "", "events may be missing between " + gap.after + " and " + gap.first], "gap");
  });
  source.onerror = () => {
    showState("connection lost, retrying", "lost");
    // The browser reconnects by itself unless the server refused it.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, RETRY_MS);
  };
}

byId("stream").addEventListener("change", connect);
byId("filter").addEventListener("input", () => {
  for (const row of rows.children) row.hidden = !matches(row);
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
});
connect();
