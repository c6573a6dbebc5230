"use strict";
/* The explorer of single image tokens. Reads what lightning_limber/probe/explorer_file.py writes. */
(() => {
const files = JSON.parse(document.getElementById("explorer-data").textContent);
const $ = id => document.getElementById("x-" + id), root = document.getElementById("explorer");
const esc = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);
const range = n => [...Array(n).keys()];
const fmt = x => !(x === x && x !== undefined) ? "–" : x === 0 ? "0" : Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(2).replace(/e.*$/, m => "·10" + m.slice(1));
const percent = p => (p >= .1 ? (100 * p).toFixed(0) : p >= .001 ? (100 * p).toFixed(1) : "&lt;0.1") + "\u00a0%";
const HEATS = {
  norm: ["norm over text’s median", "log8"], l0: ["active latents (l0)", "u2"],
  fvu_text: ["SAE’s error over text’s variance", "log8"], cos_start: ["cosine to the token at entry (x₀)", "cos8"],
  activation: ["activation of the first latent", "log8"], p: ["p of the lens’ first token", "log8"],
  cosine: ["cosine to the nearest text", "cos8"], none: ["none: the picture", ""],
};
const CONTROLS = {words_long: "random words at this image’s norms", noise: "noise at this image’s norms"};
const state = {run: 0, epoch: null, image: 0, layer: 0, token: null, locked: false, control: false, pick: null, word: null, heat: "norm", objects: true};
/* What was clicked, `pick`: a latent of the layer, {kind: "latents", k: its place}, or a word of a lens, {kind: "lens" or "nearest", k: the word}. */
const opened = {};
let x;  // The file that is shown.

/* -- data ------------------------------------------------------------------------------------------ */

const TYPES = {log8: Uint8Array, u1: Uint8Array, cos8: Int8Array, u2: Uint16Array};
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer()), end = bytes.indexOf(10);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
  let start = end + 1;
  head.named = {};
  for (const a of head.arrays) {
    const size = a.shape.reduce((m, n) => m * n, 1) * TYPES[a.kind].BYTES_PER_ELEMENT;
    head.named[a.name] = {...a, data: new TYPES[a.kind](bytes.slice(start, start + size).buffer)};
    start += size;
  }
  head.count = head.named["image/norm"].shape[2];
  head.before = head.count - (head.grid ? head.grid[0] * head.grid[1] : 0);
  return head;
}

function read(group, field, image, layer, token, k = 0) {
  const a = x.named[group + "/" + field];
  if (!a || k >= (a.shape[3] ?? 1)) return NaN;
  const code = a.data[((image * a.shape[1] + layer) * a.shape[2] + token) * (a.shape[3] ?? 1) + k];
  if (a.kind === "log8") return code ? a.low * (a.high / a.low) ** ((code - 1) / 254) : 0;
  return a.kind === "cos8" ? code / 127 : code;
}
const group = () => state.control && x.control ? x.control : "image";
const tops = (of, field) => range(x.named[of + "/" + field]?.shape[3] ?? 0);

/* What is said of one token at one layer: latents, lens and nearest text, strongest first. */
const FIELDS = {latents: ["latent", "activation"], lens: ["piece", "p"], nearest: ["place", "cosine"]};
function items(kind, of, image, layer, token) {
  const [id, value] = FIELDS[kind], words = x.neighbours;
  return tops(of, id).map(rank => {
    const k = read(of, id, image, layer, token, rank), item = {k, value: read(of, value, image, layer, token, rank)};
    if (kind !== "nearest") return item;
    const spot = k % words.spots.length;
    return {...item, k: spot, layer: words.layers[(k - spot) / words.spots.length]};
  }).filter(item => kind !== "latents" || item.value > 0);
}
const said = (...at) => Object.fromEntries(Object.keys(FIELDS).map(kind => [kind, items(kind, ...at)]));
/* A word is the same word in another context, or as another token. */
const key = (kind, k) => kind === "latents" ? k : kind === "nearest" ? x.neighbours.spots[k][1].toLowerCase() : x.pieces.texts[k].trim().toLowerCase();
const strength = (of, image, layer, token, {kind, k}) => items(kind, of, image, layer, token).find(item => key(kind, item.k) === k)?.value ?? 0;
/* Whether it agrees with a word of the captions. */
const agrees = {
  latents: (layer, k) => state.word !== null && x.latents[layer].agree[state.word]?.includes(k),
  lens: (layer, k) => state.word !== null && x.pieces.agree[state.word].includes(k),
  nearest: (layer, k) => state.word !== null && x.neighbours.agree[state.word].includes(k),
};
const anyAgrees = (of, token, kinds = Object.keys(FIELDS)) => kinds.some(kind =>
  items(kind, of, state.image, state.layer, token).some(item => agrees[kind](state.layer, item.k)));

function name(token) {
  if (token < x.before) return x.grid ? `token ${token + 1} (no patch)` : `token ${token + 1}`;
  const place = token - x.before;
  return `patch in row ${Math.floor(place / x.grid[1]) + 1}, column ${place % x.grid[1] + 1}`;
}
const piece = text => esc(text).replace(/\ufffd+/g, "‹bytes›").replace(/\n/g, "⏎").replace(/^ (?=.)/, "").replace(/^\s*$/, "␣") || "␣";
const isNever = (of, token, image = state.image) => !read(of, "counted", image, state.layer, token);

/* -- picture --------------------------------------------------------------------------------------- */

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function shade(t) {
  const at = Math.max(0, Math.min(1, t)) * 4, i = Math.min(3, Math.floor(at));
  return `rgb(${VIRIDIS[i].map((c, k) => Math.round(c + (at - i) * (VIRIDIS[i + 1][k] - c))).join()})`;
}

function drawPicture() {
  const image = x.images[state.image], of = group(), picture = "data:image/jpeg;base64," + image.jpeg;
  if ($("picture").src !== picture) $("picture").src = picture;
  const pick = state.pick, isLog = pick ? pick.kind !== "nearest" : HEATS[state.heat][1] === "log8";
  const value = (g, token) => pick ? strength(g, state.image, state.layer, token, pick) || NaN : read(g, state.heat, state.image, state.layer, token);
  const scaled = v => isLog ? (v > 0 ? Math.log(v) : NaN) : v;
  // One scale for the image and its control: the switch moves the colours, not the scale.
  const groups = x.control ? ["image", x.control] : ["image"];
  const all = groups.flatMap(g => range(x.count).filter(t => !isNever(g, t)).map(t => scaled(value(g, t)))).filter(v => v === v);
  const low = Math.min(...all), high = Math.max(...all), back = v => fmt(isLog ? Math.exp(v) : v);
  const cells = [$("row"), $("grid")].flatMap(host => [...host.children]);
  cells.forEach((cell, token) => {
    const v = value(of, token), s = scaled(v), never = isNever(of, token);
    cell.style.setProperty("--heat", s === s ? shade(high > low ? (s - low) / (high - low) : 1) : "transparent");
    cell.classList.toggle("x-never", never);
    cell.classList.toggle("x-agrees", state.word !== null && anyAgrees(of, token));
    cell.title = `${name(token)}: ${fmt(v)}${never ? ", never counted (an attention sink)" : ""}`;
  });
  const label = pick ? {latents: "activation of ", lens: "p of ", nearest: "cosine to "}[pick.kind] + esc(pickName()) : HEATS[state.heat][0];
  $("scale").innerHTML = all.length ? `${label}<span>${back(low)} <i></i> ${back(high)}${isLog ? " (logarithmic)" : ""}</span>`
    + (pick ? `clear: not among the patch’s ${tops(of, FIELDS[pick.kind][0]).length} strongest` : "") : pick ? `${label}: on no patch here that is counted` : "";
  drawHere();
  const others = x.words.length && state.word !== null;
  $("agree").textContent = others ? `“${x.words[state.word]}” at layer ${x.layers[state.layer]}: ` + Object.entries({latents: "latents", lens: "lens", nearest: "nearest text"})
    .map(([kind, text]) => `${text} on ${groups.map((g, i) => range(x.count).filter(t => anyAgrees(g, t, [kind])).length + (i ? " of the control’s" : ` of ${x.count}`)).join(", ")}`).join("; ") + "." : "";
}

function drawHere() {
  [$("row"), $("grid")].flatMap(host => [...host.children]).forEach((cell, token) => {
    cell.classList.toggle("x-here", token === state.token);
    cell.classList.toggle("x-locked", token === state.token && state.locked);
    cell.tabIndex = token === (state.token ?? x.before % x.count) ? 0 : -1;
    cell.setAttribute("aria-pressed", token === state.token && state.locked);
  });
}

function drawImage() {
  const cell = token => `<div class="x-cell" role="button" data-token="${token}" aria-label="${name(token)}">${token < x.before ? token + 1 : ""}</div>`;
  $("row").innerHTML = range(x.before).map(cell).join("");
  $("grid").innerHTML = range(x.count - x.before).map(i => cell(i + x.before)).join("");
  if (x.grid) $("grid").style.gridTemplate = `repeat(${x.grid[0]}, 1fr) / repeat(${x.grid[1]}, 1fr)`;
  $("thumbs").querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", i === state.image));
  const {captions, written, boxes} = x.images[state.image];
  const caption = ([text, places], label) => {
    let out = "", done = 0;
    for (const [word, end] of places) {
      const start = end - x.words[word].length;
      out += esc(text.slice(done, start)) + `<button data-word="${word}">${esc(text.slice(start, end))}</button>`;
      done = end;
    }
    return `<p><small>${label}</small> ${out}${esc(text.slice(done))}</p>`;
  };
  $("caption").innerHTML = captions.map((one, i) => caption(one, i ? "" : "caption")).join("") + (written ? caption(written, "the model wrote") : "");
  $("boxes").innerHTML = (boxes ?? []).map(([label, [left, top, right, bottom]]) =>
    `<i style="left:${100 * left}%;top:${100 * top}%;width:${100 * (right - left)}%;height:${100 * (bottom - top)}%"><span${left + right > 1 ? ' class="x-end"' : ""}>${esc(label)}</span></i>`).join("");
}

/* -- panel ----------------------------------------------------------------------------------------- */

const hit = yes => yes ? " x-hit" : "";
function latentName(layer, k, short) {
  const of = x.latents[layer], text = of.texts?.[k] ?? "", shown = short ? text.split(" | ")[0] : text;
  return `<button class="x-pickable${hit(agrees.latents(layer, k))}" data-layer="${layer}" data-latent="${k}" aria-pressed="${state.pick?.kind === "latents" && state.pick.k === k && state.layer === layer}" title="${esc(text)}">`
    + `<code>${of.ids[k]}</code> ${esc(shown)}</button>`;
}
const word = (kind, k, inner) => `<button class="x-pickable${hit(agrees[kind](state.layer, k))}" data-${kind}="${esc(key(kind, k))}" aria-pressed="${state.pick?.kind === kind && state.pick.k === key(kind, k)}">${inner}</button>`;
const pickName = () => state.pick.kind === "latents" ? `latent ${x.latents[state.layer].ids[state.pick.k]}` : `“${state.pick.k}”`;
const link = (layer, k) => { const of = x.latents[layer];
  return of.neuronpedia ? ` <a target="_blank" rel="noopener" data-page="${esc(of.neuronpedia)}/${of.ids[k]}">Neuronpedia</a>` : ""; };
const density = (layer, k) => { const d = x.latents[layer].density?.[k]; return d ? `fires on ${percent(d)} of text` : ""; };
const dim = (kind, layer) => x.believed[kind][layer] ? "" : " x-dim";

function drawPanel() {
  const token = state.token ?? Math.min(x.before, x.count - 1), of = group(), at = state.layer;
  const found = said(of, state.image, at, token), number = (f, l = at) => fmt(read(of, f, state.image, l, token));
  const most = found.latents[0]?.value ?? 1, likeliest = found.lens[0]?.value ?? 1;
  const item = (value, share, inner, extra = "") => `<li class="${extra}"><b style="--share:${Math.round(100 * share)}%">${value}</b><span>${inner}</span></li>`;
  const source = of === "image" ? "" : ` <span class="x-dim">of ${esc(CONTROLS[of] ?? of)}</span>`;
  $("now").innerHTML = `<h3 aria-live="polite">${name(token)}, layer ${x.layers[at]}${source}</h3>`
    + `<div class="x-numbers"><div><span>norm</span> ${number("norm")} × text</div><div><span>l0</span> ${read(of, "l0", state.image, at, token)}</div>`
    + `<div><span>SAE’s error</span> ${number("fvu_text")} × text’s variance</div><div><span>cosine to x₀</span> ${number("cos_start")}</div></div>`
    + (isNever(of, token) ? "<p>Never counted: it points where the LLM’s first position does (an attention sink), or is it.</p>" : "")
    + `<div class="x-said"><div><h4>strongest latents, activation</h4><ul class="x-list">`
    + (found.latents.map(l => item(fmt(l.value), l.value / most, `${latentName(at, l.k)} <span class="x-dim">${density(at, l.k)}</span>${link(at, l.k)}`)).join("") || "<li><b></b>none fires</li>")
    + `</ul></div><div><h4>says (logit lens), p</h4><ul class="x-list${dim("lens", at)}">`
    + found.lens.map(l => item(percent(l.value), l.value / likeliest, word("lens", l.k, piece(x.pieces.texts[l.k])))).join("") + "</ul>"
    + (found.nearest.length ? `<h4>nearest text, cosine</h4><ul class="x-list${dim("nearest", at)}">` + found.nearest.map(l => { const [before, text, behind] = x.neighbours.spots[l.k];
      return item(l.value.toFixed(2), 0, `${esc(before)}${word("nearest", l.k, `<mark>${esc(text)}</mark>`)}${esc(behind)} <span class="x-dim">layer ${l.layer}</span>`); }).join("") + "</ul>" : "")
    + "</div></div>";
  const small = (text, long) => `<th class="n x-small" title="${long}">${text}</th>`;
  $("layers").innerHTML = `<thead><tr><th>layer</th><th class="n" title="over text’s median norm">norm</th><th class="n" title="active latents">l0</th>${small("error", "SAE’s squared error over text’s variance")}`
    + small("cos x₀", "cosine to the token as it entered the LLM") + `<th><span class="x-small">strongest </span>latent</th><th>says</th>${x.neighbours.spots ? "<th>nearest</th>" : ""}</tr></thead><tbody>`
    + x.layers.map((layer, l) => {
      const s = said(of, state.image, l, token), first = s.latents[0], near = s.nearest[0];
      return `<tr data-row="${l}"${l === at ? ' aria-current="true"' : ""}><th scope="row">${layer}</th><td class="n">${number("norm", l)}</td><td class="n">${read(of, "l0", state.image, l, token)}</td>`
        + `<td class="n x-small">${number("fvu_text", l)}</td><td class="n x-small">${number("cos_start", l)}</td><td class="x-text">${first ? latentName(l, first.k, true) : "–"}</td>`
        + `<td class="${dim("lens", l)}"><span class="${hit(agrees.lens(l, s.lens[0].k))}">${piece(x.pieces.texts[s.lens[0].k])}</span> <span class="x-dim">${percent(s.lens[0].value)}</span></td>`
        + (near ? `<td class="${dim("nearest", l)}"><span class="${hit(agrees.nearest(l, near.k))}">${esc(x.neighbours.spots[near.k][1])}</span> <span class="x-dim">${near.value.toFixed(2)}</span></td>` : "") + "</tr>";
    }).join("") + "</tbody>";
  const grey = ["lens", "nearest"].some(kind => x.believed[kind].includes(false));
  $("grey").textContent = grey ? "Grey words: at that layer this lens agrees with captions no more than chance and its control do (or that was not measured). Do not believe it there." : "";
  root.querySelectorAll("a[data-page]").forEach(a => a.setAttribute("href", "https://www.neuronpedia.org/" + a.dataset.page));
}

/* What was clicked: what is known of it, and where it is strongest on the other images. */
function drawPick() {
  const pick = state.pick, at = state.layer, of = group();
  $("pick").hidden = !pick;
  if (!pick) return;
  const counted = (g, i) => range(x.count).map(t => isNever(g, t, i) ? 0 : strength(g, i, at, t, pick));
  const count = (g, images = range(x.images.length)) => images.reduce((n, i) => n + counted(g, i).filter(v => v > 0).length, 0);
  const best = range(x.images.length).filter(i => i !== state.image).map(i => {
    const values = counted(of, i), value = Math.max(...values);
    return {image: i, value, token: values.indexOf(value)};
  }).filter(b => b.value > 0).sort((a, b) => b.value - a.value);
  const box = token => { if (token < x.before) return ""; const [h, w] = x.grid, place = token - x.before;
    return `<i style="left:${100 * (place % w) / w}%;top:${100 * Math.floor(place / w) / h}%;width:${100 / w}%;height:${100 / h}%"></i>`; };
  const isLatent = pick.kind === "latents", close = ' <button id="x-close">let go</button></h3>', layer = `layer ${x.layers[at]}`;
  const texts = x.latents[at].contexts?.[pick.k], inText = !isLatent || !texts ? "" : texts.length
    ? `<div>Strongest on these words of training captions:</div><ul class="x-list">${texts.map(([k, v]) => { const [before, text, behind] = x.contexts[k];
      return `<li><b>${fmt(v)}</b><span>${esc(before)}<mark>${esc(text)}</mark>${esc(behind)}</span></li>`; }).join("")}</ul>` : "<div>Fires on no word of the training captions that were read.</div>";
  const about = isLatent ? `<h3>Latent <code>${x.latents[at].ids[pick.k]}</code> of ${layer}${close}<div>${esc(x.latents[at].texts?.[pick.k] || "No description is known.").split(" | ").join("<br>")}</div><div class="x-dim">${density(at, pick.k)}${link(at, pick.k)}</div>${inText}`
    : `<h3>${esc(pickName())} ${pick.kind === "lens" ? "by the logit lens" : "as nearest text"}, ${layer}${close}` + (x.believed[pick.kind][at] ? "" : '<div class="x-dim">Grey: at this layer not to be believed.</div>');
  $("pick").innerHTML = `${about}<div>Among the ${tops("image", FIELDS[pick.kind][0]).length} strongest of ${count("image", [state.image])} of this image’s ${x.count} tokens, of ${count("image")} of all images’ ${x.images.length * x.count}${x.control ? ` (of the control’s: ${count(x.control)})` : ""}. Its strongest patches on other images:</div>`
    + (best.length ? `<div class="x-strip">${best.map(b => `<button data-image="${b.image}" data-token="${b.token}" aria-label="image ${b.image + 1}, ${name(b.token)}"><span><img alt="" src="data:image/jpeg;base64,${x.images[b.image].jpeg}">${box(b.token)}</span>${fmt(b.value)}</button>`).join("")}</div>`
      : "<div>none.</div>");
  root.querySelectorAll("#x-pick a[data-page]").forEach(a => a.setAttribute("href", "https://www.neuronpedia.org/" + a.dataset.page));
}

/* What the panel shows, a line an entry, and the table by layer behind it. */
function asText() {
  const image = x.images[state.image], line = e => e.innerText.replace(/\s+/g, " ").trim();
  const grey = e => e.nextElementSibling?.matches(".x-dim") ? " (grey: not to be believed at this layer)" : "";
  return [`${files[state.run].name}, epoch ${state.epoch}, ${image.name}`, ...[...$("caption").children].map(line),
    ...[...$("now").querySelectorAll("h3, .x-numbers, h4, li")].map(e => line(e) + grey(e)), "",
    ...[...$("layers").rows].map(row => [...row.cells].map(line).join("\t")), "", location.href].join("\n");
}

/* -- state ----------------------------------------------------------------------------------------- */

const NAMES = {latents: "latent", lens: "lens", nearest: "near"};  // In the address.
function draw() {
  root.classList.toggle("x-controlled", group() !== "image");
  root.classList.toggle("x-bare", !state.objects);
  $("layer").value = state.layer;
  $("layer-name").textContent = x.layers[state.layer];
  $("heat").value = state.heat;
  $("control").checked = group() !== "image";
  $("caption").querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", +b.dataset.word === state.word));
  drawPicture();
  drawPanel();
  drawPick();
}
function keep() {
  const at = {run: state.run, image: state.image, epoch: state.epoch, layer: x.layers[state.layer]};
  if (state.locked) at.patch = state.token;
  if (state.pick) at[NAMES[state.pick.kind]] = state.pick.kind === "latents" ? x.latents[state.layer].ids[state.pick.k] : state.pick.k;
  if (group() !== "image") at.control = 1;
  if (state.word !== null) at.word = x.words[state.word];
  history.replaceState(null, "", "#explorer&" + new URLSearchParams(at));
}
/* Keeps the focus on what takes the place of the element that had it. */
const sameAs = element => [...root.querySelectorAll("button, .x-cell")].find(e => JSON.stringify(e.dataset) === JSON.stringify(element.dataset));
const change = (news, isNewImage) => {
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  if ("layer" in news && news.layer !== state.layer && !("pick" in news) && state.pick?.kind === "latents") news.pick = null;
  Object.assign(state, news);
  if (isNewImage) drawImage();
  draw();
  keep();
  if (focused && !focused.isConnected) sameAs(focused)?.focus({preventScroll: true});
};
const lock = token => change({token, locked: true});
const layer = by => change({layer: Math.max(0, Math.min(x.layers.length - 1, state.layer + by))});
/* Through the layers, from the first where the last is shown. */
let timer = null;
function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => { layer(1); if (state.layer === x.layers.length - 1) play(false); }, 700) : null;
  if (on && state.layer === x.layers.length - 1) change({layer: 0});
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-pressed", on);
}

async function show(news) {
  Object.assign(state, news);
  const epochs = Object.keys(files[state.run].epochs).map(Number);
  if (!epochs.includes(state.epoch)) state.epoch = epochs.at(-1);
  x = opened[state.run + "/" + state.epoch] ??= await unpack(files[state.run].epochs[state.epoch]);
  x.believed.nearest = x.believed.neighbours;
  if (state.image >= x.images.length) state.image = 0;
  if (state.token >= x.count) Object.assign(state, {token: null, locked: false});
  state.layer = Math.min(state.layer, x.layers.length - 1);
  $("run").innerHTML = files.map((f, i) => `<option value="${i}">${esc(f.name)}</option>`).join("");
  $("epoch").innerHTML = epochs.map(e => `<option value="${e}">${e}${e ? "" : " (start)"}</option>`).join("");
  $("heat").innerHTML = Object.entries(HEATS).filter(([f]) => f === "none" || x.named["image/" + f]).map(([f, [text]]) => `<option value="${f}">${text}</option>`).join("");
  $("run").value = state.run;
  $("epoch").value = state.epoch;
  $("run").parentElement.hidden = files.length < 2;
  $("epoch").parentElement.hidden = epochs.length < 2;
  $("control").parentElement.hidden = !x.control;
  $("objects").parentElement.hidden = !x.images.some(image => image.boxes?.length);
  $("control-name").textContent = "control: " + (CONTROLS[x.control] ?? x.control);
  $("layer").max = x.layers.length - 1;
  $("thumbs").innerHTML = x.images.map((image, i) => `<button data-image="${i}" title="${esc(image.name)}" aria-label="image ${i + 1}: ${esc(image.captions[0]?.[0] ?? image.name)}"><img alt="" src="data:image/jpeg;base64,${image.jpeg}"></button>`).join("");
  root.querySelector(".x-wait").hidden = true;
  root.querySelector(".x-all").hidden = false;
  drawImage();
  draw();
}

/* The view that the address names; false where it names none. */
async function follow() {
  if (!location.hash.startsWith("#explorer")) return false;
  const at = new URLSearchParams(location.hash.slice(10)), number = key => at.has(key) && !isNaN(at.get(key)) ? +at.get(key) : null;
  const run = number("run");
  await show({run: run in files ? run : 0, epoch: number("epoch"), image: number("image") ?? 0, control: at.has("control"), token: number("patch"), locked: at.has("patch"), pick: null, word: null});
  const place = x.layers.indexOf(number("layer")), word = x.words.indexOf(at.get("word"));
  if (place >= 0) state.layer = place;
  const latent = x.latents[state.layer].ids.indexOf(number("latent")), kind = ["lens", "nearest"].find(kind => at.get(NAMES[kind]));
  const pick = latent >= 0 ? {kind: "latents", k: latent} : kind ? {kind, k: at.get(NAMES[kind])} : null;
  Object.assign(state, {pick, word: word >= 0 ? word : null});
  draw();
  return true;
}

/* -- events ---------------------------------------------------------------------------------------- */

const tokenOf = event => { const cell = event.target.closest(".x-cell"); return cell && +cell.dataset.token; };
for (const host of [$("row"), $("grid")]) {
  host.addEventListener("pointerover", event => {
    const token = tokenOf(event);
    if (token !== null && !state.locked && event.pointerType !== "touch") { state.token = token; drawHere(); drawPanel(); }
  });
  host.addEventListener("click", event => {
    const token = tokenOf(event);
    if (token === null) return;
    if (state.locked && token === state.token) change({locked: false}); else lock(token);
  });
}
/* Keeps the patch; the same again lets go. */
const choose = (kind, k, layer = state.layer) => {
  const isSame = state.pick?.kind === kind && state.pick.k === k && state.layer === layer;
  change({layer, pick: isSame ? null : {kind, k}, token: state.token ?? Math.min(x.before, x.count - 1), locked: true});
};
const copy = (button, text) => navigator.clipboard?.writeText(text).then(() => {
  const label = button.dataset.label ??= button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}, () => {});
root.addEventListener("click", event => {
  const target = event.target.closest("button, tr[data-row]"), data = target?.dataset;
  if (!target || event.target.closest("a")) return;
  if (data.latent !== undefined) {
    choose("latents", +data.latent, +data.layer);
  } else if (data.lens !== undefined) choose("lens", data.lens);
  else if (data.nearest !== undefined) choose("nearest", data.nearest);
  else if (data.word !== undefined) change({word: state.word === +data.word ? null : +data.word});
  else if (data.image !== undefined) change({image: +data.image, ...(data.token !== undefined ? {token: +data.token, locked: true} : {})}, true);
  else if (data.row !== undefined) change({layer: +data.row});
  else if (target.id === "x-close") change({pick: null});
  else if (target.id === "x-down") layer(-1);
  else if (target.id === "x-up") layer(1);
  else if (target.id === "x-play") play(timer === null);
  else if (target.id === "x-link") { keep(); copy(target, location.href); }
  else if (target.id === "x-copy") { keep(); copy(target, asText()); }
});
addEventListener("keydown", event => {
  const {top, bottom} = root.getBoundingClientRect(), isSeen = top < innerHeight && bottom > 0;
  const isOurs = root.contains(event.target) || (event.target === document.body && isSeen);
  if (!x || !isOurs || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}, move = moves[event.key];
  const onCell = event.target.closest(".x-cell");
  if (event.key === "[") layer(-1);
  else if (event.key === "]") layer(1);
  else if (event.key === "p") play(timer === null);
  else if (event.key === "Escape") change(state.pick ? {pick: null} : state.word !== null ? {word: null} : {locked: false});
  else if (onCell && (event.key === "Enter" || event.key === " ")) onCell.click();
  else if (onCell && move) {
    const from = +onCell.dataset.token, width = x.grid ? x.grid[1] : 1;
    let to = from + move[1] + move[0] * (from < x.before ? 1 : width);
    const isSameRow = from < x.before || move[0] || Math.floor((from - x.before) / width) === Math.floor((to - x.before) / width);
    if (to < 0 || to >= x.count || !isSameRow) to = from;
    lock(to);
    root.querySelector(`.x-cell[data-token="${to}"]`).focus();
  } else return;
  event.preventDefault();
});
$("layer").oninput = event => change({layer: +event.target.value});
$("heat").onchange = event => change({heat: event.target.value, pick: null});
$("control").onchange = event => change({control: event.target.checked});
$("objects").onchange = event => change({objects: event.target.checked});
$("run").onchange = event => show({run: +event.target.value, pick: null, word: null}).then(keep);
$("epoch").onchange = event => show({epoch: +event.target.value, pick: null, word: null}).then(keep);
addEventListener("hashchange", follow);

const start = () => show({}).then(() => change0());
const change0 = () => { state.layer = Math.floor(x.layers.length / 2); draw(); };
follow().then(found => {
  if (found) { root.scrollIntoView(); return; }
  // Megabytes are unpacked once somebody comes near.
  new IntersectionObserver((entries, watch) => {
    if (entries.some(entry => entry.isIntersecting) && !x) { watch.disconnect(); start(); }
  }, {rootMargin: "800px"}).observe(root);
});
})();
