"use strict";
// Drawing: a panel and its numbers become elements. No library, and text only ever as text: names come from the wire.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const inside = ["svg", "line", "path", "rect", "text", "circle", "g"].includes(tag);
  const element = inside ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const tone = (one) => `var(--s${one.tone % 12})`;
const GREEN = 2, WELL = ["productive", "training", "ok", "kept"];

function coloured(series) {
  series.forEach((one, n) => { one.tone = n; });
  const well = series.find((one) => WELL.includes(one.name));
  if (!well) return;
  const taken = series.find((one) => one.tone === GREEN);
  if (taken) taken.tone = well.tone;
  well.tone = GREEN;
}
const last = (values) => { for (let i = values.length; i--; ) if (values[i] !== null) return values[i]; return null; };

// Numbers for people ---------------------------------------------------------------------------------------------------

function digits(value, count = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(1).replace("e-", "e\u2212").replace("-", "\u2212");
  return String(+value.toPrecision(count)).replace("-", "\u2212");
}

function scaled(value, base, names) {
  let power = 0;
  while (Math.abs(value) >= base && power < names.length - 1) { value /= base; power += 1; }
  return `${digits(value)}\u00a0${names[power]}`.trimEnd();
}

function show(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "ratio" && value !== 0 && Math.abs(value) < 1e-4) return "<\u00a00.01\u00a0%";
  if (unit === "ratio") return `${digits(100 * value, Math.abs(value) < 0.1 ? 2 : 3)}\u00a0%`;
  if (unit === "seconds") {
    const size = Math.abs(value);
    if (size >= 172800) return `${digits(value / 86400)}\u00a0d`;
    if (size >= 7200) return `${digits(value / 3600)}\u00a0h`;
    if (size >= 120) return `${digits(value / 60)}\u00a0min`;
    if (size >= 1 || size === 0) return `${digits(value)}\u00a0s`;
    return size >= 0.001 ? `${digits(value * 1000)}\u00a0ms` : `${digits(value * 1e6)}\u00a0µs`;
  }
  if (unit === "bytes" || unit === "bytes/s") {
    return scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]) + (unit === "bytes" ? "" : "/s");
  }
  if (unit === "flops/s") return scaled(value, 1000, ["FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s", "EFLOP/s"]);
  if (Math.abs(value) >= 1e5) return scaled(value, 1000, ["", "k", "M", "G", "T"]);
  return digits(value);
}

const clock = (seconds, long) => {
  const at = new Date(seconds * 1000);
  return at.toLocaleTimeString("en-GB", long ? {} : { hour: "2-digit", minute: "2-digit" });
};

function round(low, high, count, base) {
  const raw = (high - low) / Math.max(count, 1);
  const unit = base === 1024 ? 1024 ** Math.max(0, Math.floor(Math.log(Math.max(high, 1)) / Math.log(1024))) : 1;
  const power = 10 ** Math.floor(Math.log10(raw / unit));
  const step = unit * ([1, 2, 5, 10].find((factor) => factor * power >= (raw / unit) * 0.999) * power);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i += 1) found.push(i * step);
  return found;
}

// Charts ---------------------------------------------------------------------------------------------------------------

function chart(panel, series, times, width) {
  const height = 150, left = 52, right = 8, top = 8, bottom = 20;
  const stacked = panel.kind === "stacked";
  const tops = stack(series, times.length, stacked);
  const values = tops.flatMap((row) => row.filter((v) => v !== null));
  if (!values.length) return null;
  let low = Math.min(...values), high = Math.max(...values);
  const log = panel.log && low > 0;
  const fold = log ? Math.log10 : (v) => v;
  if (stacked) low = 0;
  if (panel.low !== null && !log) low = Math.min(panel.low, low);
  if (panel.high !== null && !log && high > 0.6 * panel.high) high = Math.max(panel.high, high);
  for (const [level] of panel.levels) if (level <= high * 1.3 && level >= low) high = Math.max(high, level * 1.02);
  if (high - low < 1e-9 * Math.max(Math.abs(high), 1e-9)) {
    const half = Math.abs(high) * 0.1 || 0.5;
    high += half;
    if (low !== panel.low) low -= half;
  } else if (!log && high !== panel.high) high += 0.05 * (high - low);
  const span = times[times.length - 1] - times[0] || 1;
  const x = (i) => left + ((times[i] - times[0]) / span) * (width - left - right);
  const y = (v) => height - bottom - ((fold(v) - fold(low)) / (fold(high) - fold(low))) * (height - top - bottom);

  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  const told = series.slice(0, 6).map((one) => `${one.name || panel.title} ${show(last(one.values), panel.unit)}`);
  svg.setAttribute("aria-label", `${panel.title}: ${told.join(", ")}`);
  const marks = log ? powers(low, high) : round(low, high, 4, panel.unit.startsWith("bytes") ? 1024 : 10);
  for (const mark of marks) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
    svg.append(make("text", { x: left - 6, y: y(mark) + 3.5, "text-anchor": "end" }, show(mark, panel.unit)));
  }
  const slots = Math.max(1, Math.min(4, Math.floor(width / 110)));
  for (let n = 0; n <= slots; n += 1) {
    const at = times[0] + (span * n) / slots;
    const anchor = n === 0 ? "start" : n === slots ? "end" : "middle";
    const across = left + (n / slots) * (width - left - right);
    svg.append(make("text", { x: across, y: height - 5, "text-anchor": anchor }, clock(at, span < 240)));
  }
  for (const [level, kind] of panel.levels) {
    if (level < low || level > high) continue;
    svg.append(make("line", { class: `level ${kind}`, x1: left, x2: width - right, y1: y(level), y2: y(level) }));
  }
  for (let n = series.length; n--; ) {
    const floor = stacked && n > 0 ? tops[n - 1] : null;
    for (const piece of pieces(tops[n])) {
      const line = piece.map((i, k) => `${k ? "L" : "M"}${x(i).toFixed(1)} ${y(tops[n][i]).toFixed(1)}`).join("");
      if (stacked) {
        const back = [...piece].reverse().map((i) => `L${x(i).toFixed(1)} ${y(floor ? floor[i] ?? 0 : 0).toFixed(1)}`);
        svg.append(make("path", { d: `${line}${back.join("")}Z`, style: { fill: tone(series[n]), opacity: "0.75" } }));
      } else if (piece.length === 1) {
        svg.append(make("circle", { cx: x(piece[0]), cy: y(tops[n][piece[0]]), r: 2.5, style: { fill: tone(series[n]) } }));
      } else svg.append(make("path", { class: "line", d: line, style: { stroke: tone(series[n]) } }));
    }
  }
  pointed(svg, panel, series, times, x, { left, right, top, width, height, bottom });
  return svg;
}

function stack(series, count, stacked) {
  if (!stacked) return series.map((one) => one.values);
  const sum = new Array(count).fill(null);
  return series.map((one) => one.values.map((v, i) => (sum[i] = v === null ? sum[i] : (sum[i] ?? 0) + v)));
}

function pieces(values) {
  const found = [];
  let piece = [];
  values.forEach((v, i) => { if (v !== null) piece.push(i); else if (piece.length) { found.push(piece); piece = []; } });
  if (piece.length) found.push(piece);
  return found;
}

function powers(low, high) {
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) found.push(10 ** p);
  const inside = found.filter((v) => v >= low && v <= high);
  return inside.length > 1 ? inside : [low, high];
}

function pointed(svg, panel, series, times, x, box) {
  const cursor = make("line", { class: "cursor", y1: box.top, y2: box.height - box.bottom, visibility: "hidden" });
  svg.append(cursor);
  let tip = null;
  const leave = () => { tip?.remove(); tip = null; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const share = (event.clientX - frame.left - box.left) / (box.width - box.left - box.right);
    const i = Math.round(Math.min(1, Math.max(0, share)) * (times.length - 1));
    tip?.remove();
    tip = make("div", { class: "tip" }, make("div", {}, make("b", {}, clock(times[i], true))));
    series.forEach((one, n) => {
      if (one.values[i] === null || n > 15) return;
      const name = make("span", {}, make("i", { style: { "--tone": tone(series[n]) } }), one.name || panel.title);
      tip.append(make("div", {}, name, make("b", {}, show(one.values[i], panel.unit))));
    });
    cursor.setAttribute("x1", x(i)); cursor.setAttribute("x2", x(i)); cursor.setAttribute("visibility", "visible");
    svg.parentNode.append(tip);
    const room = frame.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, x(i) + (x(i) > frame.width / 2 ? -tip.offsetWidth - 8 : 8)))}px`;
    tip.style.top = `${box.top}px`;
  });
}

function legend(panel, series) {
  if (series.length < 2 && !(series[0] && series[0].name)) return null;
  const items = series.map((one) => make("li", {}, make("i", { style: { "--tone": tone(one) } }), one.name, make("b", {}, show(last(one.values), panel.unit))));
  return make("ul", { class: "legend" }, ...items);
}

function stat(panel, series, times, width) {
  const value = last(series[0].values);
  if (value === null) return null;
  let kind = "";
  for (const [level, name] of panel.levels) if (panel.below ? value < level : value >= level) kind = name;
  const box = make("div", {}, make("div", { class: `stat ${kind}` }, show(value, panel.unit)));
  const points = series[0].values;
  const there = points.filter((v) => v !== null);
  const low = Math.min(...there), high = Math.max(...there), height = 26;
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const x = (i) => (i / Math.max(points.length - 1, 1)) * width;
  const y = (v) => (high > low ? height - 3 - ((v - low) / (high - low)) * (height - 6) : height / 2);
  for (const piece of pieces(points)) {
    svg.append(make("path", { class: "line", d: piece.map((i, k) => `${k ? "L" : "M"}${x(i).toFixed(1)} ${y(points[i]).toFixed(1)}`).join(""), style: { stroke: "var(--s0)", opacity: "0.6" } }));
  }
  box.append(svg);
  return box;
}

function bars(panel, series) {
  const rows = series.map((one) => [one.name, last(one.values)]).filter(([, v]) => v !== null).sort((a, b) => b[1] - a[1]);
  if (!rows.length) return null;
  const most = Math.max(...rows.map(([, v]) => v), panel.high ?? 0, 1e-12);
  const cells = rows.flatMap(([name, value]) => [
    make("span", {}, name),
    make("div", {}, make("i", { style: { width: `${Math.max(0, (100 * value) / most)}%`, "--tone": "var(--s0)" } })),
    make("b", {}, show(value, panel.unit)),
  ]);
  return make("div", { class: "bars" }, ...cells);
}

function table(panel, queries) {
  const rows = new Map();
  queries.forEach((query, column) => query.series.forEach((one) => {
    const key = Object.values(one.labels).join(", ") || "–";
    if (!rows.has(key)) rows.set(key, new Array(queries.length).fill(null));
    rows.get(key)[column] = last(one.values);
  }));
  if (!rows.size) return null;
  const unit = (name) => (name.includes("seconds") ? "seconds" : name.includes("share") ? "ratio" : "");
  const head = make("tr", {}, make("th", {}, "rank"), ...queries.map((query) => make("th", {}, query.legend)));
  const body = [...rows].sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true })).slice(0, 64).map(([name, cells]) =>
    make("tr", {}, make("td", {}, name), ...cells.map((v, i) => make("td", {}, show(v, unit(queries[i].legend))))));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function states(panel, series, times, width) {
  const found = series.filter((one) => one.values.some((v) => v !== null));
  if (!found.length) return null;
  const height = 44, cell = width / times.length;
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height + 18}`, role: "img" });
  svg.setAttribute("aria-label", `${panel.title}: ${found.map((one) => one.name).join(", ")}`);
  found.forEach((one) => pieces(one.values).forEach((piece) => {
    const box = { x: (piece[0] * cell).toFixed(1), y: 4, width: (piece.length * cell + 0.5).toFixed(1), height: height - 8 };
    svg.append(make("rect", { ...box, style: { fill: tone(one), opacity: "0.85" } }));
  }));
  svg.append(make("text", { x: 0, y: height + 13 }, clock(times[0], true)));
  svg.append(make("text", { x: width, y: height + 13, "text-anchor": "end" }, clock(times[times.length - 1], true)));
  const items = found.map((one) => {
    const part = one.values.filter((v) => v !== null).length / times.length;
    return make("li", {}, make("i", { style: { "--tone": tone(one) } }), one.name, make("b", {}, show(part, "ratio")));
  });
  return make("div", {}, svg, make("ul", { class: "legend" }, ...items));
}

function drawing(panel, queries, times, width) {
  const series = queries.flatMap((query) => query.series).filter((one) => one.values.some((v) => v !== null));
  if (!series.length || !times.length) return null;
  coloured(series);
  if (panel.kind === "stat") return stat(panel, series, times, width);
  if (panel.kind === "bar") return bars(panel, series);
  if (panel.kind === "table") return table(panel, queries);
  if (panel.kind === "state") return states(panel, series, times, width);
  const svg = chart(panel, series, times, width);
  return svg && make("div", {}, svg, legend(panel, series));
}
