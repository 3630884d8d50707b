// Places boxes, nested clusters and edges from top to bottom with dagre, and wraps a long graph into columns.
//
// Takes {nodes: [{id, width, height, parent}], clusters: [{id, parent}], edges: [{source, target, light}], aspect,
// header, ranksep}, where light edges do not decide where anything goes, and returns {nodes: [[x, y]], clusters: [{id, part, x0, y0, x1, y1}], edges: [{points, far}], width, height}.
// A cluster that is cut by the end of a column comes back in parts. Runs in a browser and in a bare V8.
"use strict";
globalThis.structuredClone ??= (value) => JSON.parse(JSON.stringify(value));

globalThis.layoutGraph = (() => {
  const PAD = 9, GUTTER = 34, MOST_ROUTED = 4;

  function place(spec) {
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ rankdir: "TB", nodesep: 16, edgesep: 8, ranksep: spec.ranksep ?? 18, ranker: spec.nodes.length > 700 ? "longest-path" : "network-simplex" });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const c of spec.clusters) graph.setNode(c.id, {});
    for (const n of spec.nodes) graph.setNode(n.id, { width: n.width, height: n.height });
    for (const item of [...spec.clusters, ...spec.nodes]) if (item.parent != null) graph.setParent(item.id, item.parent);
    for (const e of spec.edges) if (!e.light) graph.setEdge(e.source, e.target, {});
    dagre.layout(graph);
    const nodes = spec.nodes.map((n) => ({ ...n, x: graph.node(n.id).x, y: graph.node(n.id).y }));
    const edges = spec.edges.map((e) => {
      const points = e.light ? [] : graph.edge(e.source, e.target).points.map((p) => [p.x, p.y]);
      const ys = points.map((p) => p[1]);
      return { ...e, points, top: Math.min(...ys), bottom: Math.max(...ys) };
    });
    return { nodes, edges };
  }

  // The box of each cluster around what is in it, among `nodes`.
  function boxes(spec, nodes, header) {
    const parents = Object.fromEntries(spec.clusters.map((c) => [c.id, c.parent]));
    const depth = {};
    const depthOf = (id) => (depth[id] ??= parents[id] == null ? 0 : 1 + depthOf(parents[id]));
    const found = {};
    const grow = (id, x0, y0, x1, y1) => {
      const box = (found[id] ??= { id, x0, y0, x1, y1 });
      box.x0 = Math.min(box.x0, x0); box.y0 = Math.min(box.y0, y0);
      box.x1 = Math.max(box.x1, x1); box.y1 = Math.max(box.y1, y1);
    };
    for (const n of nodes) {
      const [w, h] = [n.width / 2, n.height / 2];
      if (n.parent != null) grow(n.parent, n.x - w - PAD, n.y - h - header, n.x + w + PAD, n.y + h + PAD);
    }
    const inner = spec.clusters.map((c) => c.id).sort((a, b) => depthOf(b) - depthOf(a));
    for (const id of inner) {
      const box = found[id];
      if (box && parents[id] != null) grow(parents[id], box.x0 - PAD, box.y0 - header, box.x1 + PAD, box.y1 + PAD);
    }
    return found;
  }

  // Heights at which a line from left to right meets no node, with the edges and clusters that it does meet.
  function marksOf(placed, clusters) {
    const sorted = [...placed.nodes].sort((a, b) => a.y - a.height / 2 - (b.y - b.height / 2));
    const found = [];
    let bottom = -Infinity;
    for (const n of sorted) {
      const top = n.y - n.height / 2;
      if (bottom > -Infinity && top > bottom + 4) {
        const y = (top + bottom) / 2;
        const split = Object.values(clusters).filter((c) => c.y0 < y && y < c.y1).map((c) => c.y1 - c.y0);
        found.push({ y, crossing: crossers(placed.edges, y).length, split });
      }
      bottom = Math.max(bottom, n.y + n.height / 2);
    }
    return found;
  }

  // What a cut costs: edges that have to be led around, and clusters that would have fitted into a column.
  const priced = (marks, ideal) => marks.map(({ y, crossing, split }) => ({
    y, cost: 0.7 * Math.min(Math.max(crossing - 1, 0), 8) + split.reduce((sum, height) => sum + (height < ideal ? 3 : 0.25), 0),
  }));

  const crossers = (edges, y) => edges.filter((e) => e.top < y && y < e.bottom);

  // The cuts into `columns` columns of about the same height, by dynamic programming.
  function chooseCuts(marks, y0, y1, columns) {
    const ideal = (y1 - y0) / columns;
    const stops = [{ y: y0, cost: 0 }, ...marks, { y: y1, cost: 0 }];
    const misfit = (i, j) => 12 * ((stops[j].y - stops[i].y) / ideal - 1) ** 2 + stops[j].cost;
    let best = stops.map((_, j) => ({ score: j ? misfit(0, j) : Infinity, cuts: [] }));
    for (let k = 2; k <= columns; k++) {
      best = stops.map((_, j) => {
        let chosen = { score: Infinity, cuts: [] };
        for (let i = 1; i < j; i++) {
          const score = best[i].score + misfit(i, j);
          if (score < chosen.score) chosen = { score, cuts: [...best[i].cuts, stops[i].y] };
        }
        return chosen;
      });
    }
    return best[stops.length - 1];
  }

  function wrap(spec, placed, cuts, header) {
    const columnOf = (y) => cuts.filter((cut) => cut <= y).length;
    const columns = Array.from({ length: cuts.length + 1 }, () => ({ nodes: [], x0: Infinity, x1: -Infinity, y0: Infinity, y1: -Infinity }));
    for (const n of placed.nodes) columns[columnOf(n.y)].nodes.push(n);
    const length = (e) => e.bottom - e.top;
    const all = cuts.map((cut) => crossers(placed.edges, cut).sort((a, b) => length(a) - length(b)));
    const far = new Set(all.flatMap((edges) => edges.slice(MOST_ROUTED)));  // the long ones, where there are too many
    const crossing = all.map((edges) => edges.filter((e) => !far.has(e)).sort((a, b) => placed.edges.indexOf(a) - placed.edges.indexOf(b)));
    const reach = (c, x0, y0, x1, y1) => {
      c.x0 = Math.min(c.x0, x0); c.y0 = Math.min(c.y0, y0); c.x1 = Math.max(c.x1, x1); c.y1 = Math.max(c.y1, y1);
    };
    for (const c of columns) {
      c.boxes = boxes(spec, c.nodes, header);
      for (const b of Object.values(c.boxes)) reach(c, b.x0, b.y0, b.x1, b.y1);
      for (const n of c.nodes) reach(c, n.x - n.width / 2, n.y - n.height / 2, n.x + n.width / 2, n.y + n.height / 2);
    }
    for (const e of placed.edges) if (!far.has(e)) for (const [x, y] of e.points) {
      const c = columns[columnOf(y)];
      if (y > c.y0 && y < c.y1) reach(c, x, y, x, y);
    }
    let left = 0;
    const headroom = cuts.length ? 10 + 6 * MOST_ROUTED : 0;
    for (const c of columns) { c.dx = left - c.x0; c.dy = headroom - c.y0; left += c.x1 - c.x0 + GUTTER; }
    const lowest = Math.max(...columns.map((c) => c.y1 + c.dy));

    const nodes = {}, clusters = [];
    columns.forEach((c, k) => {
      for (const n of c.nodes) nodes[n.id] = [n.x + c.dx, n.y + c.dy];
      for (const b of Object.values(c.boxes)) {
        const part = columns.slice(0, k).filter((before) => b.id in before.boxes).length;
        clusters.push({ id: b.id, part, x0: b.x0 + c.dx, y0: b.y0 + c.dy, x1: b.x1 + c.dx, y1: b.y1 + c.dy });
      }
    });
    const edges = placed.edges.map((e) => {
      if (e.light || far.has(e)) return { far: true, points: [nodes[e.source], nodes[e.target]] };
      const points = [];
      e.points.forEach((p, i) => {
        const at = columnOf(p[1]);
        const last = i ? columnOf(e.points[i - 1][1]) : at;
        for (let k = last; k < at; k++) {  // over the end of column k, up through the gutter, into the next
          const [q, cut] = [e.points[i - 1], cuts[k]];
          const t = (cut - q[1]) / (p[1] - q[1] || 1);
          const x = q[0] + t * (p[0] - q[0]);
          const lane = 6 * crossing[k].indexOf(e);
          const [from, to] = [columns[k], columns[k + 1]];
          const between = to.x0 + to.dx - GUTTER / 2 + lane - 4;
          const below = from.y1 + from.dy + 8 + lane, above = headroom - 8 - lane;
          points.push([x + from.dx, below], [between, below], [between, above], [x + to.dx, above]);
        }
        points.push([p[0] + columns[at].dx, p[1] + columns[at].dy]);
      });
      return { far: false, points };
    });
    return { nodes, clusters, edges, width: left - GUTTER, height: lowest + headroom };
  }

  // With names of its own: in JavaScript's objects "constructor" is taken.
  function renamed(given) {
    const names = new Map();
    given.clusters.forEach((c, i) => names.set("cluster " + c.id, "c" + i));
    given.nodes.forEach((n, i) => names.set("node " + n.id, "n" + i));
    const parent = (item) => (item.parent == null ? null : names.get("cluster " + item.parent));
    return {
      ...given,
      clusters: given.clusters.map((c, i) => ({ id: "c" + i, parent: parent(c) })),
      nodes: given.nodes.map((n, i) => ({ ...n, id: "n" + i, parent: parent(n) })),
      edges: given.edges.map((e) => ({ ...e, source: names.get("node " + e.source), target: names.get("node " + e.target) })),
    };
  }

  return (given) => {
    if (!given.nodes.length) return { nodes: [], clusters: [], edges: [], width: 0, height: 0 };
    const spec = renamed(given);
    const header = spec.header ?? 18;
    const placed = place(spec);
    const clusters = boxes(spec, placed.nodes, header);
    const y0 = Math.min(...placed.nodes.map((n) => n.y - n.height / 2));
    const y1 = Math.max(...placed.nodes.map((n) => n.y + n.height / 2));
    const marks = marksOf(placed, clusters);
    let best = null;
    for (let columns = 1; columns <= (spec.columns ?? 14); columns++) {
      const cuts = columns > 1 ? chooseCuts(priced(marks, (y1 - y0) / columns), y0, y1, columns) : { score: 0, cuts: [] };
      if (cuts.score === Infinity) break;
      const wrapped = wrap(spec, placed, cuts.cuts, header);
      const size = Math.max(wrapped.width / spec.aspect, wrapped.height);  // what has to fit: the smaller, the larger the text
      const score = Math.log(size) + 0.03 * cuts.score;
      if (!best || score < best.score) best = { ...wrapped, score };
      if (wrapped.width > 3 * spec.aspect * wrapped.height) break;
    }
    best.nodes = spec.nodes.map((n) => best.nodes[n.id]);
    best.clusters = best.clusters.map((c) => ({ ...c, id: given.clusters[+c.id.slice(1)].id }));
    return best;
  };
})();
