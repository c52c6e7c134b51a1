/** The page: asks the service for samples as the form says, and shows them as they come about. */

import { Refused, read, sample } from "./api.js";
import { Card } from "./card.js";
import { DrawingBoard } from "./drawing_board.js";
import { $, copier, make, say, showFacts } from "./elements.js";
import { Player } from "./player.js";
import { Settings, typed } from "./settings.js";

const ANNOUNCE_MS = 1000; // how often progress is told to who hears the page

let models = []; // descriptions of all
let served = null; // of the chosen one
let schemas = null; // of the OpenAPI document
let settings = null;
let cards = [];
let running = null; // the AbortController of the request under way
let dirty = false; // a frame is due

const player = new Player(
  { box: $("player"), slider: $("time"), play: $("play"), back: $("back"), forward: $("forward") },
  () => redraw(),
);

const board = new DrawingBoard(forgive, complain);

const key = () => $("key").value.trim();
const number = (count) => count.toLocaleString("en");
const duration = (s) => (s === null || s === undefined ? null : s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(2)} s`);

// --- the model ---

async function connect() {
  try {
    models = (await read("v1/models", key())).data.map(({ info }) => info);
    schemas ??= (await read("openapi.json")).components.schemas;
  } catch (error) {
    complain(error);
    return;
  }
  forgive();
  served = models[0];
  $("model").replaceChildren(...models.map(({ name }) => new Option(name)));
  $("model-choice").hidden = models.length < 2;
  describe();
}

function describe() {
  const { shape } = served;
  const kind = shape
    ? `images, ${shape[1]} × ${shape[0]}${shape[2] > 1 ? " in colour" : ""}, ${served.vocab_size} levels`
    : `text, ${number(served.length)} tokens of ${served.vocabulary}`;
  showFacts($("model-facts"), [
    ["Model", models.length > 1 ? null : served.name], // else the choice says it
    ["Weights", make("code", { textContent: served.hash.slice(0, 12), title: served.hash }), served.hash],
    ["Step", number(served.step)],
    ["Makes", kind],
  ]);
  document.title = `md4: ${served.name}`;
  $("version").textContent = `md4 ${served.version}`;
  $("text-part").hidden = Boolean(shape);
  $("length-field").hidden = Boolean(shape);
  $("image-part").hidden = !shape;
  $("length").placeholder = served.length;
  $("label-field").hidden = !served.classes;
  $("label").placeholder = `0 to ${served.classes - 1}`;
  for (const field of document.querySelectorAll("#main-settings > .field:has([id^=set-]), #own-settings > .field")) {
    field.remove();
  }
  settings = new Settings($("main-settings"), $("own-settings"), schemas, served);
  $("by-age").checked = !shape;
  board.use(served);
  $("run").disabled = false;
  $("status").textContent = `${shape ? "Pixels" : "Tokens"} appear here in the order in which the model reveals them.`;
}

// --- a request ---

/** What the form asks for. Throws `Refused` if there is nothing to ask. */
function request() {
  const body = { count: typed($("count").value || "1") };
  if (models.length > 1) body.model = served.name;
  if (served.shape) {
    body.pixels = board.pixels;
  } else {
    if ($("prompt").value) body.prompt = $("prompt").value;
    if ($("length").value.trim()) body.length = typed($("length").value);
  }
  if ($("seed").value.trim()) body.seed = typed($("seed").value);
  if (served.classes && $("label").value.trim()) body.label = typed($("label").value);
  if (Object.keys(settings.changes).length) body.sampling = settings.changes;
  return body;
}

/** The same; null, after a word to the user, if there is nothing to ask. */
function wanted() {
  forgive();
  try {
    return request();
  } catch (error) {
    complain(error);
    return null;
  }
}

/** The form's request as a command, or null. */
function command() {
  const body = wanted();
  if (!body) return null;
  const quoted = (words) => `'${words.replaceAll("'", "'\\''")}'`;
  const address = quoted(new URL("v1/samples", document.baseURI).href);
  const allowed = key() ? ' -H "authorization: Bearer $KEY"' : "";
  return `curl ${address} -H 'content-type: application/json'${allowed} -d ${quoted(JSON.stringify(body))}`;
}

async function run() {
  if (running || !served) return;
  const body = wanted();
  if (!body) return;
  running = new AbortController();
  busy(true);
  forget();
  tell("Waiting for the first call…");
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  let first = null;
  let told = 0;
  try {
    for await (const event of sample(body, key(), running.signal)) {
      if (event.type === "begun") begin(event);
      if (event.type === "step") {
        if (first === null && event.positions.length) first = passed();
        cards[event.sample].replay.add(event);
        player.extend(Math.max(player.total, event.call + 1));
        redraw();
        if (performance.now() - told > ANNOUNCE_MS) {
          told = performance.now();
          say(progress());
        }
      }
      if (event.type === "done") finish(event.answer, passed(), first);
    }
  } catch (error) {
    if (error.name === "AbortError") tell(`Cancelled. ${cards.length ? `Kept: ${progress()}.` : ""}`);
    else complain(error);
  } finally {
    running = null;
    busy(false);
    redraw();
  }
}

/** Take the samples off the page. */
function forget() {
  cards = [];
  $("samples").replaceChildren();
  showFacts($("run-facts"), []);
  $("player").hidden = true;
}

function begin({ samples, model }) {
  player.reset();
  cards = samples.map((one, index) => new Card(index, one, { ...served, ...model }, { useSeed, edit }));
  $("samples").replaceChildren(...cards.map((card) => card.element));
  redraw();
  // On a phone the samples lie below the form. (Before they are there, the page is too short to be moved so far.)
  if ($("result").getBoundingClientRect().top > innerHeight / 2) $("result").scrollIntoView();
}

function finish(answer, took, first) {
  answer.samples.forEach((one, index) => (cards[index].answer = one));
  player.extend(Math.max(player.total, ...answer.samples.map((one) => one.calls)));
  const { model, settings: used, timings } = answer;
  const calls = answer.samples.map((one) => one.calls);
  const seed = answer.samples[0].seed;
  showFacts($("run-facts"), [
    ["Model", served.name],
    ["Weights", make("code", { textContent: model.hash.slice(0, 12), title: model.hash }), model.hash],
    ["Step", number(model.step)],
    ["Seed", calls.length > 1 ? `${seed} to ${seed + calls.length - 1}` : seed, String(seed)],
    ["Sampler", used.sampler.replaceAll("_", " ")],
    ["Network calls", spread(calls)],
    ["Time", duration(took)],
    ["First token", duration(first)],
    ["Waited in queue", duration(timings.queue_ms / 1000)],
  ]);
  tell(`Done: ${count(calls.length, "sample")} in ${duration(took)}.`);
}

/** Numbers in words: the one that all are, or the least and the most. */
function spread(numbers) {
  const [least, most] = [Math.min(...numbers), Math.max(...numbers)];
  return least === most ? number(most) + (numbers.length > 1 ? " each" : "") : `${number(least)} to ${number(most)}`;
}

const count = (some, what) => `${number(some)} ${what}${some === 1 ? "" : "s"}`;

function progress() {
  const unknown = cards.reduce((sum, { replay }) => sum + replay.unknown, 0);
  const revealed = cards.reduce((sum, { replay }) => sum + replay.after(player.total).revealed, 0);
  return `${number(revealed)} of ${number(unknown)} revealed, ${count(player.total, "call")}`;
}

function busy(yes) {
  const [run, cancel] = [$("run"), $("cancel")];
  if (yes) cancel.hidden = false;
  else run.disabled = false;
  // Who has just pressed the button that goes out goes on at the other one.
  const pressed = yes ? run : cancel;
  if (document.activeElement === pressed) (yes ? cancel : run).focus({ preventScroll: true });
  run.disabled = yes;
  cancel.hidden = !yes;
  $("result").setAttribute("aria-busy", yes);
}

// --- what is shown ---

/** Draw the moment that the player is at, with the next frame. */
function redraw() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(() => {
    dirty = false;
    const { calls, total } = player;
    const byAge = $("by-age").checked;
    for (const name of ["samples", "legend"]) $(name).classList.toggle("by-age", byAge);
    $("legend").classList.toggle("of-images", Boolean(served?.shape));
    $("again").hidden = !cards.some(({ replay }) => replay.steps.some((step) => step.hidden.length));
    if (running && cards.length) $("status").textContent = `Sampling: ${progress()}`;
    for (const card of cards) card.draw(calls, total, running === null, byAge);
    const moment = calls ? `After ${number(calls)} of ${count(total, "call")}` : `Before the first of ${count(total, "call")}`;
    $("moment").textContent = moment + changes(calls);
    $("time").setAttribute("aria-valuetext", moment + changes(calls));
  });
}

/** What the last call that is shown changed. */
function changes(calls) {
  const newest = cards.map(({ replay }) => replay.after(calls).newest).filter(Boolean);
  const revealed = newest.reduce((sum, step) => sum + step.positions.length, 0);
  const hidden = newest.reduce((sum, step) => sum + step.hidden.length, 0);
  return (revealed ? `: ${number(revealed)} revealed` : "") + (hidden ? `${revealed ? "," : ":"} ${number(hidden)} masked again` : "");
}

/** Say how it stands, to who sees and to who hears the page. */
function tell(words) {
  $("status").textContent = words;
  say(words);
}

function complain(error) {
  if (!(error instanceof Refused)) console.error(error);
  $("problem").textContent = error instanceof Refused ? error.message : `This page has a fault: ${error.message}`;
  $("problem").hidden = false;
  $("status").textContent = cards.length ? `Kept: ${progress()}.` : "";
  if (error.status === 401) {
    $("more").open = true;
    $("key").focus();
  }
  // "sampling.steps=0: ..." and "count=0: ..." name the field that is wrong.
  const name = /^(?:sampling\.)?(\w+)[=: ]/.exec($("problem").textContent)?.[1];
  const field = name && ($(`set-${name}`) ?? $(name));
  if (field instanceof HTMLElement && field.matches("#ask :is(input, select, textarea)")) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "problem");
    const folded = field.closest("details");
    if (folded) folded.open = true;
  }
}

function forgive() {
  $("problem").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// --- what the user does ---

function useSeed(seed) {
  $("seed").value = seed;
  $("seed").focus();
}

function edit(levels, name) {
  board.edit(levels, `${name} is on the drawing board`);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
$("model").addEventListener("change", () => {
  served = models.find(({ name }) => name === $("model").value);
  running?.abort();
  forget();
  describe();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("md4 key", key());
  if (!served) connect();
});
$("by-age").addEventListener("change", redraw);

$("insert-hole").addEventListener("click", () => {
  const size = Math.max(1, Math.min(100_000, Math.round(Number($("hole-size").value)) || 1));
  const area = $("prompt");
  area.setRangeText(size === 1 ? "_" : `_{${size}}`, area.selectionStart, area.selectionEnd, "end");
  area.focus();
});

$("copy-request").replaceWith(copier("Copy as curl", command));

$("key").value = sessionStorage.getItem("md4 key") ?? "";
connect();
