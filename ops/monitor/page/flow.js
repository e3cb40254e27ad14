"use strict";
// The picture at the top: storage -> reader -> encoded -> augmentation -> ready -> step, and what limits it, in words.

function stage(name, busy, lines, limit) {
  const share = busy === null || busy === undefined ? null : Math.min(1, busy);
  const box = make("div", { class: `stage${limit ? ` limit ${limit}` : ""}` }, make("b", {}, name));
  box.append(make("div", { class: "big" }, share === null ? "–" : show(share, "ratio")));
  box.append(make("div", { class: "meter" }, make("i", { style: { width: `${100 * (share || 0)}%` } })));
  for (const line of lines) box.append(make("small", {}, line));
  if (limit) box.append(make("span", { class: "flag" }, "the limit"));
  return box;
}

function tank(name, depth, capacity, starved, blocked, before, after) {
  const hungry = (starved || 0) > Math.max(blocked || 0, 0.02);
  const box = make("div", { class: `tank${hungry ? " starved" : ""}` }, make("b", {}, name));
  const count = Math.max(1, Math.min(16, Math.round(capacity || 1)));
  const filled = capacity ? (depth / capacity) * count : 0;
  const cells = make("div", { class: "cells", role: "img", "aria-label": `${name}: ${digits(depth || 0)} of ${digits(capacity || 0)} batches` });
  for (let i = 0; i < count; i += 1) {
    cells.append(make("i", { style: { "--part": `${100 * Math.min(1, Math.max(0, filled - i))}%` } }));
  }
  box.append(cells);
  box.append(make("small", {}, capacity ? `${digits(depth)} of ${digits(capacity)} batches` : "no numbers yet"));
  const wait = hungry || (starved || 0) >= (blocked || 0) ? [after, "waits for data", starved] : [before, "waits for room", blocked];
  box.append(make("small", {}, wait[2] === null || wait[2] === undefined ? "" : `${wait[0]} ${wait[1]} ${show(Math.min(1, wait[2]), "ratio")}`));
  return box;
}

function pipe(moving) {
  const svg = make("svg", { viewBox: "0 0 32 18", "aria-hidden": "true" });
  svg.append(make("line", { x1: 2, y1: 9, x2: 24, y2: 9 }), make("path", { d: "M22 3 L31 9 L22 15 Z", style: { fill: "currentColor" } }));
  return make("div", { class: `pipe${moving ? " moving" : ""}` }, svg);
}

function drawFlow(place, flow) {
  const v = flow.values;
  const own = v.read_seconds === null || v.storage_seconds === null ? null : Math.max(0, v.read_seconds - v.storage_seconds);
  const moving = (v.samples || 0) > 0;
  const limit = flow.limit;
  const cache = v.cache_hits === null || v.cache_hits === undefined ? [] : [`cache answers ${show(v.cache_hits, "ratio")}`];
  const path = make("div", { class: "path" },
    stage("Storage", v.storage_seconds, [v.bytes === null ? "" : show(v.bytes, "bytes/s"), ...cache], limit === "storage"),
    pipe(moving),
    stage("Reader", own, [v.samples === null ? "" : `${show(v.samples, "")} images/s`], limit === "reader"),
    pipe(moving),
    tank("Encoded", v.encoded_depth, v.encoded_capacity, v.hungry_seconds, v.encoded_blocked_seconds, "reader", "augmentation"),
    pipe(moving),
    stage("Augmentation", v.augment_seconds, [v.augment_seconds ? `could do ${show(v.samples / v.augment_seconds, "")} images/s` : ""], limit === "augment"),
    pipe(moving),
    tank("Ready", v.ready_depth, v.ready_capacity, v.starved_seconds, v.blocked_seconds, "augmentation", "step"),
    pipe(moving),
    stage("Step", v.data_wait === null ? null : 1 - v.data_wait, [v.step_seconds === null ? "" : `${show(v.step_seconds, "seconds")} a step`, v.data_wait === null ? "" : `waits ${show(v.data_wait, "ratio")} for data`], limit === "step" && "well"));
  const words = make("p", { id: "verdict" }, make("b", {}, flow.words[0]), ` ${flow.words[1]}`);
  place.replaceChildren(path, words);
}
