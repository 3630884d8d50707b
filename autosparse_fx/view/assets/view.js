// The page: which modules are open, what is drawn for that, search, details. Drawn by cytoscape, placed by layout.js.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const FONT = 'system-ui, "DejaVu Sans", sans-serif', HEADER = 20, MOST_AT_FIRST = 60, MOST_RESULTS = 8, MOST_ZOOM_TO_FIT = 1.5;
  const FOLDED = new Set(["parameter", "state", "saved"]);
  const RAMP = ["#fde725", "#bddf26", "#7ad151", "#44bf70", "#22a884", "#21918c", "#2a788e", "#355f8d", "#414487", "#482475", "#440154"]
    .map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const colour = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2);
    return RAMP[i].map((c, k) => Math.round(c + (at - i) * (RAMP[i + 1][k] - c)));
  };
  const rgb = (c) => `rgb(${c.join(",")})`;
  const isLight = (c) => 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] > 128;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (share) => (100 * share).toFixed(1) + "%";
  const times = (shape) => shape.replace(/(\w)x(?=\w)/g, "$1×");
  const short = (n) => { for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) if (n >= size) return +(n / size).toPrecision(3) + unit; return String(n); };

  const state = { graph: 0, version: data.version, open: new Set(), folded: false };
  let model, shown, cy;

  // --- the graph that is looked at -----------------------------------------------------------------------------------

  function load() {
    const { nodes, edges, modules } = data.graphs[state.graph].versions[state.version];
    const table = (pairs) => Object.assign(Object.create(null), Object.fromEntries(pairs));  // any name may be a key
    const byId = table(nodes.map((n) => [n.id, n]));
    const inside = table(Object.keys(modules).map((id) => [id, []]));
    const into = table([]);
    for (const [a, b] of edges) (into[b] ??= []).push(a);
    const branches = new Set();  // the modules that call modules
    const chain = (id) => { const found = []; for (let m = id || null; m != null; m = modules[m].parent) found.unshift(m); return found; };
    for (const n of nodes) { n.chain = chain(n.module); for (const m of n.chain) inside[m].push(n); for (const m of n.chain.slice(0, -1)) branches.add(m); }
    const joined = new Set();  // to something besides parameters
    model = { branches, joined, nodes, edges, modules, byId, inside, into, chain };
    for (const [a, b] of edges) if (!isQuiet(byId[a]) && !isQuiet(byId[b])) joined.add(a).add(b);
  }

  const isQuiet = (n) => FOLDED.has(n.kind) || (n.kind === "output" && (model.into[n.id] || []).length > MOST_RESULTS);
  const isDrawn = (n) => state.folded || !(isQuiet(n) || (n.kind === "op" && model.nodes.length > 1 && !model.joined.has(n.id)));

  function boxes(open) {
    const owner = Object.create(null), found = new Map();
    for (const n of model.nodes.filter(isDrawn)) {
      const shut = n.chain.find((m) => !open.has(m));
      const id = shut === undefined ? "n:" + n.id : "m:" + shut;
      owner[n.id] = id;
      if (!found.has(id)) {
        const within = shut === undefined ? n.chain[n.chain.length - 1] : model.modules[shut].parent;
        found.set(id, { id, module: shut, node: shut === undefined ? n : null, parent: within ?? null });
      }
    }
    return { owner, found };
  }

  // At each level the modules that call others open; those that call none, all at once, at the last.
  const levels = () => 1 + Math.max(0, ...[...model.branches].map((m) => model.chain(m).length));
  const levelOf = (m) => (model.branches.has(m) ? model.chain(m).length : levels());
  const openTo = (depth) => new Set(Object.keys(model.modules).filter((m) => levelOf(m) <= depth));

  function openAtFirst() {
    if (data.depth != null) return openTo(data.depth);
    let depth = levels() - 1;
    while (depth > 0 && boxes(openTo(depth)).found.size > MOST_AT_FIRST) depth--;
    return openTo(depth);
  }

  // --- what is known of a box ----------------------------------------------------------------------------------------

  function summary(nodes) {
    const weights = new Map();
    let flops = 0, sparse = 0, masks = 0, gradients = 0, operations = 0;
    for (const n of nodes) {
      if (n.weight && n.kind !== "parameter") weights.set(n.weight, n);
      flops += n.flops ?? 0; sparse += n.sparse_flops ?? n.flops ?? 0; masks += n.is_mask; gradients += n.is_gradient; operations += ["op", "mask", "gradient"].includes(n.kind);
    }
    let numel = 0, zeros = 0;
    for (const n of weights.values()) { numel += n.numel; zeros += n.numel * n.sparsity; }
    return { weights, numel, sparsity: numel ? zeros / numel : null, flops, sparse, masks, gradients, operations };
  }

  const relative = (path, parent) => {
    const around = parent != null ? model.modules[parent].path + "." : "";
    return around && path.startsWith(around) ? path.slice(around.length) : path;
  };

  function describe(box) {
    if (box.module != null) {
      const module = model.modules[box.module], about = summary(model.inside[box.module]);
      const lines = [relative(module.label, module.parent), module.type];
      if (about.weights.size === 1) lines[1] += " " + times([...about.weights.values()][0].weight_shape);
      if (about.sparsity != null) lines.push(percent(about.sparsity) + " zeros");
      return { ...about, text: lines.filter(Boolean).join("\n") };
    }
    const n = box.node;
    const lines = [n.label];
    if (n.is_mask || n.is_gradient) lines.push(relative(n.weight ?? "", box.parent));
    else if (n.shape) lines.push(times(n.shape.length > 40 ? n.shape.split(", ")[0] + ", …" : n.shape));
    if (n.sparsity != null) lines.push(percent(n.sparsity) + " zeros");
    return { sparsity: n.sparsity ?? null, masks: n.is_mask, gradients: n.is_gradient, text: lines.filter(Boolean).join("\n") };
  }

  function rows(target) {
    if (target.module != null) {
      const module = model.modules[target.module], about = summary(model.inside[target.module]);
      return { head: module.label || "(model)", rows: [
        ["module", module.type], ["zeros", about.sparsity == null ? null : percent(about.sparsity)], ["weights", [...about.weights.keys()].slice(0, 8).join(", ") + (about.weights.size > 8 ? `, … (${about.weights.size})` : "")],
        ["elements", about.numel ? about.numel.toLocaleString("en") : null],
        ["FLOPs", about.flops ? short(about.flops) : null], ["without zeros", about.sparse < about.flops ? short(about.sparse) : null],
        ["operations", about.operations], ["masks", about.masks || null], ["annealed", about.gradients || null],
      ], hint: shown && shown.found.has("m:" + target.module) ? "Click to open." : "Click to close." };
    }
    const n = target.node;
    const inputs = (model.into[n.id] || []).map((id) => model.byId[id]).filter((i) => FOLDED.has(i.kind)).map((i) => i.label);
    return { head: n.label, rows: [
      ["node", n.id], ["kind", { mask: "threshold mask", gradient: "annealed gradient" }[n.kind] ?? n.kind], ["op", n.op], ["target", n.target], ["module", n.module ? model.modules[n.module].label : null],
      ["shape", n.shape && times(n.shape)], ["dtype", n.dtype], ["tensor", n.tensor], ["weight", n.weight], ["weight shape", n.weight_shape && times(n.weight_shape)],
      ["zeros", n.sparsity == null ? null : percent(n.sparsity)], ["threshold", n.threshold == null ? null : n.threshold.toExponential(3)],
      ["FLOPs", n.flops == null ? null : short(n.flops)], ["without zeros", n.sparse_flops < n.flops ? short(n.sparse_flops) : null], ["reads", inputs.join(", ")],
      ["pass", n.backward ? "backward" : null], ["recomputed", n.recompute ? "in the backward pass" : null], ["source", n.source],
    ] };
  }

  function showDetails(target) {
    const panel = $("details");
    panel.replaceChildren();
    const add = (parent, tag, text) => { const made = document.createElement(tag); made.textContent = text; parent.append(made); return made; };
    if (!target) {
      add(panel, "p", "Point at a box for its details. Click a module to open it, the frame of an open one to close it. Scroll to zoom, drag to move.");
      return;
    }
    const { head, rows: pairs, hint } = rows(target);
    add(panel, "h2", head);
    const list = add(panel, "dl", "");
    for (const [name, value] of pairs) if (value != null && value !== "") {
      add(list, "dt", name);
      const dd = add(list, "dd", "");
      add(dd, ["target", "source", "node"].includes(name) ? "code" : "span", String(value));
    }
    if (hint) add(panel, "p", hint);
  }

  // --- drawing -------------------------------------------------------------------------------------------------------

  const canvas = document.createElement("canvas").getContext("2d");
  const measure = (text, size, weight) => { canvas.font = `${weight} ${size}px ${FONT}`; return Math.max(...text.split("\n").map((line) => canvas.measureText(line).width)); };

  const isBackward = (id, view) => { const box = view.found.get(id); return box.node ? box.node.backward : model.modules[box.module].backward; };

  // Reads of a mask that another layer made, and what the backward pass reads of the forward pass, cross everything and
  // place nothing; but for where the backward pass begins.
  function lighten(wires, view) {
    const goesOn = new Set(wires.filter((w) => !isBackward(w.target, view)).map((w) => w.source));
    const isInput = (id) => view.found.get(id).node?.kind === "input";
    const ends = [...view.found.keys()].filter((id) => !isBackward(id, view) && !goesOn.has(id));
    const last = ends.filter((id) => !isInput(id)).pop();
    for (const w of wires) {
      const across = isBackward(w.target, view) && !isBackward(w.source, view);
      const [from, to] = [view.found.get(w.source), view.found.get(w.target)];
      const shared = w.onlyMasks && (from.node?.kind !== "mask" || from.parent !== to.parent);
      w.light = shared || across && w.source !== last && !(ends.includes(w.source) && isInput(w.source));
    }
  }

  function elements() {
    const view = boxes(state.open);
    shown = view;
    const clusters = new Set();
    for (const box of view.found.values()) for (const m of model.chain(box.parent)) clusters.add(m);
    const nodes = [...view.found.values()].map((box) => {
      const about = describe(box);
      const count = about.text.split("\n").length;
      const isModule = box.module != null;
      return { id: box.id, parent: box.parent, about, isModule, kind: box.node?.kind ?? "module", width: measure(about.text, 11, 500) + (isModule ? 30 : 18), height: 15 * count + 9 };
    });
    const edges = new Map();
    for (const [a, b] of model.edges) {
      const [from, to] = [view.owner[a], view.owner[b]];
      if (!from || !to || from === to) continue;
      const key = from + "\u0000" + to, others = edges.get(key)?.onlyMasks ?? true;
      edges.set(key, { source: from, target: to, onlyMasks: others && model.byId[a].is_mask });
    }
    const wires = [...edges.values()];
    lighten(wires, view);
    const regions = [...clusters].map((id) => ({ id, parent: model.modules[id].parent }));
    const aspect = Math.max(0.5, $("view").clientWidth / Math.max($("view").clientHeight, 200));
    const placed = layoutGraph({ nodes, clusters: regions, edges: wires, aspect, header: HEADER, ranksep: 26 });
    return { nodes, wires, placed };
  }

  function toCytoscape({ nodes, wires, placed }) {
    const made = [];
    for (const r of placed.clusters) {
      const module = model.modules[r.id], name = relative(module.label, module.parent) + (r.part ? ", continued" : "");
      const full = name + "  " + module.type, room = r.x1 - r.x0 - 14;
      const label = measure(full, 10, 600) < room ? full : name;
      made.push({ group: "nodes", classes: "region", data: { id: `r:${r.id}:${r.part}`, module: r.id, label: "", width: r.x1 - r.x0, height: r.y1 - r.y0, depth: model.chain(r.id).length }, position: { x: (r.x0 + r.x1) / 2, y: (r.y0 + r.y1) / 2 } });
      const wide = measure(label, 10, 600);
      made.push({ group: "nodes", classes: "heading", data: { id: `h:${r.id}:${r.part}`, module: r.id, label, width: wide, height: 12 }, position: { x: r.x0 + 8 + wide / 2, y: r.y0 + 11 } });
    }
    const centres = new Map(nodes.map((n, i) => [n.id, placed.nodes[i]]));
    for (const n of nodes) {
      const [x, y] = centres.get(n.id), known = n.about.sparsity != null, fill = known ? colour(n.about.sparsity) : null;
      made.push({ group: "nodes", position: { x, y },
        classes: ["box", n.isModule ? "module" : n.kind, known ? "weighted" : "", n.about.masks ? "masked" : "", n.about.gradients ? "annealed" : ""].join(" "),
        data: { id: n.id, label: n.about.text, width: n.width, height: n.height, ...(known ? { fill: rgb(fill), ink: isLight(fill) ? "#1f2430" : "#ffffff" } : {}) } });
    }
    wires.forEach((w, i) => {
      const { points, far } = placed.edges[i];
      const bends = far ? {} : bendsOf(points, centres.get(w.source), centres.get(w.target));
      made.push({ group: "edges", classes: far ? "far" : bends.weights ? "routed" : "", data: { id: "e:" + w.source + "\u0000" + w.target, source: w.source, target: w.target, ...bends } });
    });
    return made;
  }

  // Cytoscape wants the corners of an edge relative to the straight line from centre to centre.
  function bendsOf(points, [ax, ay], [bx, by]) {
    const inner = points.slice(1, -1), dx = bx - ax, dy = by - ay, square = dx * dx + dy * dy, length = Math.sqrt(square);
    if (!inner.length || !length) return {};
    const weights = inner.map(([x, y]) => (((x - ax) * dx + (y - ay) * dy) / square).toFixed(5));
    const distances = inner.map(([x, y]) => (((x - ax) * -dy + (y - ay) * dx) / length).toFixed(2));
    return { weights: weights.join(" "), distances: distances.join(" ") };
  }

  function style() {
    const [ground, panel, ink, quiet, line, accent, mask, gradient] = ["--ground", "--panel", "--ink", "--quiet", "--line", "--accent", "--mask", "--gradient"].map(css);
    return [
      { selector: "node", style: { label: "data(label)", width: "data(width)", height: "data(height)", "font-family": FONT, "text-wrap": "wrap", "text-valign": "center", "z-index-compare": "manual" } },
      { selector: ".region", style: { shape: "round-rectangle", "corner-radius": 7, "background-color": quiet, "background-opacity": 0.07, "border-width": 1, "border-color": quiet, "border-opacity": 0.35, "z-index": "data(depth)" } },
      { selector: ".heading", style: { "background-opacity": 0, "font-size": 10, "font-weight": 600, color: quiet, "text-outline-color": ground, "text-outline-width": 2, "text-outline-opacity": 0.85, "z-index": 3500 } },
      { selector: ".box", style: { shape: "round-rectangle", "corner-radius": 5, "background-color": panel, "border-width": 1, "border-color": quiet, "border-opacity": 0.55, color: ink, "font-size": 11, "font-weight": 500, "line-height": 1.25, "z-index": 3000 } },
      { selector: ".module", style: { "border-style": "double", "border-width": 3 } },
      { selector: ".input, .output", style: { "corner-radius": 14, "border-color": accent, "border-opacity": 0.9 } },
      { selector: ".parameter, .state, .saved", style: { shape: "rectangle", "border-style": "dashed", "background-color": ground } },
      { selector: ".weighted", style: { "background-color": "data(fill)", color: "data(ink)" } },
      { selector: ".masked", style: { "border-color": mask, "border-opacity": 1 } },
      { selector: ".mask", style: { "border-width": 3 } },
      { selector: ".annealed", style: { "border-color": gradient, "border-opacity": 1 } },
      { selector: ".gradient", style: { "border-width": 3 } },
      { selector: "edge", style: { width: 1.3, "line-color": quiet, "target-arrow-color": quiet, "target-arrow-shape": "triangle", "arrow-scale": 0.75, "curve-style": "straight", opacity: 0.75, "z-index-compare": "manual", "z-index": 2000 } },
      { selector: ".routed", style: { "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(distances)", "segment-radii": 10, "edge-distances": "node-position" } },
      { selector: ".far", style: { "curve-style": "unbundled-bezier", opacity: 0.22, width: 1 } },
      { selector: ".near", style: { "line-color": accent, "target-arrow-color": accent, opacity: 1, width: 2.2, "z-index": 2500 } },
      { selector: ".hit", style: { "underlay-color": accent, "underlay-opacity": 0.4, "underlay-padding": 7 } },
    ];
  }

  function draw({ anchor = null, fit = false } = {}) {
    const before = anchor && cy.getElementById(anchor).nonempty() ? cy.getElementById(anchor).renderedPosition() : null;
    const made = toCytoscape(elements());
    cy.batch(() => { cy.elements().remove(); cy.add(made); });
    if (fit || !before) return showAll();
    const id = anchor.slice(2).replace(/:\d+$/, "");
    const now = [anchor, "m:" + id, `r:${id}:0`].map((key) => cy.getElementById(key)).find((e) => e.nonempty());
    if (now) { const p = now.renderedPosition(); cy.panBy({ x: before.x - p.x, y: before.y - p.y }); }
  }

  function showAll() {
    cy.fit(undefined, 24);
    if (cy.zoom() > MOST_ZOOM_TO_FIT) { cy.zoom(MOST_ZOOM_TO_FIT); cy.center(); }
  }

  const targetOf = (element) => element.data("module") != null ? { module: element.data("module") }
    : element.id().startsWith("m:") ? { module: element.id().slice(2) } : { node: model.byId[element.id().slice(2)] };

  // --- what one can do -----------------------------------------------------------------------------------------------

  function open(module, anchor) { for (const m of model.chain(module)) state.open.add(m); draw({ anchor }); }

  function close(module, anchor) {
    for (const m of [...state.open]) if (model.chain(m).includes(module)) state.open.delete(m);
    draw({ anchor });
  }

  function step(by) {
    const now = Math.max(0, ...[...state.open].filter((m) => model.inside[m].some(isDrawn)).map(levelOf));
    state.open = openTo(Math.min(Math.max(now + by, 0), levels()));
    draw({ fit: true });
  }

  function matches(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const found = [];
    for (const [id, m] of Object.entries(model.modules)) if (m.label.toLowerCase().includes(wanted)) found.push({ name: m.label, about: m.type, module: id });
    for (const n of model.nodes) if (isDrawn(n)) {
      const name = [n.weight, n.id, n.label].find((s) => s && s.toLowerCase().includes(wanted));
      if (name) found.push({ name, about: n.label, node: n });
    }
    const rank = (f) => { const name = f.name.toLowerCase(); return (name === wanted ? 0 : name.endsWith("." + wanted) ? 1 : name.startsWith(wanted) ? 2 : 3) + (f.node ? 0.5 : 0); };
    return found.map((f, i) => [rank(f), f.name.length, i, f]).sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]).slice(0, 14).map((f) => f[3]);
  }

  function reveal(found) {
    const around = found.module != null ? model.chain(found.module).slice(0, -1) : found.node.chain;
    for (const m of around) state.open.add(m);
    const isOpen = found.module != null && state.open.has(found.module);
    const id = found.module == null ? "n:" + found.node.id : isOpen ? `r:${found.module}:0` : "m:" + found.module;
    draw({ fit: true });
    const hit = cy.getElementById(id);
    hit.addClass("hit");
    const zoom = Math.min(1.15, cy.width() / (hit.width() + 80), cy.height() / (hit.height() + 80));
    cy.zoom(Math.max(zoom, cy.zoom()));
    cy.center(hit);
    showDetails(targetOf(hit));
  }

  function offer() {
    const list = $("found"), found = matches($("search").value);
    list.replaceChildren(...found.map((f, i) => {
      const item = document.createElement("li"), about = document.createElement("small");
      item.textContent = f.name;
      about.textContent = f.about;
      item.append(about);
      item.setAttribute("aria-selected", i === 0);
      item.addEventListener("mousedown", (event) => { event.preventDefault(); list.hidden = true; reveal(f); });
      return item;
    }));
    list.hidden = !found.length;
    return found;
  }

  function pickGraph() {
    load();
    state.open = openAtFirst();
    for (const button of $("versions").children) button.setAttribute("aria-pressed", button.value === state.version);
    $("title").textContent = data.graphs[state.graph].title;
    draw({ fit: true });
  }

  function start() {
    $("note").textContent = data.note;
    $("note").hidden = !data.note;
    $("graph").hidden = data.graphs.length < 2;
    data.graphs.forEach((g, i) => $("graph").add(new Option(g.title, i)));
    $("graph").addEventListener("change", () => { state.graph = +$("graph").value; pickGraph(); });
    for (const version of Object.keys(data.graphs[0].versions)) {
      const button = document.createElement("button");
      button.textContent = button.value = version;
      button.addEventListener("click", () => {
        state.version = version;
        const kept = state.open;
        load();
        state.open = new Set([...kept].filter((m) => Object.hasOwn(model.modules, m)));
        for (const other of $("versions").children) other.setAttribute("aria-pressed", other === button);
        draw({ fit: true });
      });
      $("versions").append(button);
    }
    $("ramp").style.background = `linear-gradient(90deg, ${RAMP.map(rgb).join(",")})`;
    cy = cytoscape({ container: $("view"), style: style(), autoungrabify: true, boxSelectionEnabled: false, minZoom: 0.02, maxZoom: 4 });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cy.style(style()));
    cy.on("mouseover", "node", (event) => { showDetails(targetOf(event.target)); event.target.connectedEdges().addClass("near"); });
    cy.on("mouseout", "node", (event) => event.target.connectedEdges().removeClass("near"));
    cy.on("tap", "node", (event) => {
      const target = targetOf(event.target);
      if (target.module == null) return;
      if (event.target.hasClass("region") || event.target.hasClass("heading")) close(target.module, event.target.id()); else open(target.module, event.target.id());
      showDetails(target);
    });
    $("folded").addEventListener("change", () => { state.folded = $("folded").checked; draw({ fit: true }); });
    $("expand").addEventListener("click", () => step(1));
    $("collapse").addEventListener("click", () => step(-1));
    $("fit").addEventListener("click", showAll);
    const zoomBy = (factor) => cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
    $("in").addEventListener("click", () => zoomBy(1.3));
    $("out").addEventListener("click", () => zoomBy(1 / 1.3));
    $("search").addEventListener("input", offer);
    $("search").addEventListener("blur", () => { $("found").hidden = true; });
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape") $("search").blur();
      if (event.key !== "Enter") return;
      const [first] = offer();
      $("found").hidden = true;
      if (first) reveal(first);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && document.activeElement !== $("search")) { event.preventDefault(); $("search").focus(); }
    });
    showDetails(null);
    pickGraph();
    globalThis.autosparse = { cy, state };
  }

  start();
})();
