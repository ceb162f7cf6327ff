// The view of partition trees: a picture, the coded tree and what networks say, under one zoom.
// av1nb.view fills it with data. The HTML file calls `mount`, JupyterLab (by anywidget) `render`.

const HELP = [
  ["click", "choose the node there; again in the path to go up"],
  ["arrow keys", "choose the neighbour on that side"],
  ["Enter, Backspace", "go into the node, back to the node it is a part of"],
  ["drag, Shift + arrow keys", "move the picture"],
  ["wheel, + and −, 0", "zoom in and out (the wheel once a picture is clicked), show all"],
  ["e, r, l", "errors only, regret, next level"],
];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

async function unpack(text, Kind) {
  if (text == null) return null;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Kind(await new Response(stream).arrayBuffer());
}

function loadPicture(source) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => resolve(picture);
    picture.onerror = () => reject(new Error("a picture of this page cannot be decoded"));
    picture.src = source;
  });
}

// Where the nodes of each size stand in the arrays of a frame: largest size first, row by row.
function layout(frame) {
  const largest = Math.max(64, ...frame.sizes);
  const places = new Map();
  let start = 0;
  for (const size of frame.sizes) {
    const side = Math.max(64, size);
    const rows = (Math.ceil(frame.height / side) * side) / size;
    const columns = (Math.ceil(frame.width / side) * side) / size;
    places.set(size, { start, rows, columns });
    start += rows * columns;
  }
  return { places, cells: start, largest };
}

class Frame {
  static async read(page, number) {
    const data = page.frames[number];
    const frame = Object.assign(new Frame(), layout(data), data);
    frame.coded = await unpack(data.coded, Uint8Array);
    frame.costs = await unpack(data.costs, Float32Array);
    frame.seconds = await unpack(data.seconds, Float32Array);
    frame.answers = [];
    for (const { tree, p, sets } of data.networks) {
      frame.answers.push({
        tree: await unpack(tree, Uint8Array),
        p: await unpack(p, Uint16Array),
        sets: await unpack(sets, Uint16Array),
      });
    }
    frame.image = await loadPicture(page.pictures[data.picture]);
    frame.best = frame.answers.map((answer) => frame.mostProbable(answer.p));
    return frame;
  }

  cell({ size, row, col }) {
    const { start, columns } = this.places.get(size);
    return start + (row / size) * columns + col / size;
  }

  // type of the largest probability at each cell, 255 where the network says nothing
  mostProbable(p) {
    const best = new Uint8Array(this.cells).fill(255);
    for (let cell = 0; cell < this.cells; cell++) {
      let most = 0;
      for (let type = 0; type < 10; type++) {
        if (p[type * this.cells + cell] > most) {
          most = p[type * this.cells + cell];
          best[cell] = type;
        }
      }
    }
    return best;
  }

  *nodes(size) {
    const { start, rows, columns } = this.places.get(size);
    for (let i = 0; i < rows && i * size < this.height; i++) {
      for (let j = 0; j < columns && j * size < this.width; j++) {
        yield { size, row: i * size, col: j * size, cell: start + i * columns + j };
      }
    }
  }

  isInside({ size, row, col }) {
    return row + size <= this.height && col + size <= this.width;
  }

  // regret of a type at a cell: NaN unknown, Infinity given up
  regret(cell, type) {
    let best = Infinity;
    for (let t = 0; t < 10; t++) {
      const cost = this.costs[t * this.cells + cell];
      if (cost < best) best = cost;
    }
    if (!Number.isFinite(best) || best <= 0) return NaN;
    return (this.costs[type * this.cells + cell] - best) / best;
  }

  // the node of a tree at a place, from the largest down
  leafAt(tree, row, col) {
    let found = null;
    for (const size of this.sizes) {
      const node = { size, row: row - (row % size), col: col - (col % size) };
      const type = tree[this.cell(node)];
      if (type === 255) continue;
      found = node;
      if (type !== 3) break;
    }
    return found;
  }
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// Colours of regret, on a logarithmic scale from 0.1 % to 10 %.
function heat(regret) {
  if (Number.isNaN(regret)) return null;
  if (regret === Infinity) return "#c000c0";
  if (regret < 0.001) return "rgba(0, 158, 115, 0.25)";
  const share = Math.min(1, Math.log10(regret / 0.001) / 2);
  return `hsla(${55 - 55 * share}, 100%, ${55 - 8 * share}%, ${0.45 + 0.35 * share})`;
}

class View {
  constructor(root, onSelect) {
    this.onSelect = onSelect;
    this.state = { level: 0, errors: false, regret: false, fade: 33, frame: 0 };
    this.place = { scale: 0, x: 0, y: 0 };
    this.selected = null;
    this.turn = 0;
    this.build(root);
  }

  build(root) {
    this.root = make("div", { class: "av1nb-view" });
    this.title = make("h1");
    this.frameChoice = make("select", { id: "frame", onchange: () => this.chooseFrame() });
    this.levelChoice = make("select", {
      id: "level",
      onchange: () => this.set({ level: Number(this.levelChoice.value) }),
    });
    const box = (name, text) => {
      const input = make("input", {
        type: "checkbox",
        onchange: () => this.set({ [name]: input.checked }),
      });
      input.dataset.name = name;
      this[`${name}Box`] = input;
      return make("label", {}, input, ` ${text}`);
    };
    const fade = make("input", {
      type: "range",
      min: 0,
      max: 100,
      value: this.state.fade,
      oninput: () => this.set({ fade: Number(fade.value) }),
    });
    const button = (text, says, action) =>
      make("button", { type: "button", title: says, "aria-label": says, onclick: action }, text);
    this.bar = make(
      "div",
      { class: "bar", role: "toolbar", "aria-label": "what is shown" },
      make("label", {}, "frame ", this.frameChoice),
      make("label", {}, "nodes ", this.levelChoice),
      box("errors", "errors only"),
      box("regret", "regret"),
      make("label", {}, "pale ", fade),
      button("+", "zoom in", () => this.zoom(1.5)),
      button("−", "zoom out", () => this.zoom(1 / 1.5)),
      button("all", "show the whole picture", () => this.fit()),
    );
    this.panes = make("div", { class: "panes" });
    this.legend = make("div", { class: "legend", "aria-hidden": "true" });
    this.status = make("p", { class: "status", role: "status" });
    this.info = make("div", { class: "info", "aria-live": "polite" });
    const keys = make("details", {}, make("summary", {}, "Keys and mouse"), make("dl"));
    for (const [key, says] of HELP) {
      keys.lastChild.append(make("dt", {}, key), make("dd", {}, says));
    }
    this.note = make("p", { class: "note" });
    this.root.append(
      this.title, this.bar, this.panes, this.legend, this.status, this.info, keys, this.note,
    );
    root.replaceChildren(this.root);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.panes);
  }

  // Show a page; what was chosen and where one was stays, where the new page has it.
  async show(page) {
    const turn = ++this.turn;
    const number = Math.min(this.state.frame, page.frames.length - 1);
    const frame = await Frame.read(page, number);
    if (turn !== this.turn) return;
    const panes = this.paneNames(page, frame).join("\n");
    const same = this.frame && frame.width === this.frame.width
      && frame.height === this.frame.height && panes === this.shownPanes;
    Object.assign(this, { page, frame, shownPanes: panes });
    this.state.frame = number;
    this.title.textContent = page.title;
    this.note.textContent = page.note;
    this.frameChoice.replaceChildren(
      ...page.frames.map((f, i) => make("option", { value: i, selected: i === number }, f.name)),
    );
    if (!frame.places.has(this.state.level)) this.state.level = 0;
    this.levelChoice.replaceChildren(
      make("option", { value: 0 }, "leaves of the tree"),
      ...frame.sizes.map((s) => make("option", { value: s }, `${s}×${s}`)),
    );
    this.levelChoice.value = this.state.level;
    this.errorsBox.disabled = !frame.coded || !frame.answers.length;
    this.regretBox.disabled = !frame.costs || !frame.answers.length;
    if (this.errorsBox.disabled) this.state.errors = false;
    if (this.regretBox.disabled) this.state.regret = false;
    if (!same) {
      this.buildPanes();
      this.selected = null;
      this.place.scale = 0;
    } else {
      this.panesOf.forEach((pane, i) => Object.assign(pane, this.paneData()[i]));
    }
    this.update();
    this.resize();
    this.root.dataset.ready = ++this.shown || (this.shown = 1);
  }

  paneNames(page, frame) {
    return [...(frame.coded ? ["coded"] : []), ...page.networks];
  }

  paneData() {
    const { frame } = this;
    const coded = frame.coded ? [{ name: "coded", tree: frame.coded, types: frame.coded }] : [];
    return [
      ...coded,
      ...frame.answers.map((answer, i) => ({
        name: `predicted: ${this.page.networks[i]}`,
        network: i,
        tree: answer.tree,
        types: frame.best[i],
      })),
    ];
  }

  buildPanes() {
    this.panesOf = this.paneData().map((pane) => {
      pane.canvas = make("canvas", { tabindex: 0, role: "img", "aria-label": pane.name });
      this.listen(pane);
      return pane;
    });
    this.panes.replaceChildren(
      ...this.panesOf.map((pane) =>
        make("figure", {}, make("figcaption", {}, pane.name), pane.canvas)),
    );
    this.panes.style.setProperty("--panes", this.panesOf.length);
    this.panesOf[0]?.canvas.focus({ preventScroll: true });
  }

  async chooseFrame() {
    this.state.frame = Number(this.frameChoice.value);
    await this.show(this.page);
  }

  set(changes) {
    Object.assign(this.state, changes);
    this.update();
    this.draw();
  }

  update() {
    for (const name of ["errors", "regret"]) this[`${name}Box`].checked = this.state[name];
    this.levelChoice.value = this.state.level;
    for (const pane of this.panesOf) pane.shapes = this.shapesOf(pane);
    this.writeStatus();
    this.writeLegend();
    this.writeInfo();
  }

  // What a pane draws: rectangles [row, col, height, width, type] or, for regret, with a colour.
  shapesOf(pane) {
    const { frame, state } = this;
    const sizes = state.level ? [state.level] : frame.sizes;
    const shapes = [];
    for (const size of sizes) {
      for (const node of frame.nodes(size)) {
        const inTree = pane.tree[node.cell] !== 255;
        const type = state.errors || state.regret ? pane.types[node.cell] : pane.tree[node.cell];
        if (type === 255) continue;
        if (state.errors && !this.isError(node.cell, pane.network)) continue;
        const leaf = inTree && (type !== 3 || size === 8);
        if (!state.errors && !state.level && !leaf) continue;
        if (!state.errors && !state.regret && !inTree) continue;
        if (state.regret && pane.network != null) {
          const colour = heat(frame.regret(node.cell, pane.types[node.cell]));
          if (colour) shapes.push([node.row, node.col, size, size, type, colour]);
          continue;
        }
        if (!inTree && !state.errors) continue;
        for (const [top, left, height, width] of this.page.parts[type]) {
          const q = size / 4;
          const [row, col] = [node.row + top * q, node.col + left * q];
          if (row < frame.height && col < frame.width) {
            shapes.push([row, col, height * q, width * q, type]);
          }
        }
      }
    }
    return shapes;
  }

  isError(cell, network) {
    const coded = this.frame.coded[cell];
    const { best } = this.frame;
    if (coded === 255) return false;
    const wrong = (i) => best[i][cell] !== 255 && best[i][cell] !== coded;
    return network == null ? best.some((_, i) => wrong(i)) : wrong(network);
  }

  writeStatus() {
    const { frame, state } = this;
    const sizes = state.level ? [state.level] : frame.sizes;
    const said = [];
    frame.answers.forEach((_, i) => {
      if (!frame.coded) return;
      let [nodes, right] = [0, 0];
      for (const size of sizes) {
        for (const node of frame.nodes(size)) {
          const coded = frame.coded[node.cell];
          if (coded === 255 || frame.best[i][node.cell] === 255 || !frame.isInside(node)) continue;
          nodes += 1;
          right += frame.best[i][node.cell] === coded;
        }
      }
      const where = state.level ? ` of ${state.level}×${state.level}` : "";
      said.push(
        `${this.page.networks[i]}: most probable type right at ${right} of ${nodes} coded nodes`
        + `${where} inside the frame${nodes ? ` (${percent(right / nodes)})` : ""}`,
      );
    });
    this.status.textContent = said.join("; ");
  }

  writeLegend() {
    const chip = (colour, text) => {
      const square = make("i");
      square.style.background = colour;
      return make("span", {}, square, text);
    };
    this.legend.replaceChildren(
      ...(this.state.regret
        ? [[0, "< 0.1 %"], [0.001, "0.1 %"], [0.01, "1 %"], [0.1, "≥ 10 %"],
          [Infinity, "given up by the search"]].map(([r, text]) => chip(heat(r), text))
        : this.page.types.map((name, i) => chip(this.page.colours[i], name))),
    );
  }

  // One table of all that is known of the chosen node, and its way down from the superblock.
  writeInfo() {
    const { frame, page, selected: node } = this;
    if (!node) {
      this.info.replaceChildren(make("p", {}, "Click a node to see its numbers."));
      return;
    }
    const cell = frame.cell(node);
    const coded = frame.coded ? frame.coded[cell] : 255;
    const words = [];
    if (frame.coded) words.push(coded === 255 ? "not in the coded tree" : `coded ${page.types[coded]}`);
    frame.answers.forEach((answer, i) => {
      const best = frame.best[i][cell];
      if (best === 255) return;
      const set = this.setOf(i, cell).map((t) => page.types[t]).join("|");
      words.push(`${page.networks[i]}: ${page.types[best]}, set ${set}`);
    });
    this.info.replaceChildren(
      make("h2", {}, `${node.size}×${node.size} at row ${node.row}, column ${node.col}`),
      make("p", { class: "said" }, words.join("; ")),
      this.pathList(node),
      this.typeTable(node.size, cell, coded),
    );
    Object.assign(this.info.dataset, node);
  }

  // types of the set, most probable first
  setOf(network, cell) {
    const { p, sets } = this.frame.answers[network];
    const { cells } = this.frame;
    return [...Array(10).keys()]
      .filter((type) => (sets[cell] >> type) & 1)
      .sort((a, b) => p[b * cells + cell] - p[a * cells + cell] || a - b);
  }

  typeTable(size, cell, coded) {
    const { frame, page } = this;
    const { cells } = frame;
    const head = ["type", ...(frame.coded ? ["coded"] : [])];
    frame.answers.forEach((_, i) => head.push(`p, ${page.networks[i]}`, "in set"));
    if (frame.costs) head.push("RD cost", "regret");
    if (frame.seconds) head.push("time, ms");
    const body = make("tbody");
    const cellOf = (text, column) => make("td", { "data-column": column }, text);
    for (const type of page.legal[size]) {
      const row = make("tr", { "data-type": page.types[type] });
      row.append(make("th", { scope: "row" }, page.types[type]));
      if (frame.coded) row.append(cellOf(type === coded ? "✓" : "", "coded"));
      frame.answers.forEach((answer, i) => {
        const known = frame.best[i][cell] !== 255;
        const p = answer.p[type * cells + cell] / 65535;
        row.append(cellOf(known ? p.toFixed(4) : "–", `p${i}`));
        row.append(cellOf((answer.sets[cell] >> type) & 1 ? "✓" : "", `set${i}`));
      });
      const given = (value, text) =>
        Number.isNaN(value) ? "not tried" : value === Infinity ? "given up" : text;
      if (frame.costs) {
        const cost = frame.costs[type * cells + cell];
        const regret = frame.regret(cell, type);
        row.append(cellOf(given(cost, cost.toPrecision(6)), "cost"));
        row.append(cellOf(given(regret, `${(100 * regret).toFixed(3)} %`), "regret"));
      }
      if (frame.seconds) {
        const time = frame.seconds[type * cells + cell];
        row.append(cellOf(given(time, (1000 * time).toFixed(3)), "time"));
      }
      body.append(row);
    }
    const columns = make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)));
    return make(
      "div", { class: "scroll", tabindex: 0 }, make("table", {}, make("thead", {}, columns), body),
    );
  }

  pathList(node) {
    const { frame, page } = this;
    const list = make("ol", { class: "path", "aria-label": "path from the superblock" });
    const reached = frame.answers.map(() => 1);
    for (const size of frame.sizes.filter((s) => s >= node.size)) {
      const above = { size, row: node.row - (node.row % size), col: node.col - (node.col % size) };
      const cell = frame.cell(above);
      const words = [];
      const coded = frame.coded ? frame.coded[cell] : 255;
      if (coded !== 255) words.push(`coded ${page.types[coded]}`);
      frame.answers.forEach((answer, i) => {
        const best = frame.best[i][cell];
        if (best === 255) return;
        const p = (type) => answer.p[type * frame.cells + cell] / 65535;
        const name = frame.answers.length > 1 ? `${page.networks[i]} ` : "predicted ";
        words.push(
          `${name}${page.types[best]} ${p(best).toFixed(4)} (reached ${reached[i].toFixed(4)})`,
        );
        reached[i] *= p(3);
      });
      const here = size === node.size;
      list.append(
        make("li", {}, make(
          "button",
          { type: "button", "aria-current": here ? "true" : false,
            onclick: () => this.select(above) },
          `${size}×${size}`,
        ), ` ${words.join(", ")}`),
      );
    }
    return list;
  }

  select(node) {
    this.selected = node;
    this.writeInfo();
    this.draw();
    if (node && this.onSelect) this.onSelect(node);
  }

  // The node of a pane at a place of the picture, null outside.
  nodeAt(pane, row, col) {
    const { frame, state } = this;
    if (row < 0 || col < 0 || row >= frame.height || col >= frame.width) return null;
    if (state.errors && !state.level) {
      for (const size of [...frame.sizes].reverse()) {
        const node = { size, row: row - (row % size), col: col - (col % size) };
        if (this.isError(frame.cell(node), pane.network)) return node;
      }
    }
    if (state.level) {
      const size = state.level;
      return { size, row: row - (row % size), col: col - (col % size) };
    }
    return frame.leafAt(pane.tree, row, col);
  }

  step(pane, rows, columns) {
    const { frame } = this;
    if (!this.selected) return this.select(this.nodeAt(pane, 0, 0));
    const { size, row, col } = this.selected;
    const [r, c] = [row + rows * size, col + columns * size];
    if (r < 0 || c < 0 || r >= frame.height || c >= frame.width) return;
    this.select(this.nodeAt(pane, r, c) ?? { size, row: r, col: c });
    this.reveal();
  }

  climb(down) {
    if (!this.selected) return;
    const { row, col } = this.selected;
    const { sizes } = this.frame;
    const size = sizes[sizes.indexOf(this.selected.size) + (down ? 1 : -1)];
    if (size) this.select({ size, row: row - (row % size), col: col - (col % size) });
  }

  listen(pane) {
    const { canvas } = pane;
    let from = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      from = { at: at(event), x: this.place.x, y: this.place.y, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const [x, y] = at(event);
      const [dx, dy] = [x - from.at[0], y - from.at[1]];
      if (!from.moved && Math.hypot(dx, dy) < 4) return;
      from.moved = true;
      this.move(from.x - dx / this.place.scale, from.y - dy / this.place.scale);
    });
    canvas.addEventListener("pointercancel", () => (from = null));
    canvas.addEventListener("pointerup", (event) => {
      if (from && !from.moved) {
        const [x, y] = at(event);
        const { scale } = this.place;
        const node = this.nodeAt(
          pane, Math.floor(this.place.y + y / scale), Math.floor(this.place.x + x / scale),
        );
        if (node) this.select(node);
      }
      from = null;
    });
    canvas.addEventListener("wheel", (event) => {
      const focused = canvas.getRootNode().activeElement === canvas;
      if (!focused && !event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), at(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(pane, event));
  }

  key(pane, event) {
    const sides = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    };
    const levels = [0, ...this.frame.sizes];
    const actions = {
      "+": () => this.zoom(1.5),
      "=": () => this.zoom(1.5),
      "-": () => this.zoom(1 / 1.5),
      "0": () => this.fit(),
      Enter: () => this.climb(true),
      Backspace: () => this.climb(false),
      e: () => this.errorsBox.disabled || this.set({ errors: !this.state.errors }),
      r: () => this.regretBox.disabled || this.set({ regret: !this.state.regret }),
      l: () => this.set({ level: levels[(levels.indexOf(this.state.level) + 1) % levels.length] }),
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const side = sides[event.key];
    const { scale, x, y } = this.place;
    if (side && event.shiftKey) this.move(x + (side[1] * 80) / scale, y + (side[0] * 80) / scale);
    else if (side) this.step(pane, ...side);
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  resize() {
    if (!this.frame || !this.panesOf?.length) return;
    const width = this.panesOf[0].canvas.clientWidth;
    if (!width) return;
    const { frame } = this;
    const height = Math.round(
      Math.min((width * frame.height) / frame.width, Math.max(240, 0.72 * window.innerHeight)),
    );
    this.density = window.devicePixelRatio || 1;
    for (const { canvas } of this.panesOf) {
      canvas.style.height = `${height}px`;
      const [w, h] = [width, height].map((side) => Math.round(side * this.density));
      if (canvas.width !== w) canvas.width = w;  // a canvas that is set is empty
      if (canvas.height !== h) canvas.height = h;
    }
    const whole = Math.min(width / frame.width, height / frame.height);
    const wasWhole = !this.place.scale || this.place.scale <= this.whole * 1.001;
    Object.assign(this, { whole, width, height });
    if (wasWhole) this.fit();
    else this.move(this.place.x, this.place.y);
    for (const pane of this.panesOf) this.drawPane(pane);
  }

  fit() {
    this.place.scale = this.whole;
    this.move(0, 0);
  }

  zoom(factor, [x, y] = [this.width / 2, this.height / 2]) {
    const { place } = this;
    const [px, py] = [place.x + x / place.scale, place.y + y / place.scale];
    place.scale = Math.min(48, Math.max(this.whole, place.scale * factor));
    this.move(px - x / place.scale, py - y / place.scale);
  }

  move(x, y) {
    const { frame, place } = this;
    const keep = (at, shown, length) =>
      shown >= length ? (length - shown) / 2 : Math.min(length - shown, Math.max(0, at));
    place.x = keep(x, this.width / place.scale, frame.width);
    place.y = keep(y, this.height / place.scale, frame.height);
    this.draw();
  }

  reveal() {
    const { place, selected: node } = this;
    const [w, h] = [this.width / place.scale, this.height / place.scale];
    const away = node.col < place.x || node.row < place.y
      || node.col + node.size > place.x + w || node.row + node.size > place.y + h;
    if (away) this.move(node.col + (node.size - w) / 2, node.row + (node.size - h) / 2);
  }

  draw() {
    if (this.waiting || !this.width) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      for (const pane of this.panesOf) this.drawPane(pane);
    });
  }

  drawPane({ canvas, shapes }) {
    const { frame, state, page } = this;
    const { scale, x, y } = this.place;
    const context = canvas.getContext("2d");
    const s = scale * this.density;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(s, 0, 0, s, -x * s, -y * s);
    context.imageSmoothingEnabled = scale * this.density < 2;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, frame.width, frame.height);
    context.globalAlpha = 1 - state.fade / 100;
    context.drawImage(frame.image, 0, 0, frame.width, frame.height);
    context.globalAlpha = 1;
    context.save();
    context.beginPath();
    context.rect(0, 0, frame.width, frame.height);
    context.clip();
    const seen = shapes.filter(([row, col, h, w]) =>
      row + h > y && col + w > x
      && row < y + canvas.height / s && col < x + canvas.width / s);
    const groups = new Map();
    for (const shape of seen) {
      const key = shape[5] ?? shape[4];
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(shape);
    }
    context.lineWidth = Math.max(1 / s, Math.min(1.2 / scale, 0.6));
    for (const [key, group] of groups) {
      const inset = context.lineWidth / 2;
      context.beginPath();
      for (const [row, col, h, w] of group) {
        context.rect(col + inset, row + inset, w - 2 * inset, h - 2 * inset);
      }
      if (typeof key === "string") {
        context.fillStyle = key;
        context.fill();
        continue;
      }
      context.strokeStyle = context.fillStyle = page.colours[key];
      if (key !== 0) {
        context.globalAlpha = 0.3;
        context.fill();
        context.globalAlpha = 1;
      }
      context.stroke();
    }
    context.restore();
    if (this.selected) {
      const { row, col, size } = this.selected;
      for (const [colour, width] of [["#fff", 5], ["#000", 2.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = width / scale;
        context.strokeRect(col, row, size, size);
      }
    }
  }
}

export function mount(root, page, onSelect) {
  const view = new View(root, onSelect);
  view.done = view.show(page).catch((error) => {
    root.textContent = `This page cannot be shown: ${error.message}`;
  });
  return view;
}

export default {
  render({ model, el }) {
    const view = mount(el, model.get("page"), (node) => {
      model.set("selected", node);
      model.save_changes();
    });
    model.on("change:page", () => view.show(model.get("page")));
    return () => view.observer.disconnect();
  },
};
