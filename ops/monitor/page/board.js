"use strict";
// The page: tabs of panels, asked for again every few seconds. Only the numbers of the open tab are fetched.

const spec = JSON.parse(document.getElementById("spec").textContent);
const at = (id) => document.getElementById(id);
const chosen = { board: spec.dashboards[0].name, span: spec.spans[0][0] };
let shown = null, round_ = 0, timer = null, failures = 0;

function control(place, items, key, kind) {
  for (const [value, text] of items) {
    const button = make("button", { type: "button", "data-value": value, ...(kind === "tab" ? { role: "tab" } : {}) }, text);
    button.addEventListener("click", () => {
      if (key === "board" && location.hash.slice(1) !== value) { location.hash = value; return; } // which lays and asks
      chosen[key] = value; lay(); refresh();
    });
    place.append(button);
  }
}

function mark() {
  for (const button of at("tabs").children) button.setAttribute("aria-selected", String(button.dataset.value === chosen.board));
  for (const button of at("spans").children) button.setAttribute("aria-pressed", String(Number(button.dataset.value) === chosen.span));
}

function lay() {
  mark();
  const board = spec.dashboards.find((one) => one.name === chosen.board);
  const place = at("panels");
  if (place.dataset.board === board.name) return;
  place.dataset.board = board.name;
  delete place.dataset.drawn;
  shown = null;
  place.replaceChildren(make("p", { class: "about" }, board.about));
  for (const row of board.rows) {
    const grid = make("div", { class: "row" });
    for (const panel of row.panels) {
      const why = make("button", { class: "why", type: "button", title: panel.help, "aria-label": `What ${panel.title} tells`, "aria-expanded": "false" }, "?");
      const help = make("p", { class: "help", hidden: "" }, panel.help);
      why.addEventListener("click", () => { help.hidden = !help.hidden; why.setAttribute("aria-expanded", String(!help.hidden)); });
      const half = panel.span <= 6 ? 8 : panel.span >= 24 ? 24 : 12;
      const unit = panel.kind !== "stat" && ["images/s", "inputs/s", "images"].includes(panel.unit) ? make("span", { class: "unit" }, ` ${panel.unit}`) : null;
      const box = make("article", { class: `panel${panel.span <= 6 ? " small" : ""}`, id: panel.id, style: { "--span": panel.span, "--half": half } },
        make("h3", {}, panel.title, unit), why, help, make("div", { class: "drawing" }, make("div", { class: "empty" }, "…")));
      grid.append(box);
    }
    place.append(make("section", {}, make("h2", {}, row.title), grid, make("p", { class: "waits", hidden: "" })));
  }
}

function draw() {
  const board = spec.dashboards.find((one) => one.name === chosen.board);
  if (!shown || shown.dashboard !== board.name) return;
  for (const row of board.rows) for (const panel of row.panels) {
    const box = at(panel.id), place = box.querySelector(".drawing");
    box.hidden = false; // else it has no width to draw into
    if (place.matches(":hover") && place.querySelector(".tip")) continue; // somebody is reading it
    const width = Math.max(120, Math.round(place.clientWidth));
    const drawn = drawing(panel, shown.panels[panel.id], shown.times, width);
    place.replaceChildren(drawn || make("div", { class: "empty" }, "Nothing to show yet."));
    box.dataset.state = drawn ? "drawn" : panel.needs ? "waits" : "empty";
    box.hidden = box.dataset.state === "waits";
  }
  for (const row of board.rows) {
    const waiting = row.panels.filter((panel) => at(panel.id).hidden);
    const line = at(row.panels[0].id).closest("section").querySelector(".waits");
    line.hidden = !waiting.length;
    line.replaceChildren(...waiting.map((panel) => make("span", { title: panel.help }, `${panel.title}: needs ${panel.needs}`)));
  }
  at("panels").dataset.drawn = board.name;
}

function head(answer) {
  const h = answer.head, state = at("state");
  state.textContent = h.state || "";
  state.className = `chip ${h.state || ""}`;
  state.hidden = !h.state;
  at("done").parentNode.hidden = h.progress == null;  // an ingest has no steps
  at("done").style.width = `${100 * (h.progress || 0)}%`;
  at("done").parentNode.setAttribute("aria-valuenow", String(Math.round(100 * (h.progress || 0))));
  const parts = [];
  if (h.progress != null) parts.push(`${show(h.progress, "ratio")} done`);
  if (h.position != null) parts.push(`image ${show(h.position, "")}${h.images ? ` of ${show(h.images, "")}` : ""}`);
  if (h.step != null) parts.push(`step ${show(h.step, "")}`);
  if (h.speed != null) parts.push(`${show(h.speed, "images/s")} images/s`);
  if (h.left != null) parts.push(`${show(h.left, "seconds")} left`);
  if (h.loss != null) parts.push(`loss ${show(h.loss, "")}`);
  at("pace").textContent = parts.join("  ·  ");
  at("source").textContent = `${answer.source}, ${clock(answer.at, true)}`;
}

async function refresh() {
  clearTimeout(timer);
  const mine = (round_ += 1);
  try {
    const asked = `board.json?dashboard=${encodeURIComponent(chosen.board)}&span=${chosen.span}`;
    const answer = await fetch(asked, { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status}`);
    const found = await answer.json();
    if (mine !== round_) return;
    failures = 0;
    shown = found;
    at("note").hidden = !found.note;
    at("note").textContent = found.note || "";
    document.body.classList.remove("old");
    head(found);
    at("flow").hidden = !found.flow;
    if (found.flow) drawFlow(at("flow"), found.flow);
    draw();
  } catch (error) {
    if (mine !== round_) return;
    failures += 1;
    if (failures > 1) {
      at("note").hidden = false;
      at("note").textContent = "The run no longer answers: it has ended, or was stopped. What is shown is the last that it said.";
      at("state").textContent = "no answer"; at("state").className = "chip gone"; at("state").hidden = false;
    }
  }
  timer = setTimeout(refresh, document.hidden ? 30000 : spec.every * 1000);
}

function follow() {
  const wish = decodeURIComponent(location.hash.slice(1));
  if (spec.dashboards.some((one) => one.name === wish)) chosen.board = wish;
  lay();
}

control(at("tabs"), spec.dashboards.map((one) => [one.name, one.title]), "board", "tab");
control(at("spans"), spec.spans, "span", "span");
at("tabs").hidden = spec.dashboards.length < 2;
follow();
window.addEventListener("hashchange", () => { follow(); refresh(); });
window.addEventListener("resize", () => { clearTimeout(window.laid); window.laid = setTimeout(draw, 150); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
