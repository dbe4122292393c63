// One head of the token view: the words of a prompt, arcs, the whole map, and their exports. `tokens.js` puts them together.
window.workbenchTokens = (function () {
  const SVG = "http://www.w3.org/2000/svg";
  // Arcs each way, the least weight that is told in words, and how strong a shade gets before words cannot be read.
  const MOST_ARCS = 12, TOLD = 0.01, STRONGEST = { light: 0.62, dark: 0.5 };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => document.documentElement.getAttribute("data-mantine-color-scheme") === "dark";
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const exact = (value) => (value === 0 ? "0" : value >= 1e-4 ? value.toPrecision(5) : value.toExponential(4));
  const brief = (value) => (value >= 0.0095 ? value.toFixed(2) : value >= 0.00095 ? value.toFixed(3) : value.toExponential(0));

  function make(tag, fields, ...inside) {
    const found = document.createElement(tag);
    for (const [name, value] of Object.entries(fields || {})) {
      if (name === "class") found.className = value;
      else if (name in found) found[name] = value;
      else found.setAttribute(name, value);
    }
    found.append(...inside);
    return found;
  }

  function drawn(tag, fields) {
    const found = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(fields || {})) found.setAttribute(name, value);
    return found;
  }

  // 256 colours of the sequential scale, as red, green and blue.
  function shades() {
    const stops = (css("--scale").match(/#[0-9a-f]{6}/gi) || ["#ffffff", "#000000"])
      .map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
    return Array.from({ length: 256 }, (_, step) => {
      const place = (step / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (place - low)));
    });
  }

  // Of elements that wrap, the one that an arrow key leads to from the one at `from`; null for other keys.
  function following(elements, from, key) {
    const last = elements.length - 1;
    const plain = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: last }[key];
    if (plain !== undefined) return clamp(plain, 0, last);
    if (key !== "ArrowDown" && key !== "ArrowUp") return null;
    const step = key === "ArrowDown" ? 1 : -1, here = elements[from].getBoundingClientRect();
    const middle = (box) => box.left + box.width / 2;
    let best = null, line = null;
    for (let at = from + step; at >= 0 && at <= last; at += step) {
      const box = elements[at].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < here.height / 2) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > here.height / 2) break;
      const far = Math.abs(middle(box) - middle(here));
      if (best === null || far < best.far) best = { at, far };
    }
    return best === null ? from : best.at;
  }

  function save(name, blob) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // A pattern: the lower triangle, row by row. Null is what the mask hides.
  class Weights {
    constructor(buffer, count, reach) {
      this.values = new Float32Array(buffer);
      this.count = count;
      this.reach = reach || Infinity;
      if (this.values.length !== (count * (count + 1)) / 2) throw new Error("The server sent another number of entries; reload the page.");
      this.tops = { first: 0, rest: 0, column: 0 };
      for (let row = 0, at = 0; row < count; row++) for (let key = 0; key <= row; key++, at++) {
        const value = this.values[at], tops = this.tops;
        if (key) tops.rest = Math.max(tops.rest, value);
        else {
          tops.first = Math.max(tops.first, value);
          if (row) tops.column = Math.max(tops.column, value);
        }
      }
    }

    at(row, key) {
      return key > row || key <= row - this.reach ? null : this.values[(row * (row + 1)) / 2 + key];
    }

    sum(row) {
      let found = 0;
      for (let key = 0; key <= row; key++) found += this.at(row, key) || 0;
      return found;
    }

    // Where colours end.
    top(first) { return (first ? Math.max(this.tops.first, this.tops.rest) : this.tops.rest) || 1; }

    // The query that has most to tell: the largest weight on a key other than the first and itself.
    telling() {
      let best = this.count - 1, most = 0;
      for (let row = 2; row < this.count; row++) for (let key = 1; key < row; key++) {
        const value = this.at(row, key);
        if (value !== null && value > most) [best, most] = [row, value];
      }
      return best;
    }
  }

  class Card {
    constructor(view, name) {
      this.view = view;
      this.name = name;
      this.build();
      view.weights(name).then((weights) => {
        this.weights = weights;
        view.arrived(this);
        this.repaint();
      }).catch((error) => { this.says.textContent = error.message; });
    }

    build() {
      const view = this.view, name = this.name;
      const button = (text, label, does) => {
        const found = make("button", { class: "export", type: "button", "aria-label": `${name}: ${label}` }, text);
        found.addEventListener("click", does);
        return found;
      };
      const links = [];
      if (view.box.dataset.head) links.push(make("a", { href: `${view.box.dataset.head}&head=${name}` }, "head"));
      if (view.box.dataset.lab) {
        const lab = view.box.dataset.lab;
        links.push(make("a", { href: `${lab}${lab.includes("?") ? "&" : "?"}heads=${name}`, title: "Take this head away" }, "lab"));
      }
      this.words = make("p", { class: "tok-words", role: "group", "aria-label": `${name}, tokens` });
      this.arcs = drawn("svg", { class: "tok-arcs", "aria-hidden": "true" });
      this.says = make("p", { class: "tok-says" }, "…");
      this.pair = make("p", { class: "tok-pair" });
      this.canvas = make("canvas", {});
      this.map = make("div", { class: "tok-map", role: "img", "aria-label": `${name}, the whole pattern` }, this.canvas);
      this.caption = make("figcaption", { class: "caption" });
      this.scroll = make("div", { class: "tok-scroll" }, make("div", { class: "tok-page" }, this.words, this.arcs));
      const close = button("Remove", "remove", () => view.toggle(name));
      const outs = [
        button("Words PNG", "save words as PNG", () => this.saveWords("png")), button("SVG", "save words as SVG", () => this.saveWords("svg")),
        button("Map PNG", "save map as PNG", () => this.saveMap("png")), button("SVG", "save map as SVG", () => this.saveMap("svg")),
        button("CSV", "save weights as CSV", () => this.saveCsv()),
      ];
      this.box = make("figure", { class: "panel tok-card", "data-head": name },
        make("div", { class: "tok-head" }, make("h3", {}, name), ...links, close),
        make("div", { class: "tok-body" }, make("div", { class: "tok-text" }, this.scroll, this.says, this.pair), this.map),
        make("div", { class: "below" }, this.caption, make("div", { class: "exports" }, ...outs)));
      this.setWords();
      this.listen();
    }

    setWords() {
      const breaks = new Set(this.view.about.breaks);
      this.spans = this.view.about.tokens.map((text, at) => {
        // A leading space stays outside, so that only the word itself is shaded.
        const gap = /^␣[^␣…]/.test(text) ? 1 : 0;
        const word = make("span", { class: "tok", role: "button", tabIndex: -1, dir: "auto" }, text.slice(gap));
        word.dataset.at = at;
        // Only these are cut to a width: hundreds of clipped boxes would slow down every frame of the page.
        word.wide = text.length > 24 || /\p{M}/u.test(text);
        this.words.append(gap ? " " : "", word);
        if (breaks.has(at)) this.words.append(make("br"));
        return word;
      });
      this.looks = this.spans.map(() => ({}));
      this.tabbed = null;
    }

    listen() {
      const view = this.view, index = (event) => {
        const word = event.target.closest && event.target.closest(".tok");
        return word ? Number(word.dataset.at) : null;
      };
      const point = (event) => { const at = index(event); if (at !== null) view.point(at, this.spans[at], this); };
      this.words.addEventListener("pointerover", point);
      this.words.addEventListener("focusin", point);
      for (const name of ["pointerleave", "focusout"]) this.words.addEventListener(name, () => view.leave());
      this.words.addEventListener("click", (event) => { const at = index(event); if (at !== null) view.lock(at); });
      this.words.addEventListener("keydown", (event) => {
        const at = index(event);
        if (at === null || event.ctrlKey || event.metaKey || event.altKey) return;
        if (event.key === "Enter" || event.key === " ") view.lock(at);
        else {
          const next = following(this.spans, at, event.key);
          if (next === null) return;
          this.spans[next].focus();
        }
        event.preventDefault();
      });
      this.canvas.addEventListener("pointermove", (event) => {
        const cell = this.cellAt(event);
        if (cell) view.pointCell(cell.row, cell.key, event, this); else view.leave();
      });
      this.canvas.addEventListener("pointerleave", () => view.leave());
      this.canvas.addEventListener("click", (event) => { const cell = this.cellAt(event); if (cell) view.lock(cell.row); });
      this.scroll.addEventListener("scroll", () => view.leave());
    }

    // Weight between the token that is looked from and another one, in whichever direction the mask allows.
    between(focus, other) { return other > focus ? this.weights.at(other, focus) : this.weights.at(focus, other); }

    // The first position's own column is its own scale, or everything in it would be drawn alike.
    topOf(focus) {
      return !this.view.first && focus === 0 ? Math.max(this.weights.tops.column, 1e-9) : this.weights.top(this.view.first);
    }

    share(value, top) {
      const share = clamp(value / top, 0, 1);
      return this.view.scale === "linear" ? share : Math.sqrt(share);
    }

    // After a change of colours, options or sizes: what was measured and drawn before is of no use.
    repaint() {
      this.picture = this.ground = null;
      if (!this.weights) return;
      const outside = this.view.first ? "" : ", position 0 left out of their range";
      const scale = this.view.scale === "linear" ? "linear" : "square root";
      this.caption.textContent = `${this.weights.count} tokens. Colours end at ${exact(this.weights.top(this.view.first))} (${scale})${outside}.`;
      this.map.hidden = !this.view.maps;
      this.remeasure();
      this.paint();
    }

    remeasure() {
      this.places = this.sizes = this.ground = null;
      const names = ["sunken", "surface", "ink", "muted", "back", "forth"];
      this.colour = Object.fromEntries(names.map((name) => [name, css("--" + name)]));
    }

    // Where words stand. Asked once, as each answer after a change of style costs a layout of the page.
    measured() {
      if (!this.places) {
        const frame = this.words.getBoundingClientRect();
        const places = this.spans.map((word) => {
          const box = word.getBoundingClientRect();
          return { x: box.left + box.width / 2 - frame.left, top: box.top - frame.top, bottom: box.bottom - frame.top };
        });
        this.places = { places, width: frame.width, height: frame.height };
      }
      return this.places;
    }

    paint() {
      if (!this.weights || !this.box.isConnected) return;
      const view = this.view, focus = view.focus(), top = this.topOf(focus), most = STRONGEST[dark() ? "dark" : "light"];
      const pair = view.pair;
      if (!this.colour) this.remeasure();
      this.spans.forEach((word, at) => {
        const weight = this.between(focus, at), forth = at > focus;
        const shown = weight !== null && (at === focus || view.shows(forth ? "forth" : "back"));
        const bar = at === 0 && focus !== 0 && !view.first;
        const share = shown && !bar ? this.share(weight, top) : 0;
        const now = {
          share,
          forth,
          background: share > 0.01 ? `color-mix(in srgb, var(${forth ? "--forth" : "--back"}) ${(100 * most * share).toFixed(1)}%, transparent)` : "",
          mass: bar && shown ? clamp(weight, 0, 1) : 0,
          names: ["tok", word.wide && "wide", at === focus && "focus", at === focus && view.locked !== null && "locked", weight === null && "masked",
            pair && at !== focus && (at === pair.row || at === pair.key) && "other"].filter(Boolean).join(" "),
        };
        const was = this.looks[at];
        if (was.background !== now.background) word.style.background = now.background;
        if (was.mass !== now.mass) word.style.setProperty("--mass", now.mass.toFixed(4));
        if (was.names !== now.names) {
          word.className = now.names;
          word.setAttribute("aria-pressed", String(at === focus && view.locked !== null));
        }
        this.looks[at] = now;
      });
      this.tab(focus);
      this.tell(focus);
      this.drawArcs(focus);
      this.paintMap();
    }

    tab(at) {
      if (this.words.contains(document.activeElement)) at = Number(document.activeElement.dataset.at);
      if (this.tabbed === at) return;
      if (this.tabbed !== null) this.spans[this.tabbed].tabIndex = -1;
      this.spans[at].tabIndex = 0;
      this.tabbed = at;
    }

    strongest(focus, forth, count, least) {
      const found = [];
      const [from, to] = forth ? [focus + 1, this.spans.length] : [this.view.first ? 0 : 1, focus];
      for (let at = from; at < to; at++) {
        const weight = this.between(focus, at);
        if (weight !== null && weight >= least) found.push({ at, weight });
      }
      return found.sort((a, b) => b.weight - a.weight).slice(0, count);
    }

    tell(focus) {
      const view = this.view, list = (found) => found.flatMap((one, place) => [
        place ? ", " : " ", ...view.word(one.at), ` ${brief(one.weight)}`,
      ]);
      const parts = [...view.word(focus), " "];
      if (view.shows("back")) {
        const sink = focus && !view.first ? this.weights.at(focus, 0) : null, own = this.weights.at(focus, focus);
        const found = this.strongest(focus, false, 3, TOLD);
        parts.push(make("span", { class: "tok-key back" }, "looks at"), ...(found.length ? list(found) : [` no earlier token above ${TOLD}`]));
        parts.push(`; itself ${brief(own)}`);
        if (sink !== null) parts.push(`; position 0 ${brief(sink)}`);
        // A learned sink takes what is missing in a row.
        const missing = 1 - this.weights.sum(focus);
        if (missing > TOLD) parts.push(`; on no token ${brief(missing)}`);
        parts.push(". ");
      }
      if (view.shows("forth")) {
        const found = this.strongest(focus, true, 3, TOLD);
        parts.push(make("span", { class: "tok-key forth" }, "is looked at by"), ...(found.length ? list(found) : [` no later token above ${TOLD}`]), ".");
      }
      this.says.replaceChildren(...parts);
      const pair = view.pair, weight = pair && this.weights.at(pair.row, pair.key);
      this.pair.replaceChildren(...(pair ? this.pairWords(pair, weight) : []));
      if (pair && weight !== null) this.pair.dataset.value = weight; else delete this.pair.dataset.value;
    }

    // The strongest tie of a token each way, exactly.
    most(at) {
      const lines = [make("div", {}, ...this.view.word(at))];
      for (const forth of [false, true]) {
        const [best] = this.view.shows(forth ? "forth" : "back") ? this.strongest(at, forth, 1, 0) : [];
        if (!best) continue;
        const words = make("span", { class: `tok-key ${forth ? "forth" : "back"}` }, forth ? "is looked at most by" : "looks most at");
        lines.push(make("div", {}, words, " ", ...this.view.word(best.at), ": ", make("strong", {}, exact(best.weight))));
      }
      return lines;
    }

    pairWords(pair, weight) {
      const value = weight === null ? "hidden by the window" : exact(weight);
      return ["query ", ...this.view.word(pair.row), " → key ", ...this.view.word(pair.key), ": ", make("strong", {}, value)];
    }

    // Above: what the token looks at. Below: what looks at it.
    drawArcs(focus) {
      this.arcs.replaceChildren();
      const view = this.view;
      if (!view.arcs) return;
      const { places, width, height } = this.measured();
      this.arcs.setAttribute("width", width);
      this.arcs.setAttribute("height", height);
      for (const forth of [false, true]) {
        if (!view.shows(forth ? "forth" : "back")) continue;
        for (const { at, weight } of this.strongest(focus, forth, MOST_ARCS, view.arcs)) {
          const side = forth ? 1 : -1, place = (one) => [one.x, forth ? one.bottom : one.top];
          const [x, y] = place(places[focus]), [u, v] = place(places[at]);
          const lift = side * clamp(7 + Math.hypot(x - u, y - v) / 14, 9, 22);
          const fields = { class: forth ? "forth" : "back", "data-at": at, "stroke-width": (0.9 + 2.8 * weight).toFixed(2), "stroke-opacity": (0.35 + 0.6 * Math.sqrt(weight)).toFixed(2) };
          this.arcs.append(
            drawn("path", { ...fields, d: `M${x.toFixed(1)} ${y.toFixed(1)} C${x.toFixed(1)} ${(y + lift).toFixed(1)} ${u.toFixed(1)} ${(v + lift).toFixed(1)} ${u.toFixed(1)} ${v.toFixed(1)}` }),
            drawn("circle", { class: fields.class, cx: u.toFixed(1), cy: v.toFixed(1), r: 1.8 }));
        }
      }
    }

    // The map: one pixel an entry, enlarged.
    picturePixels() {
      const count = this.weights.count, top = this.weights.top(this.view.first), colours = shades();
      const canvas = make("canvas", { width: count, height: count }), pen = canvas.getContext("2d");
      const image = pen.createImageData(count, count);
      for (let row = 0; row < count; row++) for (let key = 0; key <= row; key++) {
        const value = this.weights.at(row, key);
        if (value === null) continue;
        image.data.set([...colours[Math.round(255 * this.share(value, top))], 255], 4 * (row * count + key));
      }
      pen.putImageData(image, 0, 0);
      return canvas;
    }

    frame() {
      if (this.sizes) return this.sizes;
      const count = this.weights.count, room = Math.max(240, this.map.clientWidth || 460);
      const named = count <= 40, left = named ? 84 : 40, above = named ? 78 : 34;
      const a_cell = this.view.cards.size > 1 ? 12 : 15;
      const side = Math.floor(clamp(room - left - 4, 160, clamp(count * a_cell, 200, Math.max(420, count))));
      this.sizes = { count, named, left, above, side, cell: side / count, wide: left + side + 4, high: above + side + 4 };
      return this.sizes;
    }

    paintMap() {
      if (!this.view.maps) return;
      const frame = this.frame(), ratio = window.devicePixelRatio || 1;
      const [width, height] = [Math.round(frame.wide * ratio), Math.round(frame.high * ratio)];
      if (this.canvas.width !== width || this.canvas.height !== height) {
        Object.assign(this.canvas, { width, height });
        Object.assign(this.canvas.style, { width: frame.wide + "px", height: frame.high + "px" });
      }
      if (!this.ground) {
        this.ground = make("canvas", { width, height });
        this.drawMap(this.ground.getContext("2d"), frame, ratio);
      }
      const pen = this.canvas.getContext("2d");
      pen.setTransform(1, 0, 0, 1, 0, 0);
      pen.clearRect(0, 0, width, height);
      pen.drawImage(this.ground, 0, 0);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      this.drawMarks(pen, frame);
    }

    drawMap(pen, frame, ratio) {
      const { left, above, side, cell } = frame;
      this.picture = this.picture || this.picturePixels();
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.fillStyle = this.colour.sunken;
      pen.fillRect(left, above, side, side);
      pen.imageSmoothingEnabled = cell * ratio < 1;
      pen.drawImage(this.picture, left, above, side, side);
      this.labels(frame).forEach((label) => this.write(pen, label, this.colour.muted));
    }

    write(pen, { text, x, y, turn, anchor }, colour) {
      pen.save();
      pen.translate(x, y);
      pen.rotate((turn * Math.PI) / 180);
      pen.font = '10px "Segoe UI", Inter, Roboto, sans-serif';
      pen.direction = "ltr";
      pen.textAlign = { start: "left", end: "right", middle: "center" }[anchor];
      pen.fillStyle = colour;
      pen.fillText(text, 0, 0);
      pen.restore();
    }

    // The row of what the token looks at, the column of what looks at it, and the entry that is pointed at.
    drawMarks(pen, frame) {
      const { count, left, above, cell } = frame, focus = this.view.focus(), pair = this.view.pair;
      const at = (place) => place * cell, wide = Math.max(cell, 2);
      this.labels(frame).forEach((label) => { if (label.at === focus) this.write(pen, label, this.colour.ink); });
      pen.lineWidth = 1.5;
      pen.strokeStyle = this.colour.back;
      pen.strokeRect(left - 0.5, above + at(focus) - 0.5, at(focus) + wide + 1, wide + 1);
      pen.strokeStyle = this.colour.forth;
      pen.strokeRect(left + at(focus) - 0.5, above + at(focus) - 0.5, wide + 1, at(count - focus) + 1);
      if (!pair) return;
      pen.strokeStyle = this.colour.ink;
      pen.lineWidth = 2;
      pen.strokeRect(left + at(pair.key) - 2, above + at(pair.row) - 2, wide + 4, wide + 4);
    }

    labels({ count, named, left, above, side, cell }) {
      const found = [];
      const step = named ? 1 : [5, 10, 20, 50, 100].find((one) => count / one <= 12) || 100;
      for (let at = 0; at < count; at += step) {
        const letters = Array.from(this.view.plain(at));
        const text = named ? letters.slice(0, 11).join("") + (letters.length > 11 ? "…" : "") : String(at);
        const middle = (at + 0.5) * cell;
        found.push({ text, x: left - 4, y: above + middle + 3, turn: 0, anchor: "end", at });
        found.push(named ? { text, x: left + middle + 3, y: above - 4, turn: -90, anchor: "start", at } : { text, x: left + middle, y: above - 4, turn: 0, anchor: "middle", at });
      }
      found.push({ text: "key", x: left + side, y: 9, turn: 0, anchor: "end" }, { text: "query", x: 9, y: above + side, turn: -90, anchor: "start" });
      return found;
    }

    cellAt(event) {
      if (!this.weights) return null;
      const { left, above, cell, count } = this.frame();
      const key = Math.floor((event.offsetX - left) / cell), row = Math.floor((event.offsetY - above) / cell);
      return key >= 0 && row < count && key <= row ? { row, key } : null;
    }

    // Within its own box only: the page stays where it is.
    show(at) {
      const box = this.scroll, frame = box.getBoundingClientRect(), word = this.spans[at].getBoundingClientRect();
      if (word.top < frame.top + 30 || word.bottom > frame.bottom - 30) box.scrollTop += word.top - frame.top - box.clientHeight / 2;
    }

    fileName(what) { return `${this.name}-${what}`; }

    saveCsv() {
      // A cell that begins so would be a formula in a spreadsheet.
      const cell = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? "'" : "") + text.replace(/"/g, '""')}"`;
      const names = this.view.about.tokens.map(cell), lines = ["query,key,query token,key token,weight"];
      for (let row = 0; row < this.weights.count; row++) for (let key = 0; key <= row; key++) {
        const value = this.weights.at(row, key);
        if (value !== null) lines.push(`${row},${key},${names[row]},${names[key]},${value}`);
      }
      save(this.fileName("weights.csv"), new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    }

    saveMap(kind) {
      if (!this.weights) return;
      const frame = this.frame(), { wide, high } = frame;
      if (kind === "png") {
        const canvas = make("canvas", { width: 3 * wide, height: 3 * high }), pen = canvas.getContext("2d");
        this.drawMap(pen, frame, 3);
        pen.globalCompositeOperation = "destination-over";
        pen.fillStyle = this.colour.surface;
        pen.fillRect(0, 0, wide, high);
        canvas.toBlob((blob) => save(this.fileName("map.png"), blob));
        return;
      }
      this.picture = this.picture || this.picturePixels();
      const page = this.sheet(wide, high);
      page.append(drawn("rect", { x: frame.left, y: frame.above, width: frame.side, height: frame.side, fill: this.colour.sunken }));
      // Entries as one picture, enlarged by a whole number so that none is blurred.
      const grow = Math.max(1, Math.floor(1200 / frame.count)), big = make("canvas", { width: grow * frame.count, height: grow * frame.count });
      const pen = big.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(this.picture, 0, 0, big.width, big.height);
      page.append(drawn("image", { href: big.toDataURL(), x: frame.left, y: frame.above, width: frame.side, height: frame.side }));
      for (const { text, x, y, turn, anchor } of this.labels(frame)) {
        const label = drawn("text", { transform: `translate(${x} ${y}) rotate(${turn})`, "text-anchor": anchor, "font-size": 10, fill: this.colour.muted });
        label.textContent = text;
        page.append(label);
      }
      save(this.fileName("map.svg"), new Blob([new XMLSerializer().serializeToString(page)], { type: "image/svg+xml" }));
    }

    sheet(wide, high) {
      const page = drawn("svg", { width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, "font-family": '"Segoe UI", Inter, Roboto, sans-serif' });
      page.append(drawn("rect", { width: wide, height: high, fill: this.colour.surface }));
      return page;
    }

    // The words as they stand, shades and arcs included.
    saveWords(kind) {
      if (!this.weights) return;
      const frame = this.words.getBoundingClientRect(), edge = 14, most = STRONGEST[dark() ? "dark" : "light"];
      const [wide, high] = [Math.ceil(frame.width) + 2 * edge, Math.ceil(frame.height) + 2 * edge];
      const page = this.sheet(wide, high), inside = drawn("g", { transform: `translate(${edge} ${edge})` });
      this.spans.forEach((word, at) => {
        const box = word.getBoundingClientRect(), look = this.looks[at], x = box.left - frame.left, y = box.top - frame.top;
        const fill = { x, y, width: box.width, height: box.height, rx: 3 };
        if (look.share > 0.01) inside.append(drawn("rect", { ...fill, fill: this.colour[look.forth ? "forth" : "back"], "fill-opacity": (most * look.share).toFixed(3) }));
        if (look.mass) inside.append(drawn("rect", { x, y: y + box.height - 2, width: box.width * look.mass, height: 2, fill: this.colour.muted }));
        if (at === this.view.focus()) inside.append(drawn("rect", { ...fill, fill: "none", stroke: this.colour.ink, "stroke-width": 1.5 }));
        const text = drawn("text", { x: x + 2, y: y + box.height / 2 + 4.5, "font-size": 13.5, fill: this.colour.ink, textLength: Math.max(1, box.width - 4), lengthAdjust: "spacingAndGlyphs" });
        // Spaces at the end of a token count.
        text.setAttributeNS("http://www.w3.org/XML/1998/namespace", "xml:space", "preserve");
        text.style.whiteSpace = "pre";
        text.textContent = word.textContent;
        inside.append(text);
      });
      for (const arc of this.arcs.children) {
        const copy = arc.cloneNode(), colour = this.colour[arc.getAttribute("class")];
        if (arc.tagName === "path") { copy.setAttribute("fill", "none"); copy.setAttribute("stroke", colour); } else copy.setAttribute("fill", colour);
        inside.append(copy);
      }
      page.append(inside);
      const blob = new Blob([new XMLSerializer().serializeToString(page)], { type: "image/svg+xml" });
      if (kind === "svg") return save(this.fileName("words.svg"), blob);
      const image = new Image();
      image.onload = () => {
        const canvas = make("canvas", { width: 2 * wide, height: 2 * high });
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        URL.revokeObjectURL(image.src);
        canvas.toBlob((found) => save(this.fileName("words.png"), found));
      };
      image.src = URL.createObjectURL(blob);
    }
  }

  return { Card, Weights, make, css, clamp, exact, brief, shades, following };
})();
