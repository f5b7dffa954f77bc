"use strict";
// What was drawn before: in this browser only, and in the texts of PNGs that are dropped on the page.

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
  $("model").value = asked.model ?? "";
  tellSettings();
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
      say("This picture has no settings: paint over what is to be drawn anew.");
    }
    return;
  }
  const asked = { prompt: texts.caption };
  const byUnclip = texts.model === "unclip";
  if (byUnclip) asked.model = info?.both.find((name) => name.endsWith("/unclip"));
  for (const field of ["seed", "best_of", ...(byUnclip ? [] : SETTINGS)]) if (texts[field] !== undefined) asked[field] = field === "rank" ? undefined : Number(texts[field]);
  if (!byUnclip && ["clip", "likelihood", "both"].includes(texts.ranked_by)) asked.rank = texts.ranked_by;
  restore(asked);
  say("The settings of the picture are back.");
}
