"use strict";
/* Two things move on this page: the plots follow the reader's colours, and the selection view shows what a token attends to. */
const read = (id) => { const found = document.getElementById(id); return found ? JSON.parse(found.textContent) : null; };
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/* --- plots --- */
const plots = [...document.querySelectorAll("figure.plot")];

function axis(spec) {
  return {
    title: { text: spec.title, font: { size: 12 }, standoff: 8 }, type: spec.is_log ? "log" : undefined, automargin: true,
    tickformat: spec.is_percent ? ".0%" : undefined, rangemode: spec.from_zero ? "tozero" : "normal", zeroline: false,
    gridcolor: colour("grid"), linecolor: colour("line"), fixedrange: true,
  };
}

function trace(line, kind) {
  const shade = colour(line.colour);
  const made = {
    name: line.name, x: line.x, y: line.y, connectgaps: false, hovertemplate: `%{y}<extra>${line.name}</extra>`,
    marker: { color: shade, size: kind === "bars" ? undefined : 7 }, line: { color: shade, dash: line.dash, width: 2 },
    type: kind === "bars" ? "bar" : "scatter", mode: line.mode,
  };
  if (kind !== "bars" && line.mode === "lines") delete made.marker;
  if (line.hover.length) { made.text = line.hover; made.hovertemplate = `%{text}: %{y}<extra>${line.name}</extra>`; }
  if (line.low.length) {
    made.error_y = {
      type: "data", symmetric: false, color: shade, thickness: 1.5, width: 5,
      array: line.high.map((v, i) => Math.max(0, v - line.y[i])), arrayminus: line.low.map((v, i) => Math.max(0, line.y[i] - v)),
    };
  }
  return made;
}

function draw(figure) {
  const spec = read(`${figure.id}-spec`);
  const narrow = figure.clientWidth < 480;
  const layout = {
    height: spec.height, margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(figure.querySelector("figcaption")).fontFamily, size: 12, color: colour("soft") },
    xaxis: { ...axis(spec.x), showgrid: false, nticks: narrow ? 5 : undefined }, yaxis: axis(spec.y), barmode: "group", bargap: 0.35,
    showlegend: spec.lines.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
    hoverlabel: { bgcolor: colour("sheet"), bordercolor: colour("line"), font: { color: colour("ink") } },
    hovermode: "closest",
    shapes: spec.notes.map((n) => ({ type: "line", x0: n.x, x1: n.x, yref: "paper", y0: 0, y1: 1, line: { color: colour("soft"), width: 1, dash: "dot" } })),
    annotations: spec.notes.filter((n) => n.text).map((n) => ({
      x: n.x, y: 0.98, yref: "paper", text: n.text, showarrow: false, xanchor: "left", yanchor: "top", xshift: 4, font: { size: 11, color: colour("soft") },
    })),
  };
  if (spec.notes.length && spec.kind === "lines") {
    const xs = spec.lines.flatMap((line) => line.x);
    layout.xaxis.range = [Math.min(...xs), Math.max(...xs)].map((v, i, [a, b]) => v + (i ? 1 : -1) * 0.02 * (b - a));
  }
  const canvas = figure.querySelector(".canvas");
  Plotly.react(canvas, spec.lines.map((line) => trace(line, spec.kind)), layout, { displayModeBar: false, responsive: true });
  figure.dataset.drawn = "yes";
}

/* A plot is drawn when it comes near; all of them before printing, and again where the colours change. */
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "600px" });
plots.forEach((figure) => near.observe(figure));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  plots.filter((figure) => figure.dataset.drawn).forEach(draw);
  if (view) view.map();
});
addEventListener("beforeprint", () => plots.forEach(draw));

/* --- the selection view --- */
const view = ((found) => {
  if (!found) return null;
  const at = (id) => document.getElementById(id);
  const box = at("tokens"), readout = at("readout"), canvas = at("map"), layers = at("layers");
  let text, layer, chosen, rows, spans;

  const isOn = (row, column) => (rows[row * width() + (column >> 3)] >> (7 - (column & 7))) & 1;
  const width = () => (text.length + 7) >> 3;
  const quoted = (piece) => `“${piece.replace(/\n/g, "⏎")}”`;
  const share = (value) => (value === null || value === undefined ? "none" : `${(100 * value).toFixed(1)}\u00a0%`);

  function open(number) {
    text = found.texts[number];
    at("text-about").textContent = text.about;
    layers.querySelectorAll("label").forEach((label) => label.remove());
    Object.keys(text.layers).forEach((name, i, all) => {
      const label = document.createElement("label"), input = document.createElement("input"), word = document.createElement("span");
      Object.assign(input, { type: "radio", name: "layer", value: name, checked: i === all.length - 1 });
      input.setAttribute("aria-label", `layer ${Number(name) + 1}`);
      word.textContent = Number(name) + 1;
      label.append(input, word);
      layers.append(label);
    });
    box.replaceChildren(...text.pieces.map((piece, i) => {
      const span = document.createElement("span");
      const breaks = piece.includes("\n") && !(text.pieces[i + 1] ?? "").startsWith("\n");
      span.textContent = (piece.replace(/\n/g, "⏎") || "·") + (breaks ? "\n" : "");
      span.id = `token-${i}`;
      span.setAttribute("role", "option");
      span.tabIndex = -1;
      return span;
    }));
    spans = [...box.children];
    chosen = Math.min(text.chosen, spans.length - 1);
    pickLayer(Object.keys(text.layers).at(-1));
    box.scrollTop = spans[chosen].offsetTop - box.clientHeight / 2;
  }

  function pickLayer(name) {
    layer = text.layers[name];
    layer.name = name;
    rows = Uint8Array.from(atob(layer.selected), (c) => c.charCodeAt(0));
    map();
    show(chosen);
  }

  function show(row, isPeek = false) {
    const position = text.first + row;
    let count = 0, before = 0;
    for (let column = 0; column < text.first; column++) before += isOn(row, column);
    spans.forEach((span, i) => {
      const on = i <= row && isOn(row, text.first + i);
      count += on ? 1 : 0;
      span.className = i > row ? "later" : on ? "on" : "off";
      if (!isPeek) { span.tabIndex = i === row ? 0 : -1; span.setAttribute("aria-selected", i === row); }
    });
    spans[row].className = `chosen${spans[row].className === "on" ? " on-self" : ""}`;
    count += before;
    const earlier = before ? ` (${before} of them in the ${text.first} tokens before this excerpt)` : "";
    const kept = count === position + 1
      ? `sees ${position + 1} tokens and attends to all of them`
      : `sees ${position + 1} tokens and attends to ${count}${earlier}`;
    readout.textContent = `Layer ${Number(layer.name) + 1}. Token ${position + 1}, ${quoted(text.pieces[row])}, ${kept}. They hold ` +
      `${share(layer.captured[row])} of what dense attention would spread; the best ${count} would hold ${share(layer.oracle[row])}.`;
  }

  function choose(row, focus = true) {
    chosen = Math.max(0, Math.min(spans.length - 1, row));
    show(chosen);
    if (focus) spans[chosen].focus({ preventScroll: true });
    spans[chosen].scrollIntoView({ block: "nearest", inline: "nearest" });
    map();
  }

  /* The token nearest above or below, as the text is laid out now. */
  function vertical(direction) {
    const here = spans[chosen].getBoundingClientRect();
    let best = chosen, least = Infinity;
    for (let i = chosen + direction; i >= 0 && i < spans.length && Math.abs(i - chosen) < 120; i += direction) {
      const there = spans[i].getBoundingClientRect();
      const rowsAway = Math.abs(there.top - here.top);
      if (rowsAway < 4) continue;
      const distance = rowsAway * 10 + Math.abs(there.left - here.left);
      if (distance < least) { least = distance; best = i; }
    }
    return best;
  }

  function map() {
    const n = spans.length, context = canvas.getContext("2d");
    canvas.width = n; canvas.height = n;
    const on = rgb(colour("accent")), off = rgb(colour("sheet")), mark = rgb(colour("dense"));
    const image = context.createImageData(n, n);
    for (let y = 0; y < n; y++) for (let x = 0; x < n; x++) {
      const shade = x <= y && isOn(y, text.first + x) ? (y === chosen ? mark : on) : off;
      image.data.set([...shade, 255], 4 * (y * n + x));
    }
    context.putImageData(image, 0, 0);
  }
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  const moves = {
    ArrowRight: () => chosen + 1, ArrowLeft: () => chosen - 1, ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1),
    Home: () => 0, End: () => spans.length - 1, PageDown: () => chosen + 40, PageUp: () => chosen - 40,
  };
  box.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key]());
  });
  box.addEventListener("click", (event) => { const i = spans.indexOf(event.target); if (i >= 0) choose(i); });
  box.addEventListener("pointerover", (event) => {
    const i = spans.indexOf(event.target);
    if (i >= 0 && event.pointerType === "mouse") show(i, true);
  });
  box.addEventListener("pointerleave", () => show(chosen));
  canvas.addEventListener("click", (event) => {
    const frame = canvas.getBoundingClientRect();
    choose(Math.floor(((event.clientY - frame.top) / frame.height) * spans.length), false);
  });
  layers.addEventListener("change", (event) => pickLayer(event.target.value));
  document.querySelectorAll("input[name=text]").forEach((input) => input.addEventListener("change", () => open(Number(input.value))));
  open(0);
  return { map };
})(read("selection-data"));

/* --- where the reader is --- */
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) {
    links.forEach((link) => link.removeAttribute("aria-current"));
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
document.querySelectorAll("main > section").forEach((part) => reading.observe(part));
