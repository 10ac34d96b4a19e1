// The page of a conversation. It keeps what was said in this tab, finds its way back to the server when the
// connection ends, and then sends again what was not answered.
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log");
const unanswered = new Map(); // number of a line -> its text, and when it was sent
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 8000;

let socket = null;
let failures = 0; // since the last connection
let timer = 0;
let conversation = recall("conversation") ?? newConversation();
let number = recall("number") ?? 0;
let memory = recall("memory") ?? { lines: 0, name: "", topic: "" };
let said = recall("said") ?? [];

// -- what this tab keeps -----------------------------------------------------------------------------

function recall(key) {
  return JSON.parse(sessionStorage.getItem(key));
}

function keep() {
  for (const [key, value] of Object.entries({ conversation, number, memory, said })) {
    sessionStorage.setItem(key, JSON.stringify(value));
  }
}

function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// -- the connection ----------------------------------------------------------------------------------

function connect() {
  clearTimeout(timer);
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const opened = new WebSocket(`${scheme}//${location.host}/chat?id=${conversation}`);
  socket = opened;
  opened.onopen = () => {
    failures = 0;
    tell("connected", "connected");
    unanswered.forEach((line, n) => transmit(n, line));
  };
  opened.onmessage = (event) => receive(JSON.parse(event.data));
  opened.onclose = () => {
    if (opened !== socket) return; // of an earlier conversation
    // Twice as long each time, and not all pages at once.
    const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** failures++);
    timer = setTimeout(connect, longest * (0.5 + Math.random() / 2));
    tell("waiting", "reconnecting");
  };
}

function tell(state, text) {
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

function transmit(n, line) {
  if (socket.readyState !== WebSocket.OPEN) return; // it is sent on connecting
  line.sentAt = performance.now();
  socket.send(JSON.stringify({ n, text: line.text }));
}

// -- the conversation --------------------------------------------------------------------------------

function say(text) {
  number += 1;
  const line = { text, sentAt: 0 };
  unanswered.set(number, line);
  add("own", text);
  show();
  transmit(number, line);
}

function receive(answer) {
  const line = unanswered.get(answer.n);
  if (!line) return; // sent again, and answered twice
  unanswered.delete(answer.n);
  const fresh = answer.memory ?? memory;
  if (answer.kind === "reply" && fresh.lines <= memory.lines) {
    add("note", "You were silent for long: Halley has forgotten what was said before.");
  }
  memory = fresh;
  add(answer.kind, answer.text, `${Math.max(1, Math.round(performance.now() - line.sentAt))} ms`);
  show();
}

function add(kind, text, latency = "") {
  said.push([kind, text, latency]);
  draw(kind, text, latency);
}

function draw(kind, text, latency) {
  const line = document.createElement("div");
  line.className = `line ${kind}`;
  line.append(Object.assign(document.createElement("p"), { textContent: text }));
  if (latency) {
    line.append(Object.assign(document.createElement("small"), { textContent: latency, title: "from sending to answer" }));
  }
  log.insertBefore(line, $("typing"));
}

function show() {
  $("typing").hidden = unanswered.size === 0;
  $("name").textContent = memory.name || "–";
  $("topic").textContent = memory.topic || "–";
  $("lines").textContent = memory.lines;
  showLatest();
  keep();
}

function showLatest() {
  log.scrollTop = log.scrollHeight;
}

new ResizeObserver(showLatest).observe(log); // such as when a phone's keyboard comes up

$("write").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  $("text").value = "";
  if (text) say(text);
});

document.querySelector(".suggestions").addEventListener("click", (event) => {
  if (event.target.matches("button")) say(event.target.textContent);
});

$("anew").addEventListener("click", () => {
  sessionStorage.clear();
  location.reload();
});

// -- behind the page ---------------------------------------------------------------------------------

async function showFigures() {
  try {
    const figures = await (await fetch("/status")).json();
    const models = Object.entries(figures.models).map(
      ([name, model]) => `${name}: ${(model.rows / (model.batches || 1)).toFixed(1)} rows a batch`,
    );
    $("figures").textContent = [`conversations: ${figures.conversations}`, ...models].join(" · ");
  } catch {
    $("figures").textContent = "no answer";
  }
}

let watching = 0;
$("behind").addEventListener("toggle", () => {
  clearInterval(watching);
  if (!$("behind").open) return;
  showFigures();
  watching = setInterval(showFigures, 2000);
});
window.addEventListener("online", () => {
  if (socket.readyState === WebSocket.CLOSED) connect();
});

said.forEach((line) => draw(...line));
show();
connect();
