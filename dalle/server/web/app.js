"use strict";
// The page of `dalle serve`. Captions reach the document as text only.

const $ = (id) => document.getElementById(id);
const FIRST_SHOWN = 11;
const SETTINGS = ["temperature", "top_k", "top_p", "guidance", "rank"];

let info = null; // what the server says of the bundle
let job = null; // {id, caption, ask, abort} of the job that is drawn now
let shown = null; // {caption, ask, pictures: [{url, score, …}]} of the pictures on the stage
let opened = 0; // which of them the dialog shows
let source = null; // {blob, image} of the picture whose top is kept

// ---------------------------------------------------------------- the server

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) document.querySelector("details").open = true;
  const refused = new Refused(body?.error?.message ?? `The server answered ${answer.status}.`);
  refused.status = answer.status;
  refused.retryAfter = Number(answer.headers.get("retry-after"));
  throw refused;
}

// Server-sent events by fetch, which can send a key.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = { type: "message", data: "", id: "" };
      for (const line of text.slice(0, end).split("\n")) {
        if (line.startsWith("event: ")) event.type = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
        if (line.startsWith("id: ")) event.id = line.slice(4);
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

async function learn() {
  for (;;) {
    try {
      info = await (await ask("api/info")).json();
      break;
    } catch (error) {
      say(error.status === 503 ? "The bundle is being loaded …" : error.message, error.status !== 503);
      if (error.status !== 503 && error.status !== undefined) return false;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  $("about").textContent = `${info.model} · ${info.size}×${info.size} pixels`;
  $("best").max = Math.floor(Math.log2(info.max_candidates));
  $("best").value = Math.round(Math.log2(info.best_of));
  $("keep").max = info.grid - 1;
  for (const name of SETTINGS) if (info.defaults[name] !== null && $(name).value === "") $(name).value = info.defaults[name];
  $("rank").value = info.defaults.rank;
  tellCost();
  say("");
  return true;
}

// ---------------------------------------------------------------- drawing

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function bestOf() {
  return Math.min(2 ** Number($("best").value), info?.max_candidates ?? 512);
}

function seconds(n) {
  const s = n * (info?.seconds_per_candidate ?? 0);
  return s < 1 ? "under a second" : s < 90 ? `about ${Math.round(s)} s` : `about ${Math.round(s / 60)} min`;
}

function tellCost() {
  $("best-count").textContent = `${bestOf()}, ${seconds(bestOf())}`;
  $("best").setAttribute("aria-valuetext", `${bestOf()} candidates`);
}

function wanted() {
  const asked = { prompt: $("caption").value.trim(), best_of: bestOf(), n: Math.min(bestOf(), info.shown) };
  if ($("seed").value.trim()) asked.seed = Number($("seed").value);
  for (const name of SETTINGS) if ($(name).value !== "") asked[name] = name === "rank" ? $(name).value : Number($(name).value);
  return asked;
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

async function draw() {
  if (job || !$("caption").value.trim()) return;
  if (!info && !(await learn())) return;
  const asked = wanted();
  const body = { ...asked };
  if (source) Object.assign(body, { image: await base64(source.blob), keep_rows: Number($("keep").value) });
  if (source) asked.keep_rows = body.keep_rows;
  busy(true);
  say("Asking …");
  try {
    const answer = await ask("api/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const made = await answer.json();
    asked.seed = made.seed;
    $("seed").value = made.seed;
    await follow({ id: made.id, asked });
  } catch (error) {
    failed(error);
  }
}

// Shows a job until it has ended; a page that was loaded again comes here with the job that it remembers.
async function follow(next) {
  job = { ...next, abort: new AbortController() };
  sessionStorage.setItem("job", JSON.stringify(next));
  busy(true);
  let last = 0;
  try {
    for (let tries = 0; ; tries++) {
      try {
        const headers = last ? { "Last-Event-ID": String(last) } : {};
        const answer = await ask(`api/jobs/${job.id}/events`, { headers, signal: job.abort.signal });
        for await (const event of eventsOf(answer)) {
          if (event.id) last = Number(event.id);
          if (event.type === "waiting") say(waiting(event.data.before));
          if (event.type === "rows") grow(event.data);
          if (event.type === "done") return await finished(event.data);
          if (event.type === "failed") throw new Refused(event.data.state === "cancelled" ? "Cancelled." : event.data.error.message);
        }
        throw new TypeError("the stream ended early");
      } catch (error) {
        if (error instanceof Refused || error.name === "AbortError" || tries > 4) throw error;
        await new Promise((resolve) => setTimeout(resolve, 500 * 2 ** tries)); // the connection was lost; the job goes on
      }
    }
  } catch (error) {
    failed(error);
  } finally {
    job = null;
    sessionStorage.removeItem("job");
    busy(false);
  }
}

function waiting(before) {
  return before ? `Waiting: ${before} job${before === 1 ? "" : "s"} before yours` : "Waiting …";
}

function busy(isBusy) {
  $("draw").disabled = isBusy;
  $("cancel").hidden = !isBusy;
  if (isBusy) {
    $("ranked").replaceChildren();
    $("more").hidden = true;
    return;
  }
  $("growing").hidden = true;
  $("progress").hidden = true;
}

function failed(error) {
  say(error.name === "AbortError" ? "Cancelled." : error.message, !/^Cancelled/.test(error.message));
  busy(false);
}

async function cancel() {
  if (!job) return;
  const { id, abort } = job;
  try {
    await ask(`api/jobs/${id}`, { method: "DELETE" });
  } catch {
    abort.abort();
  }
}

async function grow(data) {
  say(`Row ${data.rows} of ${data.grid}`);
  $("progress").hidden = false;
  $("progress").value = data.rows / data.grid;
  if (!data.sheet) return;
  const image = new Image();
  image.src = `data:image/${data.sheet.startsWith("/9j/") ? "jpeg" : "png"};base64,${data.sheet}`;
  await image.decode();
  if (!job) return;
  const { columns, count, height } = data;
  const width = image.width / columns;
  const lines = Math.ceil(count / columns);
  const gap = Math.max(1, Math.round(width / 24));
  const canvas = $("growing");
  canvas.width = columns * (width + gap) - gap;
  canvas.height = lines * (width + gap) - gap;
  const pen = canvas.getContext("2d");
  const row = height / data.rows;
  for (let k = 0; k < count; k++) {
    const x = k % columns, y = Math.floor(k / columns);
    const left = x * (width + gap), top = y * (width + gap);
    pen.fillStyle = "#88888833";
    pen.fillRect(left, top, width, width);
    pen.drawImage(image, x * width, y * height, width, height, left, top, width, height);
    if (data.rows < data.grid) { // the last rows are not sure yet
      const unsure = Math.min(2 * row, height);
      const fade = pen.createLinearGradient(0, top + height - unsure, 0, top + height);
      fade.addColorStop(0, "#88888800");
      fade.addColorStop(1, "#888888dd");
      pen.fillStyle = fade;
      pen.fillRect(left, top + height - unsure, width, unsure);
    }
  }
  canvas.setAttribute("aria-label", `${count} candidates, ${data.rows} of ${data.grid} rows drawn`);
  canvas.hidden = false;
}

async function finished(data) {
  const { id, asked } = job;
  const pictures = await Promise.all(
    data.pictures.map(async (about, k) => ({ ...about, blob: await (await ask(`api/jobs/${id}/pictures/${k}`)).blob() })),
  );
  const cut = data.cut ? ` The caption was too long: its last ${data.cut} tokens were not read.` : "";
  const which = pictures.length < asked.best_of ? `The best ${pictures.length} of ${asked.best_of}` : `${pictures.length} candidates, best first`;
  say(`${which}, in ${data.seconds.toFixed(1)} s.${cut}`);
  if (!$("lock").checked) $("seed").value = "";
  show(asked, pictures);
  await remember({ at: Date.now(), asked, pictures });
  await listHistory();
  info = await (await ask("api/info")).json();
  tellCost();
}

// ---------------------------------------------------------------- ranked pictures

function show(asked, pictures) {
  shown?.pictures.forEach((picture) => URL.revokeObjectURL(picture.url));
  shown = { asked, pictures: pictures.map((picture) => ({ ...picture, url: URL.createObjectURL(picture.blob) })) };
  list(FIRST_SHOWN);
}

function list(n) {
  const { asked, pictures } = shown;
  $("ranked").replaceChildren(
    ...pictures.slice(0, n).map((picture, k) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const image = document.createElement("img"), score = document.createElement("span");
      image.src = picture.url;
      image.alt = `${asked.prompt}, rank ${k + 1}`;
      score.className = "score";
      score.textContent = `${k + 1}. CLIP ${picture.score.toFixed(3)}`;
      button.type = "button";
      button.append(image, score);
      button.addEventListener("click", () => open(k));
      item.append(button);
      return item;
    }),
  );
  $("more").hidden = pictures.length <= n;
  $("more").textContent = `Show the other ${pictures.length - n}`;
}

function walk(event, container) {
  const buttons = [...container.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = getComputedStyle(container).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: buttons.length - 1 - at }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  buttons[Math.max(0, Math.min(buttons.length - 1, at + step))].focus();
}

function open(k) {
  opened = k;
  const { asked, pictures } = shown, picture = pictures[k];
  $("detail-picture").src = picture.url;
  $("detail-picture").alt = `${asked.prompt}, rank ${k + 1}`;
  $("detail-caption").textContent = asked.prompt;
  const facts = {
    Rank: `${k + 1} of ${asked.best_of}`,
    "CLIP's score": picture.score.toFixed(4),
    "Log-likelihood": `${picture.log_likelihood.toFixed(1)} nats`,
    Seed: asked.seed,
    Candidate: picture.candidate,
    ...(asked.keep_rows ? { "Rows kept": asked.keep_rows } : {}),
    ...(info ? { Model: `${info.model} (${info.hashes.dalle.slice(0, 8)})` } : {}),
  };
  $("detail-facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => {
      const term = document.createElement("dt"), fact = document.createElement("dd");
      term.textContent = name;
      fact.textContent = value;
      return [term, fact];
    }),
  );
  $("save").href = picture.url;
  $("save").download = `${asked.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60) || "picture"}-${asked.seed}-${picture.candidate}.png`;
  $("copy").hidden = Boolean(asked.keep_rows);
  $("copy").textContent = "Copy command";
  if (!$("detail").open) $("detail").showModal();
}

function command(asked) {
  const quoted = `'${asked.prompt.replaceAll("'", `'\\''`)}'`;
  const options = SETTINGS.filter((name) => asked[name] !== undefined).map((name) => `--${name.replace("_", "-")} ${asked[name]}`);
  return `dalle generate ${quoted} --seed ${asked.seed} -n ${asked.best_of} --keep ${asked.n} ${options.join(" ")}`;
}

// ---------------------------------------------------------------- keeping the top of a picture

async function edit(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  await image.decode();
  source = { blob, image };
  $("edit").hidden = false;
  $("keep").value = Math.floor(info.grid / 2);
  shade();
  $("keep").focus();
}

function shade() {
  if (!source || !info) return;
  const canvas = $("edit-picture"), side = info.size;
  canvas.width = canvas.height = side;
  const pen = canvas.getContext("2d"), { image } = source;
  const short = Math.min(image.width, image.height);
  pen.drawImage(image, (image.width - short) / 2, (image.height - short) / 2, short, short, 0, 0, side, side);
  const top = (side * Number($("keep").value)) / info.grid;
  pen.fillStyle = "#000000b0";
  pen.fillRect(0, top, side, side - top);
  $("keep-count").textContent = `${$("keep").value} of ${info.grid}`;
}

function editOff() {
  if (source) URL.revokeObjectURL(source.image.src);
  source = null;
  $("edit").hidden = true;
}

// ---------------------------------------------------------------- history, in this browser

let database = null;

function store(mode) {
  return database.transaction("drawn", mode).objectStore("drawn");
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function openHistory() {
  try {
    const request = indexedDB.open("dalle", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("drawn", { keyPath: "at" });
    database = await done(request);
  } catch {
    $("past").hidden = true; // private windows of some browsers have none
  }
}

async function remember(entry) {
  if (!database) return;
  await done(store("readwrite").put(entry));
  const keys = await done(store("readonly").getAllKeys());
  for (const key of keys.slice(0, Math.max(0, keys.length - 60))) await done(store("readwrite").delete(key));
}

async function listHistory() {
  if (!database) return;
  const entries = (await done(store("readonly").getAll())).reverse();
  for (const image of $("history").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("history").replaceChildren(
    ...entries.map((entry) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const image = document.createElement("img"), caption = document.createElement("span");
      image.src = URL.createObjectURL(entry.pictures[0].blob);
      image.alt = "";
      caption.textContent = entry.asked.prompt;
      caption.dir = "auto";
      button.type = "button";
      button.append(image, caption);
      button.addEventListener("click", () => {
        if (job) return;
        restore(entry.asked);
        show(entry.asked, entry.pictures);
        say(`From the history: ${new Date(entry.at).toLocaleString()}`);
      });
      item.append(button);
      return item;
    }),
  );
  $("export").disabled = $("forget").disabled = !entries.length;
}

function restore(asked) {
  $("caption").value = asked.prompt ?? "";
  $("seed").value = asked.seed ?? "";
  $("lock").checked = asked.seed !== undefined;
  if (asked.best_of) $("best").value = Math.round(Math.log2(asked.best_of));
  for (const name of SETTINGS) if (asked[name] !== undefined) $(name).value = asked[name];
  tellCost();
}

async function exportHistory() {
  const entries = await done(store("readonly").getAll());
  const plain = await Promise.all(
    entries.map(async (entry) => ({
      ...entry,
      pictures: await Promise.all(entry.pictures.map(async ({ blob, ...about }) => ({ ...about, png: await base64(blob) }))),
    })),
  );
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(plain)], { type: "application/json" }));
  link.download = "dalle-history.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The texts of a PNG: tEXt is Latin-1, iTXt is UTF-8.
function textsOf(bytes) {
  const view = new DataView(bytes.buffer), texts = {};
  const name = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at), kind = name(at + 4, at + 8), from = at + 8, to = from + length;
    if (to > bytes.length) break;
    const zero = bytes.indexOf(0, from);
    if (kind === "tEXt" && zero < to) texts[name(from, zero)] = new TextDecoder("latin1").decode(bytes.subarray(zero + 1, to));
    if (kind === "iTXt" && zero < to) {
      const language = bytes.indexOf(0, zero + 3), translated = bytes.indexOf(0, language + 1);
      texts[name(from, zero)] = new TextDecoder().decode(bytes.subarray(translated + 1, to));
    }
    at = to + 4;
  }
  return texts;
}

async function dropped(file) {
  const texts = textsOf(new Uint8Array(await file.arrayBuffer()));
  if (!texts.caption) {
    if (file.type.startsWith("image/") && info) {
      await edit(file);
      say("This picture has no settings: its top can be kept.");
    }
    return;
  }
  const asked = { prompt: texts.caption };
  for (const field of ["seed", "best_of", ...SETTINGS]) if (texts[field] !== undefined) asked[field] = field === "rank" ? undefined : Number(texts[field]);
  if (["clip", "likelihood", "both"].includes(texts.ranked_by)) asked.rank = texts.ranked_by;
  restore(asked);
  say("The settings of the picture are back.");
}

// ---------------------------------------------------------------- events

addEventListener("DOMContentLoaded", async () => {
  $("key").value = sessionStorage.getItem("key") ?? "";
  $("key").addEventListener("change", async () => {
    sessionStorage.setItem("key", $("key").value);
    if (!info) await learn();
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  $("caption").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("best").addEventListener("input", tellCost);
  $("cancel").addEventListener("click", cancel);
  $("more").addEventListener("click", () => list(shown.pictures.length));
  $("ranked").addEventListener("keydown", (event) => walk(event, $("ranked")));
  $("history").addEventListener("keydown", (event) => walk(event, $("history")));
  $("detail").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && shown.pictures[opened + step]) open(opened + step);
  });
  $("close").addEventListener("click", () => $("detail").close());
  $("use-seed").addEventListener("click", () => {
    restore(shown.asked);
    $("detail").close();
    $("caption").focus();
  });
  $("edit-this").addEventListener("click", () => {
    const { blob } = shown.pictures[opened];
    $("caption").value = shown.asked.prompt;
    $("detail").close();
    edit(blob);
  });
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(command(shown.asked)).catch(() => {});
    $("copy").textContent = "Copied";
  });
  $("keep").addEventListener("input", shade);
  $("edit-off").addEventListener("click", editOff);
  $("export").addEventListener("click", exportHistory);
  $("forget").addEventListener("click", async () => {
    await done(store("readwrite").clear());
    await listHistory();
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) dropped(event.dataTransfer.files[0]);
  });
  await openHistory();
  await listHistory();
  if (!(await learn())) return;
  const remembered = sessionStorage.getItem("job");
  if (remembered) {
    const next = JSON.parse(remembered);
    restore(next.asked);
    follow(next);
  }
});
