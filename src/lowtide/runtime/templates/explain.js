"use strict";
(() => {
  const e = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const num = (x) => {
    const a = Math.abs(x);
    return x.toFixed(a >= 100 ? 0 : a >= 10 ? 1 : a >= 1 ? 2 : a >= 0.1 ? 3 : a === 0 ? 0 : 4);
  };
  const signed = (x) => (x < 0 ? "−" : "+") + num(Math.abs(x));
  const percent = (x) => (100 * x).toFixed(1) + "\u00a0%";
  const shown = (s) =>
    s.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\x7f", "␡")
      .replace(/[\x00-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
  const safe = (s) => s.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const share = (x, most) => Math.round((100 * x) / (most || 1));
  const dots = (level) => "●".repeat(level) + "○".repeat(e.slices - level);
  const named = (c, kind) => (kind === "o" ? Math.floor(c / e.head_dim) + "·" + (c % e.head_dim) : String(c));

  const channels = (entries, kind) =>
    '<ol class="bars">' +
    entries.map(([c, level, score]) =>
      `<li style="--w:${share(score, entries[0][2])}%" title="score ${num(score)}, read at ${2 * level} of ${2 * e.slices} bits">` +
      `<b>${named(c, kind)}</b><i>${num(score)}</i><s>${dots(level)}</s></li>`).join("") +
    "</ol>";
  const weights = (entries) =>
    '<ol class="plain">' +
    entries.map(([m, row, c, product, bits]) =>
      `<li title="row ${row}, channel ${c}"><b>${e.matrices[m].replace("_proj", "")}</b><span>${row}, ${c}</span>` +
      `<i>${signed(product)}</i><s>${bits === 16 ? "exact" : bits + " bits"}</s></li>`).join("") +
    "</ol>";
  const offsets = (layer) =>
    '<ol class="plain by">' +
    e.kinds.map((kind, k) =>
      `<li><b>${kind}</b><i class="${layer.offsets[k] > 0 ? "up" : "low"}">${signed(layer.offsets[k])}</i>` +
      `<span>${layer.drivers[k].slice(0, 2).map(([c, part]) => `${c} ${signed(part)}`).join(", ")}</span></li>`).join("") +
    "</ol>";
  const spread = (counts) =>
    `<span class="spread" title="${counts.map((c, l) => `${c} at ${2 * l} bits`).join(", ")}">` +
    counts.map((c, l) => `<u class="l${l}" style="flex-grow:${c}"></u>`).join("") + "</span>";
  const kinds = (t, layer, n) =>
    '<ol class="plain kinds">' +
    e.kinds.map((kind, k) =>
      `<li><b>${kind}</b><i class="s${e.steps[k][t][n]}">${num(e.bits[t][n][k])}</i>${spread(layer.levels[k])}</li>`).join("") +
    "</ol>";
  const row = (t, layer, n) =>
    `<tr><th scope="row">${n}</th><td>${kinds(t, layer, n)}</td>` +
    (e.gains ? `<td>${offsets(layer)}</td>` : "") +
    layer.channels.map((entries, k) => `<td>${channels(entries, e.kinds[k])}</td>`).join("") +
    `<td>${weights(layer.weights)}</td></tr>`;
  const fact = (name, value) => `<div><dt>${name}</dt><dd>${value}</dd></div>`;
  const facts = (t) =>
    fact("bits read per weight", num(t.bits)) +
    fact("entropy of what comes next", num(t.entropy) + " nats") +
    fact("margin of the likeliest", num(t.margin)) +
    fact("expects", `<q>${safe(shown(t.expects))}</q> ${percent(t.expects_p)}`) +
    (t.offset === null ? "" : fact("waterline lowered by", signed(t.offset) + " octaves"));

  let chosen = e.chosen;
  const choose = (t) => {
    chosen = t;
    const token = e.tokens[t], detail = e.details[t];
    for (const old of document.querySelectorAll("[aria-current]")) old.removeAttribute("aria-current");
    document.querySelector(`#text [data-t="${t}"]`).setAttribute("aria-current", "true");
    for (const tr of $("map").tBodies[0].rows) tr.classList.toggle("on", Number(tr.dataset.t) === t);
    for (const place of document.querySelectorAll(".which")) place.textContent = t;
    for (const place of document.querySelectorAll(".name")) place.textContent = shown(token.text);
    $("facts").innerHTML = facts(token);
    $("none").hidden = Boolean(detail);
    $("none").querySelector("span").textContent = t;
    $("described").hidden = !detail;
    $("back").disabled = t === 0;
    $("next").disabled = t === e.tokens.length - 1;
    if (detail) {
      const most = detail.residual[0][1];
      $("residual").innerHTML = detail.residual.map(([c, part]) =>
        `<li style="--w:${share(part, most)}%"><b>${c}</b><i>${percent(part)}</i></li>`).join("");
      $("layers").innerHTML = detail.layers.map((layer, n) => row(t, layer, n)).join("\n");
    }
    history.replaceState(null, "", "#token=" + t);
  };
  const view = () => Number(document.querySelector(".views:checked").value);
  const value = (t, n, v) => {
    const bits = e.bits[t][n];
    return v ? bits[v - 1] : bits.reduce((sum, b, k) => sum + b * e.kind_weights[k], 0) / e.kind_weights.reduce((a, b) => a + b);
  };
  const label = () => {
    for (const tr of $("map").tBodies[0].rows) {
      for (let n = 0; n < e.bits[0].length; n++) tr.cells[n + 1].textContent = value(Number(tr.dataset.t), n, view()).toFixed(2);
    }
  };
  const where = (event) => {
    const cell = event.target.closest("td:not(.n)");
    if (!cell) return;
    const t = Number(cell.parentElement.dataset.t), n = cell.cellIndex - 1;
    const parts = e.kinds.map((kind, k) => `${kind} ${num(e.bits[t][n][k])}`).join(", ");
    $("where").textContent = `token ${t} ${shown(e.tokens[t].text)}, layer ${n}: ${value(t, n, 0).toFixed(2)} bits per weight (${parts})`;
  };

  document.documentElement.classList.add("js");
  $("steps").hidden = $("where").hidden = false;
  $("where").textContent = "Point at a cell to see its figures.";
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-t]");
    if (button) choose(Number(button.dataset.t));
  });
  document.addEventListener("change", (event) => event.target.matches(".views") && label());
  $("map").addEventListener("mouseover", where);
  $("back").addEventListener("click", () => choose(chosen - 1));
  $("next").addEventListener("click", () => choose(chosen + 1));
  $("text").addEventListener("keydown", (event) => {
    const to = chosen + { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!(to >= 0 && to < e.tokens.length)) return;
    event.preventDefault();
    choose(to);
    document.querySelector(`#text [data-t="${to}"]`).focus();
  });
  const asked = /^#token=(\d+)$/.exec(location.hash);
  choose(asked && Number(asked[1]) < e.tokens.length ? Number(asked[1]) : e.chosen);
})();
