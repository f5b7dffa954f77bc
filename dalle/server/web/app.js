"use strict";
// The page of `dalle serve`. Captions reach the document as text only.

const $ = (id) => document.getElementById(id);
const FIRST_SHOWN = 11;
const NAMES = { dalle: "DALL·E", unclip: "DALL·E 2" };
const SETTINGS = ["temperature", "top_k", "top_p", "guidance", "rank"];

let info = null; // what the server says of the bundle
let job = null; // {id, caption, ask, abort} of the job that is drawn now
let shown = null; // {caption, ask, pictures: [{url, score, …}]} of the pictures on the stage
let opened = 0; // which of them the dialog shows
let painting = null; // of the picture of which a part is drawn anew, if it has one

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
  for (const name of SETTINGS) if (info.defaults[name] !== null && $(name).value === "") $(name).value = info.defaults[name];
  $("rank").value = info.defaults.rank;
  $("model").replaceChildren(new Option("automatic", ""), ...info.both.map((name) => new Option(NAMES[name.split("/").at(-1)], name)));
  for (const element of document.querySelectorAll(".models")) element.hidden = !info.both.length;
  tellSettings();
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

function seconds(n, by) {
  const s = n * (info ? info.seconds_per_candidate[by] : 0);
  return s < 1 ? "under a second" : s < 90 ? `about ${Math.round(s)} s` : `about ${Math.round(s / 60)} min`;
}

// What the model that draws next takes, and how long it draws; variations aside.
function tellSettings() {
  const by = drawnBy(painting.mask ? "edits" : "generations");
  for (const name of SETTINGS) $(name).disabled = by === "unclip"; // it draws no tokens
  $("best-count").textContent = `${bestOf()}, ${seconds(bestOf(), by)}`;
  $("best").setAttribute("aria-valuetext", `${bestOf()} candidates`);
}

function wanted() {
  const asked = { prompt: $("caption").value.trim(), best_of: bestOf(), n: Math.min(bestOf(), info.shown) };
  if ($("seed").value.trim()) asked.seed = Number($("seed").value);
  for (const name of SETTINGS) if ($(name).value !== "") asked[name] = name === "rank" ? $(name).value : Number($(name).value);
  return asked;
}

function drawnBy(endpoint) {
  const named = $("model").value.split("/").at(-1);
  return named || (info?.by_unclip.includes(endpoint) ? "unclip" : "dalle");
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

// `start` says what it starts from, if it is not the picture that is painted.
async function draw(start = null) {
  if (!$("caption").value.trim() || (!info && !(await learn()))) return;
  if ($("draw").disabled) return; // one is asked for, or drawn
  if (!start && painting.mask && !painting.share) return say("Paint over what is to be drawn anew.", true);
  const asked = wanted();
  busy(true);
  say("Asking …");
  try {
    if (!start && painting.mask) {
      asked.painted = painting.share;
      start = { image: await base64(painting.blob), mask: await base64(await painting.file()) };
    }
    if (start?.strength !== undefined) asked.strength = start.strength;
    asked.by = drawnBy(start ? (start.mask ? "edits" : "variations") : "generations");
    if ($("model").value) asked.model = $("model").value;
    if (asked.by === "unclip") for (const name of SETTINGS) delete asked[name]; // it draws no tokens
    const { painted: _, by: __, ...fields } = asked;
    const body = { ...fields, ...start };
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
  say(job.asked.by === "unclip" ? `Drawing by DALL·E 2 … ${Math.round((100 * data.rows) / data.grid)}%` : `Row ${data.rows} of ${data.grid}`);
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
  const isStarted = asked.by !== "unclip" && (asked.painted || asked.strength !== undefined); // equal candidates of these are one picture
  const which = isStarted ? `${pictures.length} different picture${pictures.length === 1 ? "" : "s"}` : pictures.length < asked.best_of ? `The best ${pictures.length} of ${asked.best_of}` : `${pictures.length} candidates, best first`;
  say(`${which}, in ${data.seconds.toFixed(1)} s.${cut}`);
  if (!$("lock").checked) $("seed").value = "";
  show(asked, pictures);
  await remember({ at: Date.now(), asked, pictures });
  await listHistory();
  info = await (await ask("api/info")).json();
  tellSettings();
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
    ...(picture.log_likelihood == null ? {} : { "Log-likelihood": `${picture.log_likelihood.toFixed(1)} nats` }),
    Seed: asked.seed,
    Candidate: picture.candidate,
    ...(asked.painted ? { "Drawn anew": `${Math.round(100 * asked.painted)}% of a picture` } : {}),
    ...(asked.strength === undefined ? {} : { "Variation of strength": asked.strength }),
    ...(info ? { Model: asked.by === "unclip" ? `${info.model}, DALL·E 2` : `${info.model} (${info.hashes.dalle.slice(0, 8)})` } : {}),
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
  $("copy").hidden = Boolean(asked.painted) || asked.strength !== undefined || asked.by === "unclip";
  $("copy").textContent = "Copy command";
  if (!$("detail").open) $("detail").showModal();
}

function command(asked) {
  const quoted = `'${asked.prompt.replaceAll("'", `'\\''`)}'`;
  const options = SETTINGS.filter((name) => asked[name] !== undefined).map((name) => `--${name.replace("_", "-")} ${asked[name]}`);
  return `dalle generate ${quoted} --seed ${asked.seed} -n ${asked.best_of} --keep ${asked.n} ${options.join(" ")}`;
}

// ---------------------------------------------------------------- starting from a picture

async function edit(blob) {
  await painting.open(blob, info.size);
  $("edit").hidden = false;
  tellSettings();
  $("edit-picture").focus();
}

function painted() {
  const share = 100 * painting.share;
  $("painted").textContent = share ? `${share < 1 ? "under 1" : Math.round(share)}% is drawn anew` : "nothing is painted yet";
  $("undo").disabled = !painting.past.length;
}

function editOff() {
  painting.close();
  $("edit").hidden = true;
  tellSettings();
}

async function vary() {
  const { asked, pictures } = shown, { blob } = pictures[opened];
  $("detail").close();
  editOff();
  restore({ ...asked, seed: undefined, model: $("model").value });
  await draw({ image: await base64(blob), strength: Number($("strength").value) });
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
  $("best").addEventListener("input", tellSettings);
  $("model").addEventListener("input", tellSettings);
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
    edit(blob).then(() => say("Say what the whole picture should show, and paint over what is to be drawn anew."));
  });
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(command(shown.asked)).catch(() => {});
    $("copy").textContent = "Copied";
  });
  $("vary").addEventListener("click", vary);
  painting = new Painting($("edit-picture"), $("brush"), painted);
  $("size").addEventListener("input", () => (painting.size = Number($("size").value)));
  for (const name of ["paint", "erase"]) $(name).addEventListener("change", () => (painting.erases = $("erase").checked));
  for (const name of ["undo", "clear", "invert"]) $(name).addEventListener("click", () => painting[name]());
  $("upload").addEventListener("change", () => {
    if ($("upload").files.length && info) edit($("upload").files[0]).catch(() => say("This picture cannot be read.", true));
    $("upload").value = "";
  });
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
