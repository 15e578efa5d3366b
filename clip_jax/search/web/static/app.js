// The page: asks the JSON API, shows what it answers, and can be used without a mouse.
"use strict";

const byId = (id) => document.getElementById(id);
const [text, file, top_, status_, results, picture, preview, viewer] =
  ["text", "file", "top", "status", "results", "picture", "preview", "viewer"].map(byId);
const withCaptions = document.body.dataset.texts === "yes";
const withOriginals = document.body.dataset.originals === "yes";

let image = null; // the picture that is asked with
let asked = 0; // counts the questions: an answer to an older one is not shown
let opened = null; // the result in the viewer

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(message, isError = false) {
  status_.textContent = message;
  status_.classList.toggle("error", isError);
}

async function ask(path, body) {
  const options = { method: "POST", body };
  if (!(body instanceof FormData)) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const values = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(values.error);
  return values;
}

function formWith(values) {
  const form = new FormData();
  for (const [key, value] of Object.entries(values)) form.append(key, value);
  return form;
}

async function search(query) {
  const mine = ++asked;
  say("Searching …");
  try {
    const values = { top: Number(top_.value) };
    const body = query instanceof Blob ? formWith({ ...values, image: query }) : { ...values, text: query };
    const [found, captions] = await Promise.all([
      ask("/api/search", body),
      withCaptions && query instanceof Blob ? ask("/api/search", formWith({ image: query, of: "texts", top: 5 })) : null,
    ]);
    if (mine !== asked) return;
    showResults(found.hits);
    showCaptions(captions ? captions.hits : []);
    const what = query instanceof Blob ? "the picture" : `“${query}”`;
    say(`${found.hits.length} nearest to ${what}, in ${Math.round(found.milliseconds)} ms`);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
}

function searchAt(query) { // a text has an address, to which the back button and links lead
  const address = new URLSearchParams({ text: query }).toString();
  if (location.search !== `?${address}`) history.pushState(null, "", `?${address}`);
  return search(query);
}

function searchWhatTheAddressSays() {
  const query = new URLSearchParams(location.search).get("text");
  text.value = query ?? "";
  if (query) search(query);
}

function showResults(hits) {
  results.replaceChildren(...hits.map((hit, place) => {
    const name = hit.caption || hit.key;
    const img = element("img", { src: `/api/image/${hit.number}`, alt: name, loading: "lazy", decoding: "async" });
    img.addEventListener("load", () => img.classList.toggle("tiny", img.naturalWidth <= 64));
    const button = element(
      "button", { type: "button", tabIndex: place === 0 ? 0 : -1, title: hit.key },
      img,
      element("span", { className: "text", textContent: name }),
      element("span", { className: "score", textContent: `cosine ${hit.score.toFixed(3)}` }),
    );
    button.addEventListener("click", () => open(hit));
    button.addEventListener("focus", () => {
      for (const other of results.querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
    });
    return element("li", {}, button);
  }));
}

function showCaptions(hits) {
  byId("captions").hidden = hits.length === 0;
  byId("captions").querySelector("ol").replaceChildren(...hits.map((hit) => element(
    "li", { textContent: hit.caption }, element("span", { className: "score", textContent: hit.score.toFixed(3) }),
  )));
}

function open(hit) {
  opened = hit;
  const name = hit.caption || hit.key;
  const shown = byId("viewer-image");
  shown.onload = () => shown.classList.toggle("tiny", shown.naturalWidth <= 64);
  shown.src = `/api/image/${hit.number}${withOriginals ? "?original=1" : ""}`;
  shown.alt = name;
  byId("viewer-title").textContent = name;
  byId("viewer-facts").textContent = `${hit.key} · record ${hit.record} · cosine ${hit.score.toFixed(4)}`;
  viewer.showModal();
}

function use(blob, name) {
  image = blob;
  URL.revokeObjectURL(preview.src);
  preview.onload = () => preview.classList.toggle("tiny", preview.naturalWidth <= 64);
  preview.src = URL.createObjectURL(blob);
  preview.alt = `The picture that is asked with: ${name}`;
  picture.hidden = false;
  byId("shares").replaceChildren();
  text.value = "";
  if (location.search) history.pushState(null, "", location.pathname);
  return search(blob);
}

async function classify() {
  const labels = byId("labels").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!labels.length) {
    say("Write some labels, one a line.", true);
    byId("labels").focus();
    return;
  }
  const form = formWith({ image });
  for (const label of labels) form.append("labels", label);
  try {
    const answer = await ask("/api/classify", form);
    byId("shares").replaceChildren(...answer.labels.map(({ label, probability }) => element(
      "li", {},
      element("span", { textContent: label }),
      element("span", { className: "value", textContent: `${(100 * probability).toFixed(1)} %` }),
      element("meter", { value: probability, ariaLabel: `probability of ${label}` }),
    )));
    say(`Most likely: ${answer.labels[0].label}`);
  } catch (error) {
    say(error.message, true);
  }
}

function move(key) {
  const buttons = [...results.querySelectorAll("button")];
  const here = buttons.indexOf(document.activeElement);
  if (here < 0) {
    if (key !== "ArrowDown" || !buttons.length) return false;
    buttons[0].focus();
    return true;
  }
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const next = here + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (next < 0 && key === "ArrowUp") text.focus();
  else if (buttons[next]) buttons[next].focus();
  return true;
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = text.value.trim();
  if (query) searchAt(query);
  else if (image) search(image);
});
byId("classify").addEventListener("submit", (event) => { event.preventDefault(); classify(); });
byId("again").addEventListener("click", () => { text.value = ""; search(image); });
byId("remove").addEventListener("click", () => { image = null; picture.hidden = true; showCaptions([]); text.focus(); });
byId("close").addEventListener("click", () => viewer.close());
byId("similar").addEventListener("click", async () => {
  const hit = opened;
  viewer.close();
  use(await (await fetch(`/api/image/${hit.number}`)).blob(), hit.key);
});
file.addEventListener("change", () => {
  if (file.files.length) use(file.files[0], file.files[0].name);
  file.value = ""; // or the same picture could not be chosen again
});

document.addEventListener("keydown", (event) => {
  const inField = event.target.matches("input, textarea, select");
  if (viewer.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !inField) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key.startsWith("Arrow") && (!inField || (event.target === text && event.key === "ArrowDown"))) {
    if (move(event.key)) event.preventDefault();
  }
});

let inside = 0; // dragenter and dragleave come for every element on the way
document.addEventListener("dragenter", () => { inside += 1; document.body.classList.add("dragging"); });
document.addEventListener("dragleave", () => { inside -= 1; if (inside <= 0) document.body.classList.remove("dragging"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  document.body.classList.remove("dragging");
  const dropped = event.dataTransfer.files[0];
  if (dropped) use(dropped, dropped.name);
  else say("That is not a file; drop a picture from your disk.", true);
});

window.addEventListener("popstate", searchWhatTheAddressSays);
searchWhatTheAddressSays();
