"use strict";
// Every name of the model goes in by textContent: nothing here makes HTML of text.
const report = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("#tree button")];
let chosen = -1;
let step = 0;

function add(parent, name, text, style) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  parent.append(made);
  return made;
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (bytes >= 1000 && at < 4) { bytes /= 1000; at += 1; }
  return (at ? bytes.toFixed(1) : bytes) + " " + units[at];
}

const micro = (seconds) => seconds === null ? "no prediction" : (seconds * 1e6).toPrecision(3) + " us";

function facts(d) {
  const out = [];
  if (d.file) out.push(["source", d.file + ":" + d.line + "  " + (d.code || "")]);
  const p = d.problem;
  if (p.n !== undefined) out.push(["y[m, n] = x[m, k] @ w[n, k].T", "n " + p.n + ", k " + p.k + (p.m !== undefined ? ", m " + p.m : "") + ", x " + p.x_dtype]);
  if (d.formula) out.push(["format", d.formula + " (" + d.format.form + ", " + d.format.bits + " bits, groups of " + d.format.group + ", zero " + d.format.zero + ", scales in " + d.format.scale_dtype + ")"]);
  if (d.outcome === "rewritten") {
    out.push(["rule", d.rule], ["proof", d.proof], ["layout", d.layout]);
    out.push(["weight", size(d.bytes_before) + " to " + size(d.bytes_after)]);
    if (d.predicted) out.push(["predicted", d.predicted.speedup + "x at M = " + d.predicted.m + ", against a dense weight"]);
    if (d.measured) out.push(["measured", d.measured.speedup + "x at M = " + d.measured.m + ", by " + d.measured.by]);
  } else {
    out.push(["reason", d.sentence || d.reason], ["what to change", d.advice]);
  }
  for (const near of d.near_misses) out.push(["near miss", (near.rule ? near.rule + ": " : "") + near.reason.replaceAll("_", " ") + " at " + near.at]);
  return out;
}

const PASSES = [
  ["recognise", (d, to) => {
    if (d.formula) add(to, "p", "The rule " + (d.rule || "-") + " read the weight as " + d.formula + (d.proof ? "; proof: " + d.proof + "." : "."), d.outcome === "rewritten" ? "good" : "");
    else add(to, "p", "Not recognised: " + d.sentence + ".", "bad");
    for (const near of d.near_misses) add(to, "p", "Nearest: " + (near.rule || "no rule was tried") + ", stopped at " + near.at);
    if (d.advice) add(to, "p", "What to change: " + d.advice);
  }],
  ["plan", (d, to) => {
    if (d.outcome !== "rewritten") return add(to, "p", "Nothing was planned: the matmul stays as it is.");
    add(to, "p", "Packed as " + d.layout + ", " + size(d.bytes_after) + ".");
    const list = add(to, "ul");
    for (const piece of d.pieces) add(list, "li", piece.when + ": " + piece.kernel + (piece.copy ? " (" + piece.copy + " copy)" : "") + ", " + micro(piece.seconds) + " at M = " + piece.low);
  }],
  ["lower", (d, to) => {
    if (d.outcome !== "rewritten") return add(to, "p", "The graph was left as it was here.");
    add(to, "p", "Taken out (-) and put in (+):");
    const from = find("diff-" + d.structure);
    if (from) to.append(from.content.cloneNode(true));
  }],
  ["verify", (d, to) => {
    if (d.outcome !== "rewritten") return add(to, "p", "Nothing to verify: Inductor compiles the user's own matmul.");
    const ran = report.passes.some((p) => p.name === "verify");
    add(to, "p", ran ? "The new operation has the shape and dtype of the old one, and agreed with it on random rows." : "Not run: this was planned for a device that is not here.");
  }],
];

function showPass() {
  const [name, fill] = PASSES[step];
  const to = find("pass");
  to.replaceChildren();
  const passed = report.passes.find((p) => p.name === name);
  add(to, "p", name + (passed ? ": " + passed.ms.toFixed(1) + " ms for all matmuls, " + passed.changed + " changed" : ""), "count");
  fill(report.decisions[chosen], to);
  find("place").textContent = "Step " + (step + 1) + " of " + PASSES.length + ": " + name;
  find("previous").disabled = step === 0;
  find("next").disabled = step === PASSES.length - 1;
}

function clone(to, id) {
  to.replaceChildren();
  const from = find(id);
  if (from) to.append(from.content.cloneNode(true));
  return Boolean(from);
}

function choose(at) {
  const d = report.decisions[at];
  if (!d) return;
  chosen = at;
  for (const button of buttons) {
    if (Number(button.dataset.at) === at) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  find("name").textContent = d.id;
  find("verdict").textContent = d.outcome === "rewritten" ? "rewritten: " + d.formula : "kept: " + d.sentence;
  find("verdict").className = d.outcome === "rewritten" ? "good" : "bad";
  const list = find("facts");
  list.replaceChildren();
  for (const [term, text] of facts(d)) { add(list, "dt", term); add(list, "dd", text); }
  if (!clone(find("graphs"), "structure-" + d.structure)) add(find("graphs"), "p", "Nothing was kept of its surroundings.");
  for (const frame of document.querySelectorAll("#graphs .scroll")) {
    // The matmul is what one looks for first.
    const box = frame.querySelector(".box.matmul rect");
    if (box) frame.scrollLeft = box.x.baseVal.value + box.width.baseVal.value / 2 - frame.clientWidth / 2;
  }
  find("curves").hidden = !clone(find("curve"), "curve-" + d.curve);
  showPass();
}

function filter() {
  const wanted = find("filter").value.trim().toLowerCase();
  let shown = 0;
  for (const button of buttons) {
    const d = report.decisions[Number(button.dataset.at)];
    const words = [d.id, d.outcome, d.formula, d.reason, d.sentence, ...(d.pieces || []).map((p) => p.kernel)].join(" ").toLowerCase();
    const hit = words.includes(wanted);
    button.parentElement.hidden = !hit;
    shown += hit;
  }
  for (const branch of [...document.querySelectorAll("#tree li.branch")].reverse()) {
    branch.hidden = !branch.querySelector("li.leaf:not([hidden])");
  }
  find("count").textContent = shown + " of " + buttons.length + " matmuls";
}

find("tree").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(Number(button.dataset.at));
});
find("tree").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  const visible = buttons.filter((b) => b.offsetParent !== null);
  const to = visible[visible.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)];
  if (to) { to.focus(); event.preventDefault(); }
});
find("filter").addEventListener("input", filter);
find("previous").addEventListener("click", () => { if (step > 0) { step -= 1; showPass(); } });
find("next").addEventListener("click", () => { if (step < PASSES.length - 1) { step += 1; showPass(); } });
window.addEventListener("beforeprint", () => { for (const d of document.querySelectorAll(".all details")) d.open = true; });
filter();
const kept = report.decisions.findIndex((d) => d.outcome !== "rewritten" && d.near_misses.length);
if (report.decisions.length) choose(kept >= 0 ? kept : 0);
else for (const section of document.querySelectorAll("main section")) section.hidden = true;
