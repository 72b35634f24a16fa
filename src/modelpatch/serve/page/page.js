// The page over the server's own routes. Nothing is requested from anywhere else.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { patches: [], asked: new Set(["base"]), image: null, plan: null, turn: 0 };
const MOST = 64; // tasks that one request may ask for
const SHOWN = 6; // areas or objects of an answer

// Small scenes to try, drawn here: name, background, shapes.
const SAMPLES = [
  ["a flower", "#9fd3a8", '<g fill="#e8558f"><circle cx="48" cy="26" r="15"/><circle cx="69" cy="41" r="15"/><circle cx="61" cy="65" r="15"/><circle cx="35" cy="65" r="15"/><circle cx="27" cy="41" r="15"/></g><circle cx="48" cy="48" r="13" fill="#ffd23f"/>'],
  ["a road sign", "#a9cdf0", '<path d="M33 12h30l21 21v30L63 84H33L12 63V33z" fill="#c8102e" stroke="#fff" stroke-width="4"/><path d="M26 48h44" stroke="#fff" stroke-width="11"/>'],
  ["a ship at sea", "#bfe3f7", '<rect y="62" width="96" height="34" fill="#2d6a9f"/><path d="M14 58h68l-12 18H26z" fill="#7a4a2b"/><path d="M48 12v44H22z" fill="#f5f5f0"/><path d="M51 20v36h22z" fill="#e4e0d2"/>'],
  ["a digit", "#10131a", '<path d="M30 30q4-14 20-14 18 0 18 16 0 10-12 20L30 78h40" fill="none" stroke="#fff" stroke-width="9" stroke-linecap="round" stroke-linejoin="round"/>'],
];

function element(name, words = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(words)) {
    if (key === "class") made.className = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached. Is it running?");
  }
  const body = answer.status === 204 ? {} : await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error([body.detail, body.advice].filter(Boolean).join(" ") || `The server answered ${answer.status}.`);
  return body;
}

function notify(where, text, fine = false) {
  $(where).textContent = text;
  $(where).hidden = !text;
  $(where).classList.toggle("fine", fine);
}

const number = (value) => value.toLocaleString("en");
const percent = (value, digits = 0) => `${(100 * value).toFixed(digits)} %`;
const width = (value) => `${(100 * value).toFixed(1)}%`;

function operations(flops) {
  for (const [unit, size] of [["TFLOP", 1e12], ["GFLOP", 1e9], ["MFLOP", 1e6]]) if (flops >= size) return `${(flops / size).toPrecision(3)} ${unit}`;
  return `${number(flops)} FLOP`;
}

function accuracy(metrics) {
  for (const [key, unit] of [["test_miou", " mIoU"], ["test_map", " mAP"]]) if (key in metrics) return (100 * metrics[key]).toFixed(1) + unit;
  if ("test_r2" in metrics) return `${metrics.test_r2.toFixed(2)} R²`;
  const key = Object.keys(metrics).find((name) => name === "test_top1") || Object.keys(metrics).find((name) => name.endsWith("top1"));
  return key ? percent(metrics[key], 1) : "–";
}

// patches ------------------------------------------------------------------------------------------------------

async function refresh(first = false) {
  const found = [];
  let page, after = "";
  do {
    page = await call(`/v1/patches?after=${encodeURIComponent(after)}`);
    found.push(...page.patches);
    after = page.next;
  } while (after && found.length < 5000);
  state.patches = found;
  const network = page.backbone;
  $("backbone").textContent = `${network.spec} · ${number(network.parameters)} parameters · ${network.fingerprint.slice(0, 12)}`;
  const names = new Set(found.map((patch) => patch.name));
  for (const name of [...state.asked]) if (name !== "base" && !names.has(name)) state.asked.delete(name);
  if (first) for (const patch of found) if (patch.fits && state.asked.size < 12) state.asked.add(patch.name);
  list();
}

function list() {
  const wanted = $("find").value.trim().toLowerCase();
  const rows = [{ name: "base", method: "the backbone alone", metrics: {}, base: true }, ...state.patches].filter((patch) =>
    [patch.name, patch.method, patch.task].some((text) => (text || "").toLowerCase().includes(wanted)));
  $("count").textContent = `${number(state.patches.length)} in the store, ${state.patches.filter((patch) => patch.resident).length} resident`;
  $("patches").replaceChildren(...rows.slice(0, 500).map(row));
}

function row(patch) {
  const box = element("input", { type: "checkbox", checked: state.asked.has(patch.name), disabled: patch.fits === false });
  box.setAttribute("aria-label", `Ask ${patch.name}`);
  box.addEventListener("change", () => {
    if (box.checked) state.asked.add(patch.name);
    else state.asked.delete(patch.name);
    ask();
  });
  const name = element("td", {}, element("strong", {}, patch.name));
  if (patch.resident) name.append(element("span", { class: "mark here", title: "loaded and ready" }, "resident"));
  if (patch.fits === false) name.append(element("span", { class: "mark bad", title: "made for another backbone" }, "other backbone"));
  if (patch.problem) name.append(element("span", { class: "mark bad", title: patch.problem.detail }, "refused"));
  if (patch.signers?.length) name.append(signed(patch));
  if (patch.trusted === false) name.append(element("span", { class: "mark bad", title: "this server answers with signed patches only" }, "not signed by a required signer"));
  for (const tag of (patch.tags || []).filter((tag) => tag !== "latest")) name.append(element("span", { class: "mark" }, tag));
  const last = element("td");
  if (!patch.base) {
    const button = element("button", { class: "remove", type: "button", title: `Remove ${patch.name}` }, "✕");
    button.setAttribute("aria-label", `Remove ${patch.name}`);
    button.addEventListener("click", () => remove(patch.name));
    last.append(button);
  }
  return element("tr", {},
    element("td", {}, box), name, element("td", {}, patch.method),
    element("td", { class: "number" }, patch.base ? "" : number(patch.nbytes)),
    element("td", { class: "number" }, patch.base ? "" : accuracy(patch.metrics)),
    element("td", {}, element("code", {}, patch.base ? "" : patch.version.slice(0, 12))), last);
}

// The signers that a patch's signature claims, which a server that requires some checks before it loads the patch.
function signed(patch) {
  const title = patch.trusted ? "checked before the patch is loaded" : "as its signature says; this server checks none";
  return element("span", { class: patch.trusted ? "mark here" : "mark", title }, `signed: ${patch.signers.map((one) => shorten(one, 40)).join(", ")}`);
}

function token() {
  const value = $("token").value;
  return value ? { Authorization: `Bearer ${value}` } : {};
}

async function remove(name) {
  document.querySelector(".admin").open = true;
  if (!$("token").value) {
    notify("admin-notice", `Removing ${name} needs the server’s token.`);
    $("token").focus();
    return;
  }
  if (!confirm(`Remove ${name} with all its versions from the store?`)) return;
  try {
    await call(`/v1/patches/${name}`, { method: "DELETE", headers: token() });
    notify("admin-notice", `${name} is removed.`, true);
    await refresh();
    await ask();
  } catch (error) {
    notify("admin-notice", error.message);
  }
}

async function upload(event) {
  event.preventDefault();
  const name = $("name").value;
  notify("admin-notice", "");
  try {
    const headers = { ...token(), "Content-Type": "application/octet-stream" };
    const signature = $("signature-file").files[0];
    if (signature) headers["Modelpatch-Signature"] = btoa(String.fromCharCode(...new Uint8Array(await signature.arrayBuffer())));
    const made = await call(`/v1/patches/${name}`, { method: "PUT", headers, body: $("patch-file").files[0] });
    notify("admin-notice", `${made.name} is published as ${made.version.slice(0, 12)} and ready.`, true);
    state.asked.add(name);
    $("name").value = $("patch-file").value = $("signature-file").value = "";
    await refresh();
    await ask();
  } catch (error) {
    notify("admin-notice", error.message);
  }
}

// answers ------------------------------------------------------------------------------------------------------

function show(blob) {
  state.image = blob;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(blob);
  $("preview").alt = "The image that is asked about";
  $("preview").hidden = false;
  $("drop-hint").hidden = true;
  ask();
}

async function ask() {
  const turn = ++state.turn;
  const names = [...state.asked].slice(0, MOST);
  plan(names, turn);
  if (!state.image) return;
  if (!names.length) {
    $("answers").replaceChildren(element("p", { class: "quiet empty" }, "Choose at least one patch below."));
    $("took").textContent = "";
    return;
  }
  notify("notice", "");
  $("answers").classList.add("busy");
  const form = new FormData();
  form.append("images", state.image, "image");
  form.append("tasks", names.join(","));
  form.append("top", "4");
  const start = performance.now();
  try {
    const body = await call("/v1/predict", { method: "POST", body: form });
    if (turn !== state.turn) return;
    $("took").textContent = `${names.length} ${names.length === 1 ? "task" : "tasks"} in ${Math.round(performance.now() - start)} ms`;
    $("answers").replaceChildren(
      ...Object.entries(body.images[0].answers).map(([name, answer]) => card(name, answer)),
      ...Object.entries(body.refused).map(([name, problem]) => refusal(name, problem)));
    refresh().catch(() => {});
  } catch (error) {
    if (turn === state.turn) notify("notice", error.message);
  } finally {
    if (turn === state.turn) $("answers").classList.remove("busy");
  }
}

function card(name, answer) {
  const made = $("card").content.cloneNode(true).firstElementChild;
  const patch = state.patches.find((one) => one.name === name);
  made.classList.toggle("own", name !== "base");
  made.querySelector("h3").textContent = name;
  made.querySelector(".where").textContent = patch ? `${patch.method} · ${answer.version.slice(0, 8)}` : "the backbone’s own answer";
  if (answer.overlay) return segmented(made, answer);
  if (answer.boxes) return detected(made, answer);
  if (answer.values) return measured(made, answer);
  const told = answer.labels && new Set(answer.labels.map((label) => label.index));
  made.querySelector("ol").append(...answer.top.map((guess) => {
    const fill = element("i");
    fill.style.width = width(guess.probability);
    return element("li", told && !told.has(guess.index) ? { class: "untold" } : {},
      element("span", { title: guess.class }, guess.class),
      element("span", { class: "share-of" }, percent(guess.probability, guess.probability < 0.1 ? 1 : 0)),
      element("div", { class: "bar" }, fill));
  }));
  return made;
}

// Numbers by their names.
function measured(made, answer) {
  made.querySelector("ol").append(...answer.values.map(({ name, value }) => element("li", {},
    element("span", { title: name }, name),
    element("span", { class: "share-of" }, value.toLocaleString("en", { maximumSignificantDigits: 5 })))));
  return made;
}

// The image with the mask over it, and the largest areas with their colours.
function segmented(made, answer) {
  const picture = element("div", { class: "seen" }, element("img", { src: $("preview").src, alt: "" }));
  const mask = element("img", { class: "mask", alt: "The classes of the image’s parts", src: `data:image/png;base64,${answer.overlay.png}` });
  for (const [side, share] of ["left", "top", "width", "height"].map((side, place) => [side, answer.overlay.place[place]])) mask.style[side] = width(share);
  picture.append(mask);
  made.querySelector("ol").before(picture);
  made.querySelector("ol").append(...answer.areas.slice(0, SHOWN).map((area) => bar(area, area.share)));
  return made;
}

// The image with a frame around every object, and the objects with their colours.
function detected(made, answer) {
  const space = "http://www.w3.org/2000/svg";
  const frames = document.createElementNS(space, "svg");
  frames.setAttribute("viewBox", `0 0 ${answer.size.join(" ")}`);
  frames.setAttribute("role", "img");
  frames.setAttribute("aria-label", `${answer.boxes.length} objects`);
  for (const { box: [left, top, right, bottom], color } of answer.boxes) {
    const frame = document.createElementNS(space, "rect");
    for (const [key, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top, stroke: color })) frame.setAttribute(key, value);
    frames.append(frame);
  }
  made.querySelector("ol").before(element("div", { class: "seen" }, element("img", { src: $("preview").src, alt: "" }), frames));
  made.querySelector("ol").append(...answer.boxes.slice(0, SHOWN).map((box) => bar(box, box.probability)));
  const more = answer.boxes.length - SHOWN;
  if (more > 0) made.append(element("p", { class: "quiet" }, `and ${more} more`));
  if (!answer.boxes.length) made.append(element("p", { class: "quiet" }, "No object is found."));
  return made;
}

// A class in its colour, with a share.
function bar(one, share) {
  const fill = element("i"), color = element("b", { class: "color" });
  fill.style.width = width(share);
  fill.style.background = color.style.background = one.color;
  return element("li", {},
    element("span", { title: one.class }, color, one.class),
    element("span", { class: "share-of" }, percent(share, share < 0.1 ? 1 : 0)),
    element("div", { class: "bar" }, fill));
}

function refusal(name, problem) {
  const made = $("card").content.cloneNode(true).firstElementChild;
  made.classList.add("refused");
  made.querySelector("h3").textContent = name;
  made.querySelector(".where").textContent = "refused";
  made.querySelector("ol").replaceWith(element("p", { class: "quiet" }, [problem.detail, problem.advice].filter(Boolean).join(" ")));
  return made;
}

// the plan -----------------------------------------------------------------------------------------------------

async function plan(names, turn) {
  try {
    const body = names.length ? await call(`/v1/plan?tasks=${encodeURIComponent(names.join(","))}`) : null;
    if (turn !== state.turn) return;
    state.plan = body;
    $("share").hidden = !body;
    $("saved").textContent = body ? `${percent(body.shared)} of the work is saved` : "";
    $("plan").replaceChildren(...(body ? [draw(body)] : []));
    if (!body) return;
    $("share-done").style.width = width(body.shared);
    $("share-text").textContent = `${operations(body.flops)} instead of ${operations(body.separate_flops)} one after another, for ${names.length} ${names.length === 1 ? "task" : "tasks"} on one image`;
  } catch (error) {
    if (turn !== state.turn) return;
    $("share").hidden = true;
    $("saved").textContent = "";
    $("plan").replaceChildren(element("p", { class: "quiet" }, state.image ? "There is no plan." : error.message)); // the notice says why
  }
}

// How wide a text of the plan is, in pixels.
const pen = document.createElement("canvas").getContext("2d");
function span(text) {
  pen.font = "12px system-ui, sans-serif"; // as in page.css
  return pen.measureText(text).width;
}

// Streams from left to right, as long as their work; a lane for every stream that ends.
function draw(body) {
  const wide = Math.max($("plan").clientWidth, 280);
  const lane = 36, left = 4, gap = 16;
  const right = gap + Math.min(Math.max(...labels(body.tree).map(span)), 0.4 * wide);
  const scale = (wide - left - right) / Math.max(...body.tree.map(longest), 1);
  const shapes = [];
  let lanes = 0;

  function place(node, start) {
    const end = start + node.flops;
    const below = node.children.map((child) => place(child, end));
    let y = below.reduce((sum, one) => sum + one, 0) / below.length;
    if (node.tasks.length || !below.length) {
      y = lanes++ * lane + 24;
      shapes.push(["line", { class: "end", x1: left + end * scale + 4, x2: wide - right + 6, y1: y, y2: y }]);
      shapes.push(["text", { x: wide - right + 12, y: y + 4 }, fit(node.tasks.join(", "), right - gap)]);
    }
    const x = left + end * scale;
    for (const other of below) shapes.unshift(["path", { class: "way", d: `M${x} ${y}L${x} ${other}` }]);
    if (node.flops) {
      const size = Math.max(node.flops * scale - 3, 3);
      const facts = `${node.name}: ${operations(node.flops)}, ${node.own ? "a patch’s own" : "the backbone’s"}`;
      shapes.push(["rect", { class: node.own ? "run own" : "run", x: left + start * scale + 1.5, y: y - 7, width: size, height: 14, rx: 4 }, facts]);
      if (size > 130) shapes.push(["text", { class: "faint", x: left + start * scale + 3, y: y - 11 }, shorten(node.name, Math.floor(size / 6))]);
    }
    return y;
  }
  for (const root of body.tree) place(root, 0);

  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${wide} ${lanes * lane + 6}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${body.tasks.length} tasks save ${percent(body.shared)} of their work: ${outline(body.tree)}`);
  for (const [name, words, text] of shapes) {
    const made = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(words)) made.setAttribute(key, value);
    if (name === "text") made.textContent = text;
    else if (text) made.append(Object.assign(document.createElementNS(space, "title"), { textContent: text }));
    svg.append(made);
  }
  return svg;
}

const longest = (node) => node.flops + Math.max(0, ...node.children.map(longest));
const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const fit = (text, room) => (span(text) <= room ? text : fit(`${text.replace(/…$/, "").slice(0, -1)}…`, room));
const labels = (nodes) => nodes.flatMap((node) => [node.tasks.join(", "), ...labels(node.children)]);
const outline = (nodes) => nodes.map((node) => [node.name, node.tasks.length ? `answers ${node.tasks.join(", ")}` : "", node.children.length ? `(${outline(node.children)})` : ""].filter(Boolean).join(" ")).join("; ");

// the beginning ------------------------------------------------------------------------------------------------

function addSamples() {
  for (const [name, color, shapes] of SAMPLES) {
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="192" height="192" viewBox="0 0 96 96"><rect width="96" height="96" fill="${color}"/>${shapes}</svg>`;
    const picture = element("img", { alt: "", src: `data:image/svg+xml,${encodeURIComponent(svg)}` });
    const button = element("button", { type: "button", title: name }, picture);
    button.setAttribute("aria-label", `Ask about ${name}`);
    button.addEventListener("click", async () => {
      await picture.decode();
      const canvas = element("canvas", { width: 192, height: 192 });
      canvas.getContext("2d").drawImage(picture, 0, 0, 192, 192);
      canvas.toBlob(show, "image/png");
    });
    document.querySelector(".samples").append(button);
  }
}

function receive(files) {
  const file = [...files].find((one) => one.type.startsWith("image/") || one.name.endsWith(".ppm"));
  if (file) show(file);
  else notify("notice", "That is no image. JPEG, PNG, WebP, GIF and BMP can be asked about.");
}

async function health() {
  const ready = await fetch("/readyz").then((answer) => answer.ok, () => false);
  $("health").textContent = ready ? "ready" : "not ready";
  $("health").className = `chip ${ready ? "good" : "bad"}`;
}

function askAll() {
  state.asked = new Set(["base", ...state.patches.filter((patch) => patch.fits).map((patch) => patch.name)].slice(0, MOST));
  list();
  ask();
}

$("file").addEventListener("change", () => receive($("file").files));
$("find").addEventListener("input", list);
$("upload").addEventListener("submit", upload);
$("all").addEventListener("click", askAll);
$("none").addEventListener("click", () => { state.asked.clear(); list(); ask(); });
for (const kind of ["dragover", "dragenter"]) addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const kind of ["dragleave", "drop"]) addEventListener(kind, () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); receive(event.dataTransfer.files); });
addEventListener("paste", (event) => { if (event.clipboardData.files.length) receive(event.clipboardData.files); });
addEventListener("resize", () => state.plan && $("plan").replaceChildren(draw(state.plan)));
addSamples();
health();
setInterval(health, 5000);
refresh(true).then(ask).catch((error) => notify("notice", error.message));
